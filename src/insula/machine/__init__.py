"""Virtual machines: hypervisors behind one protocol, and what a guest made from an OCI image consists of.

hypervisor.py  `Hypervisor` and `GuestKeeper`, the protocols; registry.py has them by name
libvirt/     hypervisors of type 1: Xen, ESXi
qemu/        QEMU: its command line, templates, the root of its container
shim/        what runs beside QEMU in that container
installation.py  what all machines of a host share
disk/        what machines of disk images are given beside their disk
guest/       the parts of a guest: its kernel, modules, and the initramfs with the agent (`insula.agent`)
protocol.py  frames between a machine and its host
"""
