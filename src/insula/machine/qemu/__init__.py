"""QEMU: a Type-2 hypervisor, which is a program of the host. With KVM the processor runs the guest's code itself,
else QEMU translates it (TCG).

command_line.py  what QEMU is started with
template.py      a machine that was booted once, of which others are copies
root.py          the root file system of the container that QEMU runs in
"""
