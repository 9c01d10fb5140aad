"""Errors of the kernel as those of a fabric: recorded by part of an intent, or with the name of a port."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from insula.model.errors import Failed, InsulaError
from insula.model.objects import Network, Port


@contextlib.contextmanager
def recording(errors: dict[str, InsulaError], what: str) -> Iterator[None]:
    """Catch an error in the block, and add it to `errors` under `what` unless there is one."""
    try:
        yield
    except InsulaError as error:
        errors.setdefault(what, error)
    except OSError as error:
        errors.setdefault(what, Failed(f"{what}: {error.strerror or error}"))


@contextlib.contextmanager
def reported(network: Network, port: Port) -> Iterator[None]:
    """Convert an OSError in the block to Failed, with the port's name."""
    try:
        yield
    except OSError as error:
        raise Failed(f"port of {port.instance} on network {network.name}: {error.strerror or error}") from error
