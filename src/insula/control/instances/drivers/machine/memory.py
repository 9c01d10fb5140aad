"""The memory of moments, as machines get it: sealed, so that those that go on from one moment share its pages, and none
can change what another one sees.

A file on a disk can't be sealed against those who may write it, and QEMU has to be able to open it for writing (7.2).
So it is read into a memfd, as templates are. That is kept for a while, since the copies of one machine are started
together; afterwards it is there as long as a machine uses it.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Final

from insula.kernel import copies
from insula.kernel.rollback import Rollback
from insula.machine.qemu import template

_KEPT: Final = 20.0  # seconds after its last use
_Key = tuple[int, int, int]


class MomentMemory:
    """Memories by the files that they are read from. Methods block, and may be called from any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._memories: dict[_Key, tuple[int, threading.Timer]] = {}
        self._reading: set[_Key] = set()

    def open(self, path: Path) -> int:
        """A descriptor of the memory in a file, for the caller to close. Who asks for the same one while it is read
        waits for it, and nobody else. OSError."""
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            status = os.fstat(file)
            key = status.st_dev, status.st_ino, status.st_mtime_ns
            with self._changed:
                while key in self._reading:
                    self._changed.wait()
                if found := self._memories.pop(key, None):
                    found[1].cancel()
                    return self._keep(key, found[0])
                self._reading.add(key)
            return self._read(key, file)
        finally:
            os.close(file)

    def close(self) -> None:
        """Forget all."""
        for key, (_, timer) in list(self._memories.items()):
            timer.cancel()
            self._forget(key)

    def _read(self, key: _Key, file: int) -> int:
        try:
            with Rollback() as undo:
                made = undo.hold(os.memfd_create("moment", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC))
                copies.copy(file, made)
                template.seal(made)
                with self._changed:
                    given = self._keep(key, made)
                undo.keep()
            return given
        finally:
            with self._changed:
                self._reading.discard(key)
                self._changed.notify_all()

    def _keep(self, key: _Key, memory: int) -> int:
        """Keep one for a while, and return a copy of its descriptor."""
        timer = threading.Timer(_KEPT, self._forget, [key])
        timer.daemon = True
        timer.start()
        self._memories[key] = memory, timer
        return os.dup(memory)

    def _forget(self, key: _Key) -> None:
        with self._changed:
            if found := self._memories.pop(key, None):
                os.close(found[0])
