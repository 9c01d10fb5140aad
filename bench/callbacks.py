"""Runs insulad with a meter on its event loop: the callback that used most CPU time.

    python -I bench/callbacks.py FILE [ignored…]

FILE is shared memory as `RECORD` has it: nanoseconds of `time.thread_time_ns`, and the callback's name. Whoever reads
it may set it to zeros, to begin anew. asyncio's own `slow_callback_duration` is time on the clock, and so counts what
other processes of a busy machine take.
"""

from __future__ import annotations

import mmap
import os
import struct
import sys
import time
from asyncio.events import Handle
from typing import Any

RECORD = struct.Struct("Q120s")


def install(path: str) -> None:
    """Measure every callback of this process's event loops."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    shared = mmap.mmap(fd, RECORD.size)
    os.close(fd)
    run, processor = Handle._run, time.thread_time_ns

    def measured(handle: Handle) -> None:
        began = processor()
        run(handle)
        used = processor() - began
        if used > RECORD.unpack_from(shared)[0]:
            RECORD.pack_into(shared, 0, used, name(handle))

    setattr(Handle, "_run", measured)  # noqa: B010 - to the type checker a method is for ever


def name(handle: Any) -> bytes:
    """The name of the callback, or of the task that it resumes."""
    callback = handle._callback
    owner: Any = getattr(callback, "__self__", None)
    work = owner.get_coro() if hasattr(owner, "get_coro") else callback
    return str(getattr(work, "__qualname__", work)).encode()[:120]


if __name__ == "__main__":
    install(sys.argv[1])
    from insula.api.daemon import main

    sys.argv[1:] = []
    sys.exit(main())
