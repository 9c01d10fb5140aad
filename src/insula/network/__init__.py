"""Networks of tenants.

intent          the networks, ports and names that a tenant wants on this host, as data
fabric          the protocol of an implementation, which makes what an intent says; `linux` is one
dhcp, names     what guests ask for: their configuration, and names that policies allow
addresses       subnets, allocation of addresses, MAC addresses
probe, live     packets that are sent: between all instances, or one whose way is followed

Three parts say whom a packet reaches. They share no code, so that they can be compared:

linux           the compiler: turns an intent into rules, sets, devices and routes of the kernel
interpreter     reads back what is installed, and computes from it where packets of every kind go
reference       says from the intent alone where they should go
proof           compares the last two (`insula verify`)
tracing         asks them about one packet (`insula trace`)
"""
