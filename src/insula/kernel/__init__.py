"""Linux, one thin typed wrapper each: syscalls, namespaces, mounts, cgroups, seccomp, capabilities, netlink, nftables.

Everything here is mechanism: it knows nothing of tenants or containers. Names and constants are the kernel's own.
"""
