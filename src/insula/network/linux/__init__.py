"""The linux fabric: a network namespace for each tenant on the host. Needs no daemon and no special kernel.

    host namespace          tenant's namespace, /run/netns/<prefix>-<tenant>        instance's namespace
    <prefix>-u1 ══ veth ══ uplink ─ routes, nftables, NAT ─ br1 (gateway) ─ p7 ══ veth ══ eth0
                                                          └ br2 (gateway) ─ p8 ══ veth ══ eth0

Routes, neighbours, connection tracking and rules belong to a namespace. So tenants with the same addresses can't
conflict: no table has entries of both. The tenants' namespaces are connected through the host's namespace only. Each
has an uplink there with an address of its own, to which the tenant's traffic is translated (NAT; rules.py has the
packet filter).
"""
