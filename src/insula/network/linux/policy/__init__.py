"""The compiler of policies: from a tenant's intent to elements of the sets and maps of its packet filter.

classes.py      addresses with the same network, labels and ranges are one class, which has a number
port_sets.py    sets of protocols and ports, each with a number
compiler.py     which class may reach which, by which set of ports
operator.py     the operator's rules, in order
chains.py       the static rules that look these elements up
elements.py     the kernel's form of the elements
state.py        what is installed, and the changes of it

A policy, an instance or a label more is some elements more; the rules never change. Numbers are hashes of what they
stand for, so that they stay the same whatever else changes.
"""
