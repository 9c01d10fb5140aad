"""Virtual machines: hypervisors behind one protocol, and what a guest made from an OCI image consists of.

installation.py  what all machines of a host share
guest/       the parts of a guest: its kernel, modules, and the initramfs with the agent (`insula.agent`)
protocol.py  frames between a machine and its host
"""
