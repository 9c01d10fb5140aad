"""The driver of virtual machines: containers whose program is a machine (`insula.machine.shim`).

driver.py    `MachineDriver`: what differs from containers
request.py   requests to the container runtime, and the plan for the shim
sizes.py     the size of a machine, and what it may have
guest_config.py  the OCI config of a program in the guest
start_files.py  what a start needs, and the files that QEMU is given
readiness.py whether the machine has its identity, and its program runs
jail.py      the container that QEMU runs in
shim.py      what the shim is asked
snapshots.py snapshots, and copies of machines that run
taking.py    how they are made
stored.py    a machine at one moment, as files
fits.py      whether a machine can go back to it
memory.py    the memory of a moment, which machines share
moment.py    what is done while a machine stands still
migration.py machines that move to another host, or come from one
moving.py    what is done while one moves
relay.py     the bytes of such a machine
files.py     files in and out
holder.py    the machine that has those of an instance which does not run
network.py   what the guest is told of its network
plugging.py  ports of a machine that runs
resizing.py  a machine that grows
further_disks.py  further disks
disk.py      the disk of a machine
disk_lock.py  its lock, which no other machine may have
disk_image.py  `DiskImageDriver`: machines of disk images, which have no agent; beside it their requests, files and
             snapshots
screen.py    their screens
checks.py    what `insula doctor` says
"""
