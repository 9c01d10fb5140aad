"""QEMU's migration stream (docs/devel/migration.rst of QEMU), split into the guest's memory and the rest.

A machine that has a stream to load reads all of its memory from it, and shares none with others that load the same. A
machine whose memory is a file maps that, and reads pages when it needs them. So the pages of the memory are taken out
of the stream, and written to a file where they are in memory. What is left is the state of devices and processors, as a
template has it (state.py).

The memory comes first in the stream, in sections with the name "ram": records of eight bytes, an address and flags,
each followed by the name of a block unless it is that of the record before, and by a page, or by a byte if all of the
page is zero. Blocks are the guest's memory, which is named so by `MachineConfig`, and smaller ones of firmware and
devices, which stay in the stream.

A stream comes from a QEMU which may be in its guest's hands: what is no such stream is an OSError.
"""

from __future__ import annotations

import errno
import os
import select
import struct
import threading
from typing import Final

_BLOCK: Final = b"ram"
_PAGE: Final = 4096
_ZERO, _SIZES, _WHOLE, _END, _SAME = 0x02, 0x04, 0x08, 0x10, 0x20  # RAM_SAVE_FLAG_*
_SECTION: Final = b"\x03ram" + bytes(4) + b"\0\0\0\x04"
"""The name of the section, its instance and its version. A type and a number are before it."""
_START, _PART, _LAST, _FOOTER = 1, 2, 3, 0x7E
_MOST_BEFORE: Final = 4096
"""Bytes before the first section: the type of the machine, and capabilities."""
_MOST_PAGES: Final = 512
"""Pages that are written at once, which IOV_MAX limits."""
_BUFFER: Final = 1 << 20
_LONGEST: Final = 8 + 1 + 255 + _PAGE
"""Bytes of a record, at most."""
_PAUSE: Final = 0.2
_RECORD: Final = struct.Struct(">Q")


def split(source: int, memory: int, state: int, size: int, most: int, over: threading.Event) -> None:
    """Read a stream from the pipe `source` to its end, or until it is `over`. The guest's memory, of `size` bytes, goes
    into the file `memory`, which is empty, and the rest into the file `state`. Blocks. OSError, also for more than
    `most` bytes."""
    os.ftruncate(memory, size)
    stream = _Stream(source, memory, state, size, most, over)
    number = stream.begin()
    while stream.section(number):
        pass
    stream.finish()


