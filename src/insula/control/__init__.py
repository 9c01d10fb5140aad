"""The control plane: the only place where containers, images, networks and the store meet.

plane.py          `ControlPlane`: all parts put together, and everything that the API offers
context.py        what all parts work with: settings, store, drivers, fabric, images
keys.py           where objects live in the store
allocation/       names and numbers that only one owner may have; what tenants may use
tenants.py, images.py      the verbs of tenants and images
networks/         networks: verbs, the controller that makes them so on this host, and the ports of instances
instances/        instances: verbs, the controller that makes them so on this host, and all that it needs
tasks.py          work beside requests, which ends with the daemon
events.py, verify.py, doctor.py, host.py, problems.py      looking at it all
"""
