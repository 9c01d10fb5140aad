"""An OCI runtime (runtime-spec) for Linux. It knows no tenants, networks, images or stores.

config/         config.json: its schema, its shape, and the rules between its parts
create/         making the processes of a container
    spawn.py        outside of the new container: control group, namespaces, clone
    init.py         what PID 1 does from its birth in new namespaces on
    join.py         how a process joins a container that runs
    exec_process.py the last steps of either: rights, seccomp filter, execve
    namespaces.py rootfs.py sources.py devices.py hooks.py stdio.py notify.py ...  the parts
    steps.py        steps with names, and their errors
service/        containers for a daemon
    client.py       the asyncio client: create, start, exec, attach, wait, signal, delete
    monitor.py      the process that outlives all others: relays output (relay.py, log.py), restarts the zygote
    zygote.py       the process that forks containers, and holds copies of their streams (sessions.py)
    launch.py       the zygote's containers: overlay roots and pipes
    warm_pool.py    containers made ahead
    run_directory.py    a container's directory: what was asked for, what runs, how it ended
wire.py         messages with file descriptors over unix sockets
log.py          log files
archive.py      files in and out, by a process with the rights of the container alone (archive_worker.py starts it)
checkpoint.py   checkpoints with criu
"""
