"""Where the rooms meet: tenants, quotas, addresses, and reconcilers that make what is match what is wanted.

cloud.py       the face of the room: everything that the API offers
engine.py      the parts that the rest works with: settings, store, runtime, fabric, images
keys.py        where objects live in the store; claims.py: names and numbers that only one may have
quotas.py      what tenants may use; specs.py: what a user may ask for; policy.py: when to restart
tenants.py, networks.py, images.py, instances.py      the verbs, one file a kind
launch.py      one instance's way from a directory to a running process, and back
supervisor.py  what every instance does now: exits, restarts, waiters; reconcile.py: after any crash
events.py, whois.py, explain.py, verify.py, doctor.py, host.py      looking at it
"""
