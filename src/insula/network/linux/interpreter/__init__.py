"""Read back what the kernel of this host does with tenants' packets, and compute whom they reach.

bytecode.py   programs of `network.interpreter` from nftables' expressions
stack.py      one network stack as read back: rules, devices, addresses, routes, neighbours, forwarding entries
"""
