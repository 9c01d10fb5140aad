"""Egress by DNS name: the instances of a tenant reach the hosts of the names that policies allow them, and no others.

A DNS query is egress too. So queries of instances with such rules are redirected to the tenant's `forwarder`, which
answers names outside the rules itself (RFC 8914: Filtered). It forwards other queries, and has the addresses of the
answer leased to the instance before it answers: a lease is an element of an nftables set with a timeout. Connections to
ports 443 and 80 of leased addresses are redirected to the `proxy`, which compares the server name of TLS (RFC 6066) or
the Host of HTTP with the names that the address was leased for.

Forwarder and proxy parse data of hostile instances and servers. They run in one process without rights, the *gate*.
Another process, the *lessor*, has the one right to change sets; it takes requests from the gate, and checks them
against the rules itself. Both survive insulad (`process`).

- `wire`, `edns`: messages of DNS (RFC 1035, RFC 6891). `patterns`: the names of rules.
- `rules`: what each instance may reach. `destinations`: which addresses can be leased.
- `forwarder`, `upstream`, `answers`, `rates`: from a query to its answer.
- `leases`, `elements`, `lessor`: from an answer to elements of sets.
- `client_hello`, `http_requests`, `proxy`, `splicing`: from a connection to a checked connection.
- `control`: the messages between insulad, lessor and gate. `process`: how they are started and confined.
"""
