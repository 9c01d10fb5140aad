"""QEMU: a Type-2 hypervisor, which is a program of the host. With KVM the processor runs the guest's code itself,
else QEMU translates it (TCG).

command_line.py  what QEMU is started with, for a machine with the agent
disk_machine.py  the same for a machine of a disk image
accelerator.py   which of both it is on this host
state.py         the state of a machine beside its memory, written and loaded
template.py      a machine that was booted once, of which others are copies
snapshot.py      the memory of a machine that stands still
migration.py     a machine that moves to another QEMU while it runs
stream.py        QEMU's migration stream, split into memory and state
root.py          the root file system of the container that QEMU runs in
"""
