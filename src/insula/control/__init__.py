"""Where the rooms meet: tenants, quotas, addresses, and reconcilers that make what is match what is wanted.

plane.py          the face of the room: everything that the API offers
context.py        the parts that the rest works with: settings, store, runtime, fabric, images
keys.py           where objects live in the store
claims.py         names and numbers that only one may have
quotas.py         what tenants may use; and the guard that keeps changes of one tenant apart
specs.py          what a user may ask for
tenants.py, networks.py, images.py, instances.py      the verbs, one file a kind
admission.py      from what a user asks for to a committed instance
limits.py         other limits while it runs; pause
launch.py         an instance's way from a directory to a running process, and back
supervisor.py     what every instance does now: exits, restarts, waiters; policy.py: when to restart
health.py         its health checks; memory.py: when it runs out; recorder.py: events of both
terminals.py      as many as all instances may have
sharing.py        instances in the PID namespace of another
attachment.py     input and output of a running process, for somebody attached
reconcile.py      after any crash
archives.py       files in and out of instances
stats.py          what instances use, while somebody looks
events.py, processes.py, explain.py, verify.py, doctor.py, host.py      looking at it all
"""
