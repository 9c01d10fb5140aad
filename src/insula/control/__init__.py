"""The control plane: the only place where containers, images, networks and the store meet.

A *verb* is one operation of the API: it checks a request and commits the desired state to the store. A *controller*
makes the state of this host match the desired state; the verb waits for it.

plane.py          `ControlPlane`: all parts put together; everything that the API offers
context.py        the parts that all modules share: settings, store, drivers, fabric, images
keys.py           the keys of objects in the store
allocation/       reservations of names and numbers; quotas of tenants
tenants.py, images.py      the verbs of tenants and images
networks/         networks: verbs, controller, ports of instances
instances/        instances: verbs, controller, drivers
tasks.py          background tasks, which end with the daemon
events.py, verify.py, doctor.py, host.py, problems.py      events, verification, and the state of this host
"""
