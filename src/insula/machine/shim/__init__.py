"""The shim: process 1 of the container in which QEMU runs, one for each machine.

A machine is a container whose program is a machine. So everything that Insula has for containers serves for machines
too: their own namespaces and IDs, control groups, logs, attached clients, records of how they ended, and that they go
on whatever happens to insulad. The shim is what turns one into the other:

    monitor ── stdin, stdout, stderr ──► shim ── frames ──► QEMU: virtio-serial ──► agent ──► program in the guest

It starts QEMU, gives the machine its identity, has the agent start the program, and passes on streams, signals and the
exit status. Another program is executed in the guest by executing `exec` of this package in the container, which
passes its streams to the shim, and ends as that program does.

What the guest sends is parsed here, within the container's walls, and nowhere else. The shim has the rights of an
ordinary user of a tenant, and no capability.

main.py      from the start of QEMU to its end
sessions.py  conversations with the agent
client.py    one more program in the guest
qmp.py       commands to QEMU
"""
