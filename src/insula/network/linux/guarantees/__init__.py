"""Guaranteed and limited bandwidth, by traffic control of the kernel.

tree.py       classes of HTB for tenants' floors and ceilings, as data
program.py    the eBPF program that gives a tenant's packets to its class
shaper.py     `Shaper`: the tree of this host, between tenants' uplinks and the host
host.py       what of it a fabric shows
ports.py      `PortShaper`: ceilings of single instances, and the addresses of those with floors
overlay.py    packets of tenants' networks between hosts in the tree of this host
destinations.py  ceilings of what tenants send to other hosts, set by these while they are overloaded
"""
