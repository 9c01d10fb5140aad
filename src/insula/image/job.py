"""A piece of blocking work that another thread can end: an import, a pull, a push, a save.

What takes long is done by child processes, which are killed, and in loops, which ask. A cancelled job raises
`Cancelled` wherever it is, and the work undoes itself on its way out as after any other error.
"""

from __future__ import annotations

import os
import selectors
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from insula.model.errors import Failed

MAX_OUTPUT = 64 << 20


class Cancelled(Failed):
    """The work was ended because nobody waits for it any more."""

    def __init__(self) -> None:
        super().__init__("the work was cancelled", "start it again")


class Job:
    """Cancelled by `cancel` from any thread, and by itself when `limit` seconds are over."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()  # of the two below
        self._processes: set[subprocess.Popen[Any]] = set()
        self._cancelled = False
        self._seconds = 0.0
        self._deadline: float | None = None

    def cancel(self) -> None:
        """End the work: kills its processes. It is over when the method that was given the job returns."""
        with self._mutex:
            self._cancelled = True
            for process in self._processes:
                process.kill()

    def limit(self, seconds: float | None) -> None:
        """From now on the work may take `seconds`; None: as long as it takes."""
        self._seconds = seconds or 0.0
        self._deadline = None if seconds is None else time.monotonic() + seconds

    @property
    def left(self) -> float | None:
        """Seconds until the limit; None without one."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def check(self) -> None:
        """Raises Cancelled, or Failed when the time is over."""
        if self._cancelled:
            raise Cancelled
        if self.left == 0:
            raise Failed(f"the work takes more than {self._seconds:.0f} seconds", "is the disk slow, or the image odd?")

    @contextmanager
    def killing(self, process: subprocess.Popen[Any]) -> Iterator[None]:
        """The block waits for `process`; it is killed when the job is cancelled, and when the block ends early."""
        with self._mutex:
            self._processes.add(process)
            if self._cancelled:
                process.kill()
        try:
            yield
        finally:
            with self._mutex:
                self._processes.discard(process)
            if process.returncode is None:
                process.kill()
                process.wait()

    def communicate(self, process: subprocess.Popen[bytes], data: bytes = b"") -> tuple[bytes, bytes]:
        """The standard output and error of `process`, each at most `MAX_OUTPUT` bytes; `data` is its input, if any.

        Its end is that of all processes that have the pipes: of its children, too. Raises Cancelled, or Failed when
        the time is over or the output is longer.
        """
        pipes = {pipe: bytearray() for pipe in (process.stdout, process.stderr) if pipe is not None}
        with self.killing(process), selectors.DefaultSelector() as selector:
            for pipe in pipes:
                selector.register(pipe, selectors.EVENT_READ)
            if process.stdin is not None:
                with suppress(BrokenPipeError):  # then it has ended, and why is told below
                    process.stdin.write(data)
                    process.stdin.close()
            while selector.get_map():
                for key, _ in selector.select(self.left):
                    piece = os.read(key.fd, 1 << 16)
                    if not piece:
                        selector.unregister(key.fileobj)
                    pipes[key.fileobj] += piece  # type: ignore[index]
                if self.left == 0 or max(map(len, pipes.values())) > MAX_OUTPUT:
                    process.kill()  # the pipes' ends are still waited for
                    break
            for pipe in pipes:
                while os.read(pipe.fileno(), 1 << 16):
                    pass
                pipe.close()
            process.wait()
        self.check()
        if max(map(len, pipes.values())) > MAX_OUTPUT:
            raise Failed("a helper process says too much", "see the log of insulad")
        out, err = (bytes(pipes.get(pipe, b"")) if pipe else b"" for pipe in (process.stdout, process.stderr))
        return out, err

    def run(self, command: Sequence[str]) -> tuple[int, bytes]:
        """Runs a command without input: its exit status and what it said on the standard error."""
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        _, err = self.communicate(process)
        return process.returncode, err
