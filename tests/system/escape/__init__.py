"""The escape suite: attacks of a hostile tenant, who is root in a container, on the host and on neighbours.

Each test plays one known technique, which its docstring names and explains. An attack that fails proves nothing until
the same attack has been seen to succeed: so each has a *positive control*, which does the same to an unguarded process,
file or namespace of the test's own.

    attacks/        the attacks: Python that runs inside of a container, and for the control outside of one
    conftest.py     the cells: containers with a Python in which attacks run
    test_….py       one kind of attack a file
"""
