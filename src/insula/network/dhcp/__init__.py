"""Configuration for guests that ask: answers to DHCP (RFC 2131), DHCPv6 (RFC 8415) and router solicitations (RFC 4861).

lease.py           what a port's guest is told
v4.py              DHCP
v6.py              DHCPv6
advertisement.py   router advertisements
frames.py          frames with UDP and ICMPv6

There is no pool. An answer has the addresses that the port has anyway, and a client with an unknown MAC address gets
none. So nothing has to be stored, answers are the same after a restart, and no client can take anything from another.
All functions are pure.
"""
