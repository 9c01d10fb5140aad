"""`AuditLog`: a thread that seals entries and writes them, so that a slow disk doesn't block requests.

`record` never blocks. A line is in the file within milliseconds, and on the disk (fdatasync(2)) within a second;
whoever needs to know is called back. After each sync the key of the earlier lines is erased from the key's file.

Lines that can't be written stay in memory and are tried again. From `FULL` of them on the log is *full*: changes are
refused by those who record them, because they could not be recorded. Beyond `_MOST_WAITING` lines they are counted, and
the count becomes a line. After a write that stopped in the middle of a line, a newline is written and the line again;
the next line's `prev` covers the remains.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from insula.audit import files, witness
from insula.audit.chain import OVERHEAD, Chain, ChainHead, begin, hash_of
from insula.audit.files import OpenFile
from insula.audit.floods import Floods
from insula.audit.keys import KeyFile, VerificationKey
from insula.audit.reader import timestamp
from insula.audit.recovery import about, recover, unfinished

FULL = 1000
"""Lines in memory, while the file can't be written, from which on the log is full."""
UNKNOWN = "unknown: insulad ended"
"""The error of a request whose result nobody knows."""
_MOST_WAITING = 10_000  # lines in memory while the file can't be written
_PAUSE = 1.0  # seconds until a failed write is tried again
_SYNC = 1.0  # seconds until a written line is on the disk
_MOST_UNSYNCED = 256  # callers that wait for the disk; more are not kept waiting
_MOST_OPEN = 200  # begun requests that the first line of a file names
_CUT = 512  # bytes that a file keeps free for the record of a removed file

_COUNT = {"verb": "failed attempts", "tenant": None, "name": None}

Callback = Callable[[], None]


class _Line(NamedTuple):
    """An entry and its JSON. `written` and `synced` are called in the writer's thread: in the file, on the disk."""

    entry: dict[str, Any]
    data: bytes
    written: Callback | None = None
    synced: Callback | None = None


class _NewKey(NamedTuple):
    told: Callable[[VerificationKey | OSError], None]
    entry: dict[str, Any]


