"""Networks of tenants, and the ports of instances on them."""
