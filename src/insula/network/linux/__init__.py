"""The fabric for any Linux kernel, without a daemon of its own: a network namespace per tenant on the host.

    host namespace          tenant's namespace, /run/netns/<prefix>-<tenant>        instance's namespace
    <prefix>-u1 ══ veth ══ uplink ─ routes, nftables, NAT ─ br1 (gateway) ─ p7 ══ veth ══ eth0
                                                          └ br2 (gateway) ─ p8 ══ veth ══ eth0

Because routes, neighbours, connection tracking and rules belong to a namespace, two tenants with the same addresses
never meet: there is no table in which both stand. What links the tenants' namespaces is the host's, and there each
has an uplink with an address of its own, behind which the tenant hides (`rules` says what may pass).
"""
