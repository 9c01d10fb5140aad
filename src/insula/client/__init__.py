"""The client of the command line: `Client`. Its methods raise the errors of `insula.model.errors`.

Programs use `insula.sdk`, which is typed; this one uses only the standard library, because verbs start in milliseconds.
"""

from insula.client.client import Client

__all__ = ["Client"]
