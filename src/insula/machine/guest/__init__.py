"""What a guest made from an OCI image starts with: a kernel of Debian, and an initramfs with the agent.

bzimage.py    the kernel inside of an installed kernel, which a hypervisor enters directly
modules.py    drivers, in the order in which they can be loaded
python.py     the files of the host's Python that the agent needs
cpio.py       the format of an initramfs
initramfs.py  all of it together
"""