class _Stream:
    """A stream that is being read. `_buffer` has its bytes up to `_filled`, of which `_at` is the next one. What is
    from `_kept` on is not written yet, and belongs to the state."""

    def __init__(self, source: int, memory: int, state: int, size: int, most: int, over: threading.Event) -> None:
        self._source, self._memory, self._state = source, memory, state
        self._size, self._most, self._over = size, most, over
        self._buffer = bytearray(_BUFFER)
        self._view = memoryview(self._buffer)
        self._at = self._kept = self._filled = 0
        self._ours = False  # the block of the last record is the guest's memory
        self._run: list[memoryview] = []  # pages from the address `_first` on, which are not written yet
        self._first = 0
        self._seen = bytearray(size // _PAGE)  # pages that have something in them
        self._poll = select.poll()
        self._poll.register(source, select.POLLIN)

    def begin(self) -> bytes:
        """Read to the first record, and return the number of the section."""
        while (found := self._buffer.find(_SECTION, 0, self._filled)) < 0:
            if self._filled > _MOST_BEFORE or not self._fill():
                raise _refusal("there is no memory in it")
        if found < 5 or self._buffer[found - 5] != _START:
            raise _refusal("its memory does not come first")
        self._at = found + len(_SECTION)
        return bytes(self._buffer[found - 4 : found])

    def section(self, number: bytes) -> bool:
        """Read the records of a section, and what follows; return whether another one of the memory begins."""
        while self._record():
            pass
        self._need(10)
        end = bytes(self._view[self._at : self._at + 10])
        if end[0] != _FOOTER or end[1:5] != number:
            raise _refusal("its memory has no end")
        if end[5] not in (_PART, _LAST):
            return False
        if end[6:] != number:
            raise _refusal("something else is among its memory")
        self._at += 10
        return True

    def finish(self) -> None:
        """Copy what is left."""
        while True:
            self._at = self._filled
            if not self._fill():
                return

    def _record(self) -> bool:
        """Read a record; return whether it was not the last one of its section."""
        begin = self._at
        if self._filled - begin < _LONGEST:
            self._need(_LONGEST, exactly=False)
            begin = self._at
        [word] = _RECORD.unpack_from(self._buffer, begin)
        flags, at = word & _PAGE - 1, begin + 8
        if flags & (_WHOLE | _ZERO):
            if not flags & _SAME:
                at += 1 + self._buffer[at]
                self._ours = self._buffer[begin + 9 : at] == _BLOCK
            whole = flags & _WHOLE
            self._at = at + (_PAGE if whole else 1)
            if self._at > self._filled:
                raise _refusal("it is cut off")
            if self._ours:
                if begin > self._kept:
                    os.write(self._state, self._view[self._kept : begin])
                self._kept = self._at
                self._take(word - flags, self._view[at : self._at] if whole else None)
            return True
        self._at = at
        if flags == _SIZES:
            self._sizes(word - flags)
        elif flags != _END:
            raise _refusal(f"a record has the flags {flags:#x}")
        return bool(flags != _END)

    def _take(self, address: int, page: memoryview | None) -> None:
        """Take a page of the memory; None for one that is all zeros, as those are that were never written."""
        if address >= self._size:
            raise _refusal("its memory is larger than the guest's")
        number = address // _PAGE
        if page is None:
            if self._seen[number]:
                self._write()
                os.pwrite(self._memory, bytes(_PAGE), address)
            return
        self._seen[number] = 1
        if address != self._first + len(self._run) * _PAGE or len(self._run) >= _MOST_PAGES:
            self._write()
            self._first = address
        self._run.append(page)

    def _write(self) -> None:
        """Write the pages that wait for it."""
        if self._run:
            os.pwritev(self._memory, self._run, self._first)
        self._run, self._first = [], -1

    def _sizes(self, total: int) -> None:
        """Skip the list of blocks: a name, a size, and an address of each, up to a sum of sizes."""
        while total > 0:
            self._need(1 + 255 + 16, exactly=False)
            at = self._at + 1 + self._buffer[self._at]
            if at + 16 > self._filled:
                raise _refusal("it is cut off")
            [size] = _RECORD.unpack_from(self._buffer, at)
            if self._buffer[self._at + 1 : at] == _BLOCK and size != self._size:
                raise _refusal(f"its memory has {size} bytes")
            total -= size
            self._at = at + 16

    def _need(self, count: int, *, exactly: bool = True) -> None:
        """Have so many bytes in the buffer, or, unless it has to be `exactly` so many, what is left of the stream."""
        while self._filled - self._at < count:
            if not self._fill():
                if exactly or self._filled - self._at < 9:
                    raise _refusal("it is cut off")
                return

    def _fill(self) -> bool:
        """Write what is done, and read more. Return whether there was more."""
        self._write()
        if self._at > self._kept:
            os.write(self._state, self._view[self._kept : self._at])
        left = self._filled - self._at
        self._view[:left] = self._view[self._at : self._filled]
        self._at, self._kept, self._filled = 0, 0, left
        while not self._poll.poll(_PAUSE * 1000):
            if self._over.is_set():
                raise OSError(errno.ECANCELED, "the machine did not send its memory")
        count = os.readv(self._source, [self._view[left:]])
        self._filled += count
        self._most -= count
        if self._most < 0:
            raise OSError(errno.EFBIG, "the machine sends more than its memory")
        return count > 0


def _refusal(what: str) -> OSError:
    return OSError(errno.EPROTO, f"what QEMU sends can't be read: {what}")
