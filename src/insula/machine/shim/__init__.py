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

plan.py      the command line of QEMU, made by whoever makes the container
start.py     the start of QEMU
kept.py      the shim of a guest that a hypervisor of type 1 keeps
common.py    names that both sides know
serve.py     from then on to its end, for the kind of machine that it is
main.py      a machine with the agent
connection.py  its socket, connections to that, and messages
listener.py  what comes on them
questions.py what insulad asks
readiness.py whether it runs
identity.py  the identity that it is given
agent.py     conversations with the agent
sessions.py  those about a program
client.py    one more program in the guest
started.py   whether it is executed
last_words.py  what QEMU says if it fails
answers.py   whether the machine answers
slots.py     where devices that come and go are
changes.py   how they do: one answer for each, when the guest has found them
hotplug.py   network devices that come and go
disks.py     further disks
resize.py    a machine that grows
moment.py    a machine that stands still, for a snapshot
departure.py a machine that leaves for another host while it runs
arrival.py   one that comes from another host
disk_machine.py  the shim of a machine of a disk image, which has no agent
qmp.py       commands to QEMU
"""
