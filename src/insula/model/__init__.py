"""The vocabulary of Insula as frozen structs: no I/O, and no imports from other rooms.

Import the modules, not this package: `insula.model.stream` and `insula.model.errors` load in under a
millisecond and the command line depends on that.
"""
