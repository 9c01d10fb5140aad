"""Attacks as plain functions: they return what they got, or raise OSError when the kernel refuses.

They import nothing but the standard library, since the same files are run inside of containers (see `run`).
"""
