"""The container runtime: OCI runtime-spec on Linux. It knows nothing of tenants, networks or the store.

runtime.py      the face of the room, for asyncio: create, start, exec, attach, wait, signal, delete; with
                attachment.py (the streams of a process), resources.py and failures.py
bundle.py       a container's directory: what was asked, what runs, how it ended
spec.py         the config.json of a launch, with users.py, seccomp_default.py and nesting.py
keeper.py       the process that outlives all others: reaps orphans, restarts the spawner, and by relay.py
                and log.py moves output to where it belongs
spawner.py      the process that forks containers; by sessions.py it holds on to their streams
pool.py         containers made ahead; handover.py tells one of them what it is to be
launch.py       what is prepared outside of a new container
init.py         what PID 1 does from its birth in new namespaces on
join.py         how a process joins a container that runs
departure.py    how either becomes the user's program; steps.py and stdio.py serve both
notify.py       how a filter that asks somebody (SCMP_ACT_NOTIFY) reaches who answers
archive.py      files in and out, by a process with the rights of the container alone (archive_worker.py starts it)
"""
