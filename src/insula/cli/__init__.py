"""The command line: a table of verbs over the Python SDK. One file a verb or small family, in `verbs/`.

A hot verb starts in milliseconds, so each file imports only what its verb needs, and only the standard library.
"""
