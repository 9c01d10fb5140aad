"""Instances: the containers (and later virtual machines) that tenants run.

verbs.py          the verbs: each commits the desired state and waits until it is observed
specs.py          checks of a spec; checks.py: checks of an instance's state; admission.py: from spec to instance
renaming.py       the verb `rename`
io.py             streams, exec and files of running instances (attach_session.py, files.py)
controller.py     the controller: observes, decides, acts
decide.py         the next action, a pure function; restart_policy.py: when an ended instance is started again
lifecycle.py      the actions; statuses.py: observed statuses, in memory and in the store
managed.py        an instance in memory; loading.py: loads instances from the store when the daemon starts
remote.py, damaged.py, sharing.py      instances of other hosts, with damaged records, in a shared PID namespace
health.py         health checks; memory.py: out-of-memory events; recorder.py: writes events
explain.py, stats.py      `insula explain` and `insula stats`
drivers/          one driver for each kind of instance; base.py has the protocol
"""
