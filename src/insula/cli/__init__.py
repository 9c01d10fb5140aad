"""The command line: a table of verbs over the Python SDK. One file a verb or small family, in `verbs/`.

A hot verb starts in milliseconds, so each file imports only what its verb needs, and only the standard library.
`TYPE_CHECKING = False` is what mypy takes for typing.TYPE_CHECKING; importing typing would cost every start 3 ms.
"""
