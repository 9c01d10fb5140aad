"""The library libvirt in the process of the tests, with all descriptors that it keeps open."""

from __future__ import annotations

import threading

from insula.machine.libvirt import library
from tests.support.wait import patiently


def load() -> None:
    """Load it, open a connection, and wait until its event loop has gone round once."""
    lib, ran = library.load(), threading.Event()
    lib.open("test:///default").close()
    timer = lib.virEventAddTimeout(0, lambda *_: ran.set(), None)
    assert ran.wait(patiently(10)), "libvirt's event loop runs"
    lib.virEventRemoveTimeout(timer)
