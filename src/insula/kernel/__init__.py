"""Thin typed wrappers of Linux: system calls, namespaces, mounts, cgroups, seccomp, capabilities, netlink, nftables.

Everything here is mechanism and knows nothing of tenants or containers. Names and constants are the kernel's own.
"""
