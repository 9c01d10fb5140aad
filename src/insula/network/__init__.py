"""Networks of tenants.

intent          the networks, ports and names that a tenant wants on this host, as data
fabric          the protocol of an implementation; each subpackage has one (`linux`)
addresses       subnets, allocation of addresses, MAC addresses
reachability    computes which endpoint may reach which, from the intents and from the installed state
probe           measures that with packets
verify          compares the three results
"""
