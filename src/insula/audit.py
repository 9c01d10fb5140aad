"""The audit log: an append-only file of JSON objects, one a line, rotated by size.

A thread writes it, so that a slow disk doesn't block requests; `record` never blocks. Lines that can't be written stay
in memory, up to a limit, and are tried again. Lines beyond the limit are counted, and the count becomes a line. After a
write that stopped in the middle of a line, a newline is written and the line again: readers skip lines that are not
JSON.

Other programs may rename or remove the file at any time (logrotate(8) need not send a signal): the next write makes a
new one. Rotation renames `audit.log` to `audit.log.1`, and so on.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import stat
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

_OPEN = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NOCTTY | os.O_NONBLOCK
_MODE = 0o640
_MOST_WAITING = 10_000  # lines in memory while the file can't be written
_PAUSE = 1.0  # seconds until a failed write is tried again
_LONGEST_LINE = 64 << 10  # bytes of the longest line for a reader
_ATTEMPTS = 100  # of a reader to open the files in one order, while they are rotated


def timestamp(seconds: float) -> str:
    """Format a time as in RFC 3339, in UTC with microseconds, so that times sort as text."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


class AuditLog:
    """The writer of one audit log. `size` is in bytes, 0 for no rotation; `group` may read the file besides root.

    `told` is called in the writer's thread with an error if lines can't be written, and with None when they can again.
    """

    def __init__(
        self,
        path: Path,
        size: int = 0,
        files: int = 9,
        group: int | None = None,
        told: Callable[[str | None], None] = lambda _: None,
    ) -> None:
        self.path = path
        self.size = size
        self.files = files
        self.group = group
        self.watchers: set[Callable[[dict[str, Any]], None]] = set()
        self._told = told
        self._queue: queue.SimpleQueue[bytes | threading.Event | None] = queue.SimpleQueue()
        self._waiting: list[bytes] = []
        self._lost = 0
        self._trouble: str | None = None
        self._unrotated: str | None = None
        self._fd: int | None = None
        self._torn = False
        self._thread = threading.Thread(target=self._run, name="audit log", daemon=True)
        self._thread.start()

    def record(self, entry: dict[str, Any]) -> None:
        """Queue `entry` to be written as one line of ASCII. Each of `watchers` is called with it."""
        for watcher in tuple(self.watchers):
            watcher(entry)
        self._queue.put(json.dumps(entry, separators=(",", ":")).encode() + b"\n")

    def flush(self) -> None:
        """Wait until all recorded entries are written, or their write has failed."""
        done = threading.Event()
        self._queue.put(done)
        while not done.wait(_PAUSE) and self._thread.is_alive():
            pass

    def close(self) -> None:
        """Write the remaining lines, and end the thread. Lines that can't be written are lost, and `told` is called."""
        self._queue.put(None)
        self._thread.join()

    # -- the writer's thread -------------------------------------------------------------------------------------

    def _run(self) -> None:
        ended = False
        while not ended:
            ended, events = self._take()
            self._try()
            for event in events:
                event.set()
        if self._waiting:
            self._tell(f"{len(self._waiting)} lines are lost: {self._trouble}")
        if self._fd is not None:
            os.close(self._fd)

    def _take(self) -> tuple[bool, list[threading.Event]]:
        """Wait for lines, and take all of them; returns (whether it is the end, the callers that wait in `flush`)."""
        events: list[threading.Event] = []
        timeout = _PAUSE if self._waiting else None
        with contextlib.suppress(queue.Empty):
            item = self._queue.get(timeout=timeout)
            while item is not None:
                if isinstance(item, threading.Event):
                    events.append(item)
                elif len(self._waiting) < _MOST_WAITING:
                    self._waiting.append(item)
                else:
                    self._lost += 1
                item = self._queue.get_nowait()
            return True, events
        return False, events

    def _try(self) -> None:
        try:
            if self._waiting:
                self._write()
            self._tell(self._unrotated)
        except OSError as error:
            self._tell(f"{self.path} can't be written: {error.strerror or error}")

    def _tell(self, trouble: str | None) -> None:
        if trouble != self._trouble:
            self._trouble = trouble
            self._told(trouble)

    def _write(self) -> None:
        """Write the waiting lines. After an OSError those that are not in the file keep waiting."""
        while self._waiting:
            fd, room = self._open()
            count, length = 1, len(self._waiting[0])
            while count < len(self._waiting) and (not self.size or length + len(self._waiting[count]) <= room):
                length += len(self._waiting[count])
                count += 1
            self._append(fd, count)
            if self._lost and not self._waiting:
                lost, self._lost = self._lost, 0
                entry = {"time": timestamp(time.time()), "lost": lost}
                self._waiting.append(json.dumps(entry, separators=(",", ":")).encode() + b"\n")

    def _append(self, fd: int, count: int) -> None:
        """Write the first `count` lines; those that were written completely are removed from the queue."""
        head = b"\n" if self._torn else b""
        data = memoryview(head + b"".join(self._waiting[:count]))
        written = 0
        try:
            while written < len(data):
                written += os.write(fd, data[written:])
        finally:
            if written:
                whole = bytes(data[:written]).count(b"\n") - len(head)
                del self._waiting[: max(whole, 0)]
                self._torn = data[written - 1] != 0x0A

    def _open(self) -> tuple[int, int]:
        """Open the file, rotated if the next line exceeds its size; returns (descriptor, remaining bytes)."""
        if self._fd is not None and not self._is_ours(self._fd):
            os.close(self._fd)
            self._fd = None
        if self._fd is None:
            self._fd, self._torn = self._make(), False
            self._torn = self._ends_torn()
        used = os.fstat(self._fd).st_size
        if self.size and used and used + len(self._waiting[0]) > self.size:
            try:
                self._rotate()
            except OSError as error:  # a file that is too large is better than a lost line
                self._unrotated = f"{self.path} can't be rotated: {error.strerror or error}"
                return self._fd, 1 << 62
            self._unrotated = None
            return self._open()
        return self._fd, self.size - used

    def _is_ours(self, fd: int) -> bool:
        try:
            found, held = os.lstat(self.path), os.fstat(fd)
        except FileNotFoundError:
            return False
        return (found.st_dev, found.st_ino) == (held.st_dev, held.st_ino)

    def _make(self) -> int:
        self.path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
        try:
            fd = os.open(self.path, _OPEN | os.O_EXCL, _MODE)
            os.fchmod(fd, _MODE)
            if self.group is not None:
                os.fchown(fd, -1, self.group)
        except FileExistsError:
            fd = os.open(self.path, _OPEN)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise OSError(0, "it is not a regular file")
        return fd

    def _ends_torn(self) -> bool:
        """Whether the last line has no end, because its writer was killed."""
        with self.path.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(end - 1, 0))
            return file.read(1) not in (b"", b"\n")

    def _rotate(self) -> None:
        for number in range(self.files, 0, -1):
            with contextlib.suppress(FileNotFoundError):
                os.rename(_numbered(self.path, number - 1), _numbered(self.path, number))
        if not self.files:
            os.unlink(self.path)