class AuditLog:
    """The writer of one audit log. `size` is in bytes, 0 for no rotation; `group` may read the file besides root.

    `told` is called in the writer's thread with an error if lines can't be written, and with None when they can again.
    `key` is the file of the key, `stored` the head that the store has, `intents` are the entries of requests whose end
    the last insulad may not have recorded, `seen_by` is the file of a witness. In the writer's thread, too, `headed` is
    called with a head a minute, and `recovered` when the intents are closed, on the disk.
    """

    def __init__(
        self,
        path: Path,
        size: int = 0,
        files: int = 9,
        group: int | None = None,
        told: Callable[[str | None], None] = lambda _: None,
        *,
        key: Path | None = None,
        stored: ChainHead | None = None,
        intents: Sequence[dict[str, Any]] = (),
        seen_by: Path | None = None,
        headed: Callable[[ChainHead], None] = lambda _: None,
        recovered: Callback = lambda: None,
    ) -> None:
        self.path = path
        self.size = size
        self.files = files
        self.group = group
        self.watchers: set[Callable[[dict[str, Any]], None]] = set()
        self.floods = Floods()
        self.head = stored or ChainHead(0, "")
        """The last line that is on the disk."""
        self._told = told
        self._headed = headed
        self._recovered = recovered
        self._keys = KeyFile(key)
        self._intents = intents
        self._witness = seen_by
        self._queue: queue.SimpleQueue[_Line | _NewKey | threading.Event | None] = queue.SimpleQueue()
        self._waiting: list[_Line] = []
        self._lost = 0
        self._open: dict[str, dict[str, Any]] = {}  # begun requests, by ID
        self._troubles: dict[str, str] = {}
        self._said: str | None = None
        self._cut: int | None = None  # the last line of what was removed without a record
        self._fd: int | None = None
        self._file: OpenFile | None = None  # of `_fd`
        self._chain: Chain | None = None  # until it is recovered
        self._last: bytes | None = b""  # the bytes since the start of the last line, except `_remains`
        self._remains = b""  # of a write after the last line
        self._unsynced: list[Callback] = []
        self._sync_at: float | None = None
        self._witnessed = ChainHead(0, "")
        self._witness_at = time.monotonic() + witness.EVERY
        self._thread = threading.Thread(target=self._run, name="audit log", daemon=True)
        self._thread.start()

    @property
    def full(self) -> bool:
        """Whether so many lines wait to be written that changes are to be refused."""
        if self._queue.qsize() >= _MOST_WAITING:  # the thread hangs in a write
            return True
        return "write" in self._troubles and len(self._waiting) >= FULL

    @property
    def trouble(self) -> str | None:
        """Why lines can't be written, if they can't."""
        return self._said

    def record(self, entry: dict[str, Any], written: Callback | None = None, synced: Callback | None = None) -> None:
        """Queue `entry` to be written as one line of ASCII. Each of `watchers` is called with it. `written` and
        `synced` are called in the writer's thread when the line is in the file, and on the disk."""
        for watcher in tuple(self.watchers):
            watcher(entry)
        if self._queue.qsize() >= _MOST_WAITING:
            self._lost += 1
        else:
            self._queue.put(_line(entry, written, synced))

    def record_failure(self, entry: dict[str, Any], source: str, *, proved: bool) -> None:
        """Record a failed attempt, or count it if the source has too many."""
        counting = self.floods.due() is not None
        if self.floods.admit(source, str(entry.get("status")), time.monotonic(), proved=proved):
            self.record(entry)
        elif not counting:
            self._queue.put(_Line({}, b""))  # so that the thread looks at the end of the window

    def new_key(self, entry: dict[str, Any], told: Callable[[VerificationKey | OSError], None]) -> None:
        """Begin with a new key after a record with the members of `entry`. `told` is called in the writer's thread with
        the key to verify the lines after that; it is kept nowhere."""
        self._queue.put(_NewKey(told, entry))

    def flush(self) -> None:
        """Wait until all recorded entries are on the disk, or their write has failed."""
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
            ended, events, requests = self._take()
            self._try(at_end=ended)
            for request in requests:
                self._change_key(request)
            if events:
                self._sync()
            for event in events:
                event.set()
        if self._waiting:
            why, self._troubles = self._said, {}
            self._tell("lost", f"{len(self._waiting)} lines are lost: {why}")
        if self._fd is not None:
            os.close(self._fd)

    def _take(self) -> tuple[bool, list[threading.Event], list[_NewKey]]:
        """Wait for lines, and take all of them; returns (whether it is the end, the callers that wait in `flush`,
        those that want a new key)."""
        events: list[threading.Event] = []
        requests: list[_NewKey] = []
        with contextlib.suppress(queue.Empty):
            item = self._queue.get(timeout=self._patience())
            while item is not None:
                if isinstance(item, threading.Event):
                    events.append(item)
                elif isinstance(item, _NewKey):
                    requests.append(item)
                elif not item.data:
                    pass
                elif len(self._waiting) < _MOST_WAITING:
                    self._waiting.append(item)
                else:
                    self._lost += 1
                item = self._queue.get_nowait()
            return True, events, requests
        return False, events, requests

    def _patience(self) -> float | None:
        """Seconds until something is to be done without a new line; None if nothing is."""
        if self._chain is None:
            return 0.0 if self._said is None else _PAUSE
        if self._waiting or self._troubles.get("sync"):
            return _PAUSE
        times = [self._sync_at, self.floods.due()]
        if self.head != self._witnessed:
            times.append(self._witness_at)
        due = min((each for each in times if each is not None), default=None)
        return None if due is None else max(0.0, due - time.monotonic())

    def _try(self, *, at_end: bool) -> None:
        now = time.monotonic()
        try:
            self._recover()
            for counted in self.floods.take(now, end=at_end):
                self._waiting.append(_line({"time": timestamp(time.time()), **_COUNT, **counted}))
            if self._waiting:
                self._write()
            self._tell("write", None)
        except OSError as error:
            self._tell("write", f"{self.path} can't be written: {error.strerror or error}")
        due = self._sync_at is not None and (now >= self._sync_at or len(self._unsynced) >= _MOST_UNSYNCED)
        if due or at_end:
            self._sync()
        if self.head != self._witnessed and (now >= self._witness_at or at_end):
            self._witness_head()

    def _tell(self, about_what: str, trouble: str | None) -> None:
        """Note a trouble, or its end, and say so if what there is to say has changed."""
        self._troubles.pop(about_what, None)
        if trouble:
            self._troubles[about_what] = trouble
        said = "; ".join(self._troubles.values()) or None
        if said != self._said:
            self._said = said
            self._told(said)

    def _recover(self) -> None:
        """Find out where the chain goes on, and close what the last insulad has left open."""
        if self._chain is not None:
            return
        found = recover(self.path, self.files, self._keys, self.head if self.head.seq else None)
        left = unfinished(self.path, [each["id"] for each in self._intents])
        if found.foreign:
            files.rotate(self.path, max(1, self.files))
        self._chain, self._last, self._remains = found.chain, found.last, found.remains
        self._witnessed = self.head = found.chain.head
        now = timestamp(time.time())
        closing = [
            {"time": now, **each, "phase": "ended", "status": None, "error": UNKNOWN} for each in left.open.values()
        ]
        closing += [
            {**each, "status": None, "error": UNKNOWN} for each in self._intents if each["id"] not in left.found
        ]
        self._open.update(left.open)
        records = [{"time": now, **record} for record in found.records]
        self._waiting[:0] = [_line(entry) for entry in (*records, *closing)]
        if self._waiting and closing:
            last = len(records) + len(closing) - 1
            self._waiting[last] = self._waiting[last]._replace(synced=self._recovered)
        else:
            self._recovered()
        for record in found.records:
            if record["chain"] == "gap":
                missing = f"lines {record['after'] + 1} to {record['through']} are missing from {self.path}"
                self._tell("gap", f"{missing}: somebody has removed them, or the disk has lost them")

    # -- writing -------------------------------------------------------------------------------------------------

    def _write(self) -> None:
        """Write the waiting lines. After an OSError those that are not in the file keep waiting."""
        while self._waiting:
            room = self._room(self._waiting[0])
            count, length = 1, len(self._waiting[0].data) + OVERHEAD
            while count < len(self._waiting):
                length += len(self._waiting[count].data) + OVERHEAD
                if self.size and length > room:
                    break
                count += 1
            self._append(self._waiting, count)
            if self._lost and not self._waiting:
                lost, self._lost = self._lost, 0
                self._waiting.append(_line({"time": timestamp(time.time()), "lost": lost}))

    def _append(self, lines: list[_Line], count: int) -> None:
        """Seal and write the first `count` of `lines`; those that were written completely are removed from the list."""
        assert self._chain is not None and self._fd is not None
        newline = b"\n" if self._remains and not self._remains.endswith(b"\n") else b""
        chain = self._chain
        if self._remains and self._last is not None:
            chain = chain._replace(prev=hash_of(self._last + self._remains + newline))
        sealed, ends, data = [], [], bytearray(newline)
        for line in lines[:count]:
            raw, chain = chain.seal(line.data)
            data += raw
            sealed.append((raw, chain))
            ends.append(len(data))
        written = 0
        try:
            while written < len(data):
                written += os.write(self._fd, memoryview(data)[written:])
        finally:
            whole = sum(1 for end in ends if end <= written)
            if whole:
                self._last, self._chain = sealed[whole - 1]
                self._remains = bytes(data[ends[whole - 1] : written])
            else:
                self._remains += bytes(data[:written])
            done = lines[:whole]
            del lines[:whole]
            for line in done:
                self._is_written(line)

    def _is_written(self, line: _Line) -> None:
        entry = line.entry
        if entry.get("phase") == "begun":
            self._open[entry["id"]] = about(entry)
        elif entry.get("phase") == "ended":
            self._open.pop(entry["id"], None)
        if line.written:
            line.written()
        if line.synced:
            self._unsynced.append(line.synced)
        if self._sync_at is None:
            self._sync_at = time.monotonic() + _SYNC

    def _room(self, line: _Line) -> int:
        """Open the file, rotated if the line exceeds its size; returns the remaining bytes."""
        used, fresh = self._open_file()
        if self.size and not fresh and used + len(line.data) + OVERHEAD + _CUT > self.size:
            try:
                self._rotate()
            except OSError as error:  # a file that is too large is better than a lost line
                self._tell("rotate", f"{self.path} can't be rotated: {error.strerror or error}")
                return self.size - used - _CUT
            self._tell("rotate", None)
            return self._room(line)
        return self.size - used - _CUT

    def _open_file(self) -> tuple[int, bool]:
        """Open the file unless it is open; returns its size, and whether it has nothing but its first line. Then it
        isn't rotated, however long the next line is."""
        used = None if self._file is None else self._file.size(self.path)
        if self._fd is not None and used is None:
            self._sync()
            os.close(self._fd)
            self._fd = None
        if self._fd is None:
            self._fd = files.open_for_writing(self.path, self.group)
            found = os.fstat(self._fd)
            used, self._file = found.st_size, OpenFile(found.st_dev, found.st_ino)
        if used:
            return used, False
        cut = {} if self._cut is None else {"cut": self._cut}
        self._append_record({"chain": "file", **cut, "open": list(self._open.values())[:_MOST_OPEN]})
        self._cut = None
        return os.fstat(self._fd).st_size, True

    def _append_record(self, record: dict[str, Any]) -> None:
        self._append([_line({"time": timestamp(time.time()), **record})], 1)

    def _rotate(self) -> None:
        """Rename the file. If that removes the oldest one, this one's last line says up to which line."""
        assert self._chain is not None and self._fd is not None
        if self.files and files.numbered(self.path, self.files).exists():
            first = files.first_seq(files.numbered(self.path, self.files - 1))  # of what becomes the oldest
            if first is not None:
                self._append_record({"chain": "cut", "through": first - 1})
        elif not self.files:
            self._cut = self._chain.head.seq
        self._sync()
        files.rotate(self.path, self.files)
        os.close(self._fd)
        self._fd = None
        self._witness_head()

    # -- the disk, the key, the witness --------------------------------------------------------------------------

    def _sync(self) -> None:
        """Write the file's data to the disk, then the key of the next line over that of the earlier ones."""
        if self._sync_at is None or self._fd is None or self._chain is None:
            return
        try:
            os.fdatasync(self._fd)
            self._keys.save(self._chain)
        except OSError as error:
            self._tell("sync", f"{self.path} can't be written to the disk: {error.strerror or error}")
            self._sync_at = time.monotonic() + _PAUSE
            return
        self._tell("sync", None)
        self._sync_at, self.head = None, self._chain.head
        done, self._unsynced = self._unsynced, []
        for callback in done:
            callback()

    def _witness_head(self) -> None:
        """Give the head to the witness, and to whoever is to be told of it."""
        self._witness_at = time.monotonic() + witness.EVERY
        if self.head == self._witnessed:
            return
        self._witnessed = self.head
        self._headed(self.head)
        if self._witness is None:
            return
        try:
            witness.append(self._witness, self.head, timestamp(time.time()))
            self._tell("witness", None)
        except OSError as error:
            self._tell("witness", f"the witness {self._witness} can't be written: {error.strerror or error}")

    def _change_key(self, request: _NewKey) -> None:
        try:
            if self._chain is None or self._waiting:
                raise OSError(0, self._said or "the log can't be written")
            self._open_file()
            fresh = VerificationKey(self._chain.head.seq + 2, begin().key)
            self._append_record({"chain": "key", "fingerprint": fresh.fingerprint, **request.entry})
            assert self._chain is not None
            self._chain = self._chain._replace(key=fresh.key)
            self._sync()
        except OSError as error:
            request.told(error)
        else:
            request.told(fresh)


_encoder = json.JSONEncoder(separators=(",", ":"))


def _line(entry: dict[str, Any], written: Callback | None = None, synced: Callback | None = None) -> _Line:
    return _Line(entry, _encoder.encode(entry).encode(), written, synced)
