"""The agent: process 1 of a virtual machine that was made from an OCI image.

The machine's kernel unpacks an initramfs with Python and this package, and executes `/init`. The agent mounts what a
system needs, loads the drivers of para-virtualized devices, and then does what the host asks for over one virtio-serial
port, or over the console of a guest of Xen (`insula.machine.protocol`): it gives the machine its identity, its network
and its root file system, and runs programs in it with `insula.container.create`, the code that makes containers on a
host. So a program finds the same environment, user, rights and streams in both kinds of room, and is PID 1 of a PID
namespace of its own.

main.py      process 1: the loop
early.py     what comes first: file systems of the kernel, modules, the channel to the host
channel.py   frames, in and out
identity.py  random numbers, clock, names: what must differ between machines that are copies of one
network.py   devices, addresses and routes
root.py      the root file system: the image below, the machine's own disk above
programs.py  programs and their streams
warm.py      a process that waits to become the first program
files.py     files in and out, as tar streams

The agent never executes anything of the image itself, and the image's programs can't see the agent's files.
"""
