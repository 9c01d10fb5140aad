"""The driver of virtual machines on a hypervisor of type 1, Xen: guests of it, each with its shim in a container.

driver.py   `XenDriver`: what differs from machines with QEMU
guests.py   `Guests`: the guests of this insulad, by the IDs of their instances
keepers.py  connections to the hypervisor, and threads for calls
request.py  the container of the shim, and its plan
checks.py   what `insula doctor` says
"""
