"""The objects of Insula as frozen structs, with errors and units. No I/O, and no imports from other packages.

Import the modules, not this package: `insula.model.stream` and `insula.model.errors` load in under a millisecond, and
the command line depends on that.
"""
