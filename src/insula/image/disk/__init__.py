"""Disk images of any operating system: each is converted once to a sparse raw file, in a process without rights.

raw.py, qcow2.py  sources: what a disk has, by offset
iso.py            the same for a CD or DVD
convert.py        from a source to a sparse raw file, and its digest
worker.py         the child process that converts

A format is given, never probed: a guest may write anything into its disk, also the header of another format
(CVE-2024-4467). A disk image that names other files (backing files, external data files, extents) is refused.
"""
