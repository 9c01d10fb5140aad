"""The Python SDK: `Client` and, from `insula.model.errors`, what its methods raise."""

from insula.client.client import Client

__all__ = ["Client"]
