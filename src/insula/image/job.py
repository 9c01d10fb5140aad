"""Blocking work that another thread can cancel: an import, a pull, a push, a save.

Cancelling a job kills its child processes, and its loops check for it. The work then raises `Cancelled`, and undoes
itself as after any other error.
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
    """The work was cancelled, because its client has gone."""

    def __init__(self) -> None:
        super().__init__("the work was cancelled", "start it again")


class Job:
    """A job. `cancel` may be called from any thread; it is cancelled automatically after its time limit.

    `groups` are files to which processes that talk to others write ``0``, to join the control groups of whoever wants
    the work (cgroups(7)). `space` is the most bytes that an import may have; None is the image store's own limit.
    """

    def __init__(self, groups: Sequence[str] = (), space: int | None = None) -> None:
        self.groups, self.space = groups, space
        self._mutex = threading.Lock()  # for the two below
        self._processes: set[subprocess.Popen[Any]] = set()
        self._cancelled = False
        self._seconds = 0.0
        self._deadline: float | None = None

    def cancel(self) -> None:
        """Cancel the work, and kill its processes. It has ended when the method that was given the job returns."""
        with self._mutex:
            self._cancelled = True
            for process in self._processes:
                process.kill()

    def limit(self, seconds: float | None) -> None:
        """Set the time limit in seconds from now; None for no limit."""
        self._seconds = seconds or 0.0
        self._deadline = None if seconds is None else time.monotonic() + seconds

    @property
    def left(self) -> float | None:
        """Return the seconds until the time limit; None without one."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def check(self) -> None:
        """Raise Cancelled if the job was cancelled, and Failed if its time is over."""
        if self._cancelled:
            raise Cancelled
        if self.left == 0:
            hint = "the disk may be slow, or the image damaged"
            raise Failed(f"the work takes more than {self._seconds:.0f} seconds", hint)

    @contextmanager
    def killing(self, process: subprocess.Popen[Any]) -> Iterator[None]:
        """Kill `process` when the job is cancelled, and when the block that waits for it ends early."""
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
        """Return the standard output and error of `process`, each at most `MAX_OUTPUT` bytes; `data` is its input.

        Waits until all processes with these pipes have ended, also its children. Cancelled, or Failed when the time is
        over or the output is longer.
        """
        pipes = {pipe: bytearray() for pipe in (process.stdout, process.stderr) if pipe is not None}
        with self.killing(process), selectors.DefaultSelector() as selector:
            for pipe in pipes:
                selector.register(pipe, selectors.EVENT_READ)
            if process.stdin is not None:
                with suppress(BrokenPipeError):  # then it has ended; the reason is reported below
                    process.stdin.write(data)
                    process.stdin.close()
            while selector.get_map():
                for key, _ in selector.select(self.left):
                    piece = os.read(key.fd, 1 << 16)
                    if not piece:
                        selector.unregister(key.fileobj)
                    pipes[key.fileobj] += piece  # type: ignore[index]
                if self.left == 0 or max(map(len, pipes.values())) > MAX_OUTPUT:
                    process.kill()  # other processes may still have the pipes
                    break
            for pipe in pipes:
                while os.read(pipe.fileno(), 1 << 16):
                    pass
                pipe.close()
            process.wait()
        self.check()
        if max(map(len, pipes.values())) > MAX_OUTPUT:
            raise Failed("the output of a helper process is too long", "see the log of insulad")
        out, err = (bytes(pipes.get(pipe, b"")) if pipe else b"" for pipe in (process.stdout, process.stderr))
        return out, err

    def run(self, command: Sequence[str]) -> tuple[int, bytes]:
        """Run a command without input; returns its exit status and its standard error."""
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        _, err = self.communicate(process)
        return process.returncode, err
