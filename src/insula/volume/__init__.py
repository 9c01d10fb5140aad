"""Disk quotas: limits on what a tree of files takes of a file system.

quota.py    the protocol `DiskQuota`, and its driver where nothing can be enforced
drivers.py  the registry of drivers, and the choice of one for a directory
project.py  project quotas of ext4 and xfs: the kernel enforces the limits
pool.py     a file system in a file of its own, for hosts whose file system has no project quotas
measure.py  the size of a tree where nothing counts it

The package knows no tenants and no instances: its trees are directories, and their limits belong to project IDs.
"""
