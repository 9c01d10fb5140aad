"""The Python SDK: `Client`. Its methods raise the errors of `insula.model.errors`."""

from insula.client.client import Client

__all__ = ["Client"]
