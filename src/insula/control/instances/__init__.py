"""Instances: what tenants run.

verbs.py          what a user may do to one; admission.py: from what is asked for to a committed instance
specs.py          what may be asked for
managed.py        one instance in memory; supervisor.py: launches, exits, restarts; restart_policy.py: when
limits.py         other limits while it runs, and pause; renaming.py, sharing.py
health.py         its health checks; memory.py: when it runs out; recorder.py: events of both
attachment.py     its streams for somebody attached; files.py: files in and out
explain.py, stats.py      looking at it
drivers/          one for each kind of instance: base.py is the protocol
"""
