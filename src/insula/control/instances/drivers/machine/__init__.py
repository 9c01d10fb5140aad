"""The driver of virtual machines: containers whose program is a machine (`insula.machine.shim`).

driver.py    `MachineDriver`: what differs from containers
request.py   requests to the container runtime, and the plan for the shim
jail.py      the container that QEMU runs in
network.py   what the guest is told of its network
disk.py      the disk of a machine
checks.py    what `insula doctor` says
"""
