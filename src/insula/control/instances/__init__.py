"""Instances: what tenants run.

verbs.py          what a user may do to one: commit what is wanted, and wait until it is so
io.py             what is done with one that runs: streams, more processes, files (attachment.py, files.py)
checks.py, specs.py        what may be asked for; admission.py: from that to a committed instance; renaming.py
controller.py     makes what is wanted true, whatever woke it: looks, decides, acts
decide.py         which action is next: pure; restart_policy.py: when one that ended is started again
lifecycle.py      the actions; statuses.py: what was measured, and how it gets into the store
managed.py        one instance in memory; loading.py: from the store, when the daemon starts
remote.py, damaged.py, sharing.py      those of other hosts; with records that can't be read; in one PID namespace
health.py         its health checks; memory.py: when it runs out; recorder.py: events of both
explain.py, stats.py      looking at it
drivers/          one for each kind of instance: base.py is the protocol
"""
