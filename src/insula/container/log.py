"""The log of a container: its output in files, which the monitor writes and any process may read.

A log is a directory with the files `log`, `log.1`, `log.2` …, newest first. Each is a sequence of records, the frames
of `insula.model.stream` with eight bytes of time (nanoseconds since the epoch, big-endian) at the head of the payload:

    kind 1 | length 4 | time 8 | data (length - 8)

Nothing marks where a record begins. So a file must consist of whole records, up to a *tail* that may be incomplete: the
writer may have been killed in the middle of a record, or the disk may have been full. A reader stops before an
incomplete tail, since the rest may still come. A writer that opens the log again cuts it off.

When `log` is full it is renamed to `log.1`, `log.1` to `log.2`, and so on; the last one is removed. A reader that
follows finds its open file among them by its inode, and so the next file, whatever was renamed meanwhile.

The monitor imports this file for every log of a host, so it imports little itself.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import stat
import struct
import sys
import time
from collections.abc import Iterator
from typing import Final, NamedTuple

from insula.model.stream import MAX_PAYLOAD, Kind

MIN_SIZE: Final = 4096
"""A log file may not be limited to less than this many bytes."""

_HEAD: Final = struct.Struct(">BIQ")
_TIME: Final = 8
_KINDS: Final = frozenset((Kind.STDOUT, Kind.STDERR))
_FLAGS: Final = os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC | os.O_NOFOLLOW
_FIONREAD: Final = 0x541B
_BATCH: Final = 1 << 16  # what one poll reads, unless a record is longer
_REMEMBERED: Final = 10_000
_ends: dict[str, tuple[int, int]] = {}
"""Inode and size of logs that this process closed: one that is as it was then is whole, and need not be read."""
_FULL: Final = (errno.ENOSPC, errno.EDQUOT)


class LogEntry(NamedTuple):
    """A piece of output: the time it was read, STDOUT or STDERR, and its bytes."""

    time_ns: int
    kind: Kind
    data: bytes


class LogWriter:
    """Appends records to the log in `directory`, of at most `max_files` files of at most `max_size` bytes.

    One writer at a time. `dropped` counts the bytes of output that the disk had no room for; writing goes on as soon
    as there is room again. Raises OSError only if the directory is not there or not writable at the start.
    """

    def __init__(self, directory: str, max_size: int, max_files: int) -> None:
        if max_size < MIN_SIZE or max_files < 1:
            raise ValueError(f"a log needs at least one file of {MIN_SIZE} bytes, not {max_files} of {max_size}")
        self.dropped = 0
        self._directory = directory
        self._path = f"{directory}/log"
        self._max_size = max_size
        self._max_files = max_files
        self._chunk = min(MAX_PAYLOAD - _TIME, max_size - _HEAD.size)
        self._fd = -1
        self._splices = True
        self._end = 0  # where the last whole record ends
        self._torn = False
        try:
            self._open()
        except OSError as error:
            if error.errno not in _FULL:
                raise

    def write(self, kind: Kind, data: bytes | memoryview) -> None:
        """Append `data` of STDOUT or STDERR, in several records if it is long. What the disk refuses is `dropped`."""
        if kind not in _KINDS:
            raise ValueError(f"{kind!r} is no output")
        view = memoryview(data)
        for start in range(0, len(view), self._chunk):
            piece = view[start : start + self._chunk]
            try:
                self._append(kind, piece)
            except OSError:
                self.dropped += len(piece)

    def move(self, kind: Kind, source: int, count: int) -> bytes:
        """Append up to `count` bytes of what is in the pipe `source`, and return them; b"" at its end.

        They go from pipe to file by splice(2), so that none is lost when the writer is killed: bytes that are not in a
        whole record are still in the pipe, for the next writer. BlockingIOError if the pipe is empty.
        """
        ready = _ready(source)
        if ready == 0 and _is_empty(source):
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        ready = ready or _ready(source)  # it may just have come
        if ready == 0 or not self._splices:
            data = os.read(source, count)
            if data:
                self.write(kind, data)
            return data
        count = min(ready, count, self._chunk)
        moved = 0
        try:
            start = self._begin(kind, count)
            while moved < count:
                moved += os.splice(source, self._fd, count - moved, offset_dst=start + moved)
        except OSError as error:
            self._splices = self._splices and error.errno != errno.EINVAL
            before = os.pread(self._fd, moved, start) if moved else b""
            rest = os.read(source, count - moved)
            if error.errno == errno.EINVAL:  # a file system, or a source, that can't do this
                self.write(kind, before + rest)
            else:
                self.dropped += moved + len(rest)
            return before + rest
        self._end = start + count
        self._torn = False
        return os.pread(self._fd, count, start)

    def close(self) -> None:
        """Close the file; nothing is left to flush, as every write went to the kernel at once."""
        if self._fd >= 0:
            if not self._torn:
                _ends.pop(self._path, None)
                _ends[self._path] = (os.fstat(self._fd).st_ino, self._end)
                if len(_ends) > _REMEMBERED:
                    del _ends[next(iter(_ends))]
            os.close(self._fd)
            self._fd = -1

    def _open(self) -> None:
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | _FLAGS, 0o600)
        _check_regular(fd, self._path)
        self._fd = fd
        status = os.fstat(fd)
        known = _ends.get(self._path) == (status.st_ino, status.st_size)
        self._end = status.st_size if known else _end_of_records(fd)
        self._torn = status.st_size > self._end

    def _append(self, kind: Kind, piece: memoryview) -> None:
        start = self._begin(kind, len(piece))
        if os.pwrite(self._fd, piece, start) < len(piece):
            raise OSError(errno.ENOSPC, "short write")
        self._end = start + len(piece)
        self._torn = False

    def _begin(self, kind: Kind, length: int) -> int:
        """Write the head of a record, and return the offset of its payload. Readers ignore it until that is
        complete."""
        if self._fd < 0:
            self._open()
        if self._torn:
            os.ftruncate(self._fd, self._end)
            self._torn = False
        if self._end and self._end + _HEAD.size + length > self._max_size:
            self._rotate()
        self._torn = True
        if os.pwrite(self._fd, _HEAD.pack(kind, _TIME + length, time.time_ns()), self._end) < _HEAD.size:
            raise OSError(errno.ENOSPC, "short write")
        return self._end + _HEAD.size

    def _rotate(self) -> None:
        self.close()
        if self._max_files == 1:
            os.unlink(self._path)
        for number in range(self._max_files - 1, 0, -1):
            try:
                os.rename(f"{self._path}.{number - 1}" if number > 1 else self._path, f"{self._path}.{number}")
            except FileNotFoundError:
                continue
        self._open()


class LogReader:
    """Reads the log in `directory` from its oldest record on, without ever waiting: call `poll` again and again.

    `since_ns` leaves out records that are older. `tail` leaves out all but the last so many lines that are there at
    the first poll, stdout and stderr counted together. The log may be rotated and written meanwhile; what is rotated
    out of existence before it was read is lost. A directory or file that is not there (yet) is an empty log.
    """

    def __init__(self, directory: str, *, since_ns: int = 0, tail: int | None = None) -> None:
        self._path = f"{directory}/log"
        self._since = since_ns
        self._tail = tail
        self._fd = -1
        self._offset = 0
        self._skip = 0  # bytes of the first record that belong to lines before the tail

    def __enter__(self) -> LogReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def poll(self) -> list[LogEntry]:
        """The next records, in order; an empty list when there are no more for now."""
        if self._tail is not None:
            lines, self._tail = self._tail, None
            self._seek_tail(lines)
        if self._fd < 0 and not self._open_oldest():
            return []
        while True:
            # asked before reading: what is read after the file was renamed away is all there will ever be
            superseded = not self._is_newest()
            records, self._offset = _read_records(self._fd, self._offset)
            if records:
                records = self._trim(records)
                if records:
                    return records
            elif not superseded or not self._open_next():
                return []

    def _trim(self, records: list[LogEntry]) -> list[LogEntry]:
        if self._skip:
            first = records[0]
            records[0] = first._replace(data=first.data[self._skip :])
            self._skip = 0
        return [r for r in records if r.data and r.time_ns >= self._since]

    # -- which file -------------------------------------------------------------------------------------------

    def _name(self, number: int) -> str:
        return f"{self._path}.{number}" if number else self._path

    def _switch(self, fd: int) -> None:
        self.close()
        self._fd, self._offset = fd, 0

    def _is_newest(self) -> bool:
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(self._fd))
        except FileNotFoundError:
            return False  # between two steps of a rotation

    def _numbers(self) -> list[int]:
        """The numbers of the files that exist, oldest first."""
        try:
            names = os.listdir(os.path.dirname(self._path))
        except FileNotFoundError:
            return []
        numbers = [int(n[4:]) for n in names if n.startswith("log.") and n[4:].isdecimal() and n.isascii()]
        return sorted(numbers, reverse=True) + ([0] if "log" in names else [])

    def _open_number(self, number: int) -> int | None:
        try:
            fd = os.open(self._name(number), os.O_RDONLY | _FLAGS)
            _check_regular(fd, self._path)
            return fd
        except OSError:  # it isn't there, or is no log
            return None

    def _open_oldest(self) -> bool:
        for number in self._numbers():
            fd = self._open_number(number)
            if fd is not None:
                self._switch(fd)
                return True
        return False

    def _open_next(self) -> bool:
        """Go on with the next newer file; False if there is none yet."""
        seen: list[int] = []
        while True:
            at = self._position()
            if at == 0:
                return False
            if at is None:  # rotated away: the oldest that is left comes next
                return self._open_oldest()
            newer = [number for number in self._numbers() if number < at]
            if not newer:
                return False
            if newer[0] != at - 1 and newer != seen:  # a listing may miss what is renamed meanwhile: believe two
                seen = newer
                continue
            fd = self._open_number(newer[0])
            if fd is not None:
                if self._position() == at:
                    self._switch(fd)
                    return True
                os.close(fd)  # renamed in between: look again

    def _position(self) -> int | None:
        """The number that the open file has now; None if it was removed."""
        while (mine := os.fstat(self._fd)).st_nlink:
            for number in reversed(self._numbers()):
                try:
                    if os.path.samestat(os.stat(self._name(number)), mine):
                        return number
                except FileNotFoundError:
                    continue
        return None

    # -- tail --------------------------------------------------------------------------------------------------

    def _seek_tail(self, lines: int) -> None:
        """Open the file and set the offset where the last `lines` lines begin.

        Records can only be found from the beginning of a file, so each file is read once. A few numbers are kept for
        each block, and none for each record.
        """
        wanted = lines
        last = True  # the very last line counts whether it ends or not
        for number in reversed(self._numbers()):
            fd = self._open_number(number)
            if fd is None:
                continue
            self._switch(fd)
            blocks = list(_blocks(fd))
            if lines <= 0:
                self._offset = blocks[-1].end if blocks else 0
                return
            for block in reversed(blocks):
                if last and block.last:
                    wanted += block.last == b"\n"
                    last = False
                if block.breaks >= wanted:
                    self._offset, self._skip = _line_in(fd, block, wanted)
                    return
                wanted -= block.breaks


def _ready(source: int) -> int:
    """The number of bytes that can be read from a pipe now (FIONREAD, pipe(7))."""
    return int.from_bytes(fcntl.ioctl(source, _FIONREAD, bytes(4)), sys.byteorder)


def _is_empty(source: int) -> bool:
    """Whether a read would block: there are no bytes, and a writer is left."""
    poll = select.poll()
    poll.register(source, select.POLLIN)
    return not poll.poll(0)


def _check_regular(fd: int, path: str) -> None:
    """OSError unless it is a regular file, and then it is closed: reading any other kind of file may block."""
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a regular file", path)


# -- records in a file --------------------------------------------------------------------------------------------


def _parse(buffer: bytes, offset: int) -> tuple[Kind, int, int] | None:
    """Parse the head of the record at `offset`: kind, time and end. None if there is no whole record."""
    if len(buffer) - offset < _HEAD.size:
        return None
    kind, length, when = _HEAD.unpack_from(buffer, offset)
    end = offset + _HEAD.size - _TIME + length
    if kind not in _KINDS or not _TIME <= length <= MAX_PAYLOAD or end > len(buffer):
        return None
    return Kind(kind), when, end


def _read_records(fd: int, offset: int) -> tuple[list[LogEntry], int]:
    """Read whole records from `offset` on, at least one if there is one; and the offset after them."""
    for size in (_BATCH, MAX_PAYLOAD + _HEAD.size):
        buffer = os.pread(fd, size, offset)
        records = []
        at = 0
        while (found := _parse(buffer, at)) is not None:
            kind, when, end = found
            records.append(LogEntry(when, kind, buffer[at + _HEAD.size : end]))
            at = end
        if records or len(buffer) < size:
            break
    return records, offset + at


class _Block(NamedTuple):
    """A run of whole records: its start and end, the number of lines that end in it, its last byte of output."""

    start: int
    end: int
    breaks: int
    last: bytes


def _blocks(fd: int) -> Iterator[_Block]:
    """The whole records of the file, in blocks of about 64 KiB, or of one record that is longer.

    Reading it in pieces also lets other threads run: each read releases the interpreter's lock.
    """
    base, size = 0, _BATCH
    while True:
        buffer = os.pread(fd, size, base)
        at = breaks = 0
        last = b""
        while (found := _parse(buffer, at)) is not None:
            start, end = at + _HEAD.size, found[2]
            if end > start:
                breaks += buffer.count(b"\n", start, end)
                last = buffer[end - 1 : end]
            at = end
        if at:
            yield _Block(base, base + at, breaks, last)
            base, size = base + at, _BATCH
        elif size == _BATCH and len(buffer) == size:
            size = MAX_PAYLOAD + _HEAD.size
        else:
            return


def _line_in(fd: int, block: _Block, breaks: int) -> tuple[int, int]:
    """The start of the record, and the byte in it, after which that many lines end in the block."""
    buffer = os.pread(fd, block.end - block.start, block.start)
    spans = []
    at = 0
    while (found := _parse(buffer, at)) is not None:
        spans.append((at, found[2]))
        at = found[2]
    for start, end in reversed(spans):
        data = buffer[start + _HEAD.size : end]
        here = data.count(b"\n")
        if here >= breaks:
            at = len(data)
            for _ in range(breaks):
                at = data.rindex(b"\n", 0, at)
            return block.start + start, at + 1
        breaks -= here
    raise ValueError("the block changed meanwhile")


def _end_of_records(fd: int) -> int:
    end = 0
    for block in _blocks(fd):
        end = block.end
    return end
