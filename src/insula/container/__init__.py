"""The container runtime: OCI runtime-spec on Linux. It knows nothing of tenants, networks or the store.

runtime.py   the face of the room, for asyncio: create, start, exec, attach, wait, signal, delete
keeper.py    the process that outlives all others: relays output, restarts the spawner, reaps orphans
spawner.py   the process that forks containers
launch.py    what the spawner prepares outside of a new container
init.py      what a new process does from its birth in new namespaces until it becomes the user's program
join.py      how a process joins a container that runs
bundle.py    a container's directory: what was asked, what runs, how it ended
"""
