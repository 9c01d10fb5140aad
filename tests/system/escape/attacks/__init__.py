"""Attacks as plain functions. They return what they could read, or raise OSError if the kernel refuses.

They import nothing but the standard library, since the same files are run inside of containers (see `run`).
"""
