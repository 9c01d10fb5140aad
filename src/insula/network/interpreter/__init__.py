"""The algebra of packet classes: what a data plane's rules do with all packets at once.

Header space is cut into *atoms*, ranges that no rule divides (AP Verifier, Yang and Lam, ICNP 2013; Delta-net, Horn et
al., NSDI 2017). A packet class is a combination of atoms, and a set of classes is the bits of one Python int. Rules are
set operations on such ints.

values.py    `Symbolic`: the value of a header field in every class
space.py     `Space`: the classes of one run, sources by destinations by services
program.py   rules as conditions and effects, whatever installed them
machine.py   `Machine`: runs rules on sets of classes

It errs on one side only: a packet that the rules may let through is in the result. A reader of a fabric (such as
`network.linux.interpreter`) makes programs of what is installed there. Nothing here knows how rules are made.
"""
