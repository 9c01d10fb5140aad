"""Hypervisors of type 1 by libvirt: Xen, on the host that is its domain 0, and ESXi, over the network.

library.py     the library, which is imported when it is needed; its event loop
connection.py  a connection to a hypervisor, with time limits
errors.py      the library's errors as Insula's
elements.py    parts of domains that hypervisors have in common (https://libvirt.org/formatdomain.html)
xen.py         domains of Xen
esx.py         domains of ESXi
keeper.py      `LibvirtKeeper`, the implementation of `GuestKeeper`

The library is Debian's: python3-libvirt, an optional package. It needs no daemon for ESXi. For Xen, libvirtd runs in
domain 0, with libvirt-daemon-driver-xen.
"""
