"""DNS for instances: confined dnsmasq processes in the namespaces of tenants."""