def read(
    path: Path, files: int, *, since: float | None = None, uid: int | None = None, tenant: str | None = None
) -> Iterator[dict[str, Any]]:
    """Yield the entries of an audit log and its rotated files, oldest first, without lines that are not JSON."""
    begin = timestamp(since) if since is not None else ""
    with contextlib.ExitStack() as stack:
        for file in reversed(_open_all(path, files, stack)):
            while raw := file.readline(_LONGEST_LINE):
                try:
                    entry = json.loads(raw)
                except ValueError:
                    continue
                if (
                    isinstance(entry, dict)
                    and str(entry.get("time", "")) >= begin
                    and uid in (None, entry.get("uid"))
                    and tenant in (None, entry.get("tenant"))
                ):
                    yield entry


def _open_all(path: Path, files: int, stack: contextlib.ExitStack) -> list[BinaryIO]:
    """Open the audit log and its rotated files, newest first, so that a file that is renamed meanwhile is not missed.

    A file that is newer than the first would be out of order. That happens only if the first is renamed twice
    meanwhile; then all are opened again.
    """
    for _ in range(_ATTEMPTS):
        stack.close()
        opened: dict[int, BinaryIO] = {}  # by inode
        first = None
        for number in range(files + 1):
            with contextlib.suppress(FileNotFoundError):
                file = stack.enter_context(_numbered(path, number).open("rb"))
                inode = os.fstat(file.fileno()).st_ino
                first = first or (inode, number)
                opened.setdefault(inode, file)
        if first is None or _is_at(path, *first):
            break
    return list(opened.values())


def _is_at(path: Path, inode: int, number: int) -> bool:
    """Whether a file was renamed at most once since it was found as that number."""
    for each in (number, number + 1):
        with contextlib.suppress(FileNotFoundError):
            if _numbered(path, each).stat().st_ino == inode:
                return True
    return False


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}") if number else path
