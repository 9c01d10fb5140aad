"""Machines of disk images of any operating system: what they are given beside their disk.

firmware.py    UEFI firmware of this host, by its descriptors
cloud_init.py  the seed disk: what cloud-init is told at the first start
fat.py         a FAT16 file system, for that disk
"""
