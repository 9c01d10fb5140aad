"""The command line, based on `insula.client`. `verbs/` has a file for each verb or small family of verbs.

Verbs start in milliseconds, so each file imports only what its verb needs, and only the standard library.
`TYPE_CHECKING = False` replaces typing.TYPE_CHECKING for mypy; importing typing would add 3 ms to every start.
"""
