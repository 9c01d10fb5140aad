"""Packets from outside: published ports, floating addresses and load balancers, by translation (NAT) in two steps.

1. The host's table translates a published port of one of the host's addresses to the tenant's *transit address*, and
   keeps the port. Tenants' own addresses overlap, transit addresses don't. Floating addresses need no translation here:
   they are routed to the tenant's uplink.
2. The table in the tenant's namespace translates the transit or floating address to the address of the instance.

Source addresses stay: an instance sees its client's address. They are translated (SNAT) only where replies would not
come back to the place that must undo the translation of the destination.

rules.py      the rules of both tables, which never change
addresses.py     the addresses that the elements of one tenant are made of
elements.py   from a tenant's intent to the elements of both tables
transits.py   transit addresses
host.py       the host's side: elements, routes, settings
tenant.py     the tenant's side
"""
