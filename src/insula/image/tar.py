"""A strict reader of tar archives: ustar, pax and GNU, as a stream, in bounded memory.

A tar archive is a sequence of 512-byte blocks: a header, the member's data padded to whole blocks, the next header, and
so on, and two blocks of zeros. Metadata that does not fit into the header of 1988 is in members of its own before the
one that it describes: type ``x`` (pax: records ``length key=value``), ``L`` and ``K`` (GNU: a long name, a long link
name). Python's `tarfile` treats a damaged header as the end of the archive, and trusts sizes. This reader raises an
error instead: if two readers see different members in an archive, a check by one of them can be bypassed.

See POSIX.1-2017 pax(1) "ustar Interchange Format" and "pax Extended Header", and the GNU tar manual, "Tar Internals".
The extracting child process loads this file, so it imports little.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

from insula.model.errors import Invalid
from insula.model.units import shorten

BLOCK = 512
MAX_PATH = 4095  # PATH_MAX without its NUL
MAX_PAX = 1 << 20
MAX_SEGMENTS = 1 << 16
MAX_SIZE = (1 << 63) - 1
MIN_TIME, MAX_TIME = -(1 << 31), 1 << 34
CHUNK = 1 << 18

REGULAR, HARD_LINK, SYMLINK, CHARACTER, BLOCK_DEVICE, DIRECTORY, FIFO = b"0", b"1", b"2", b"3", b"4", b"5", b"6"
_HEADER_ONLY = {HARD_LINK, SYMLINK, CHARACTER, BLOCK_DEVICE, DIRECTORY, FIFO}
_HEADER = struct.Struct("100s8s8s8s12s12s8s1s100s6s2s32s32s8s8s155s12x")
_GLOBAL = {b"uid", b"gid", b"mtime"}  # the allowed keys of a global header that would be used here
_ZEROS = bytes(BLOCK)
_HINT = "the archive is damaged, or not a tar archive"

Pax = dict[bytes, bytes]


class Member:
    """A member. `size` is that of the extracted file; `segments` are (offset, length) of a sparse file's data."""

    __slots__ = ("gid", "kind", "link", "mode", "mtime_ns", "name", "segments", "size", "stored", "uid", "xattrs")

    def __init__(self, kind: bytes, name: bytes, link: bytes, mode: int, uid: int, gid: int) -> None:
        self.kind, self.name, self.link = kind, name, link
        self.mode, self.uid, self.gid = mode, uid, gid
        self.size = self.stored = self.mtime_ns = 0
        self.xattrs: dict[bytes, bytes] = {}
        self.segments: list[tuple[int, int]] | None = None


class Reader:
    """An iterator over the members of an archive; `read(n)` returns n bytes of it, fewer only at its end.

    `data` yields the content of the current member. Invalid for any deviation from the standards. `finished` is True
    after the archive's end marker.
    """

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._read = read
        self._left = 0  # unread bytes of the current member's data, with padding
        self._padding = 0
        self._globals: Pax = {}
        self.finished = False

    def __iter__(self) -> Iterator[Member]:
        while True:
            self._skip()
            entry = self._member()
            if entry is None:
                return
            yield entry

    def data(self, entry: Member) -> Iterator[tuple[int, bytes]]:
        """Yield the member's content as (offset, bytes); a sparse file has holes between them."""
        for start, length in entry.segments if entry.segments is not None else [(0, entry.stored)]:
            end = start + length
            while start < end:
                chunk = self._take(min(CHUNK, end - start))
                yield start, chunk
                start += len(chunk)

    # -- blocks ----------------------------------------------------------------------------

    def _exactly(self, n: int) -> bytes:
        data = self._read(n)
        if len(data) != n:
            raise Invalid("the tar archive is cut off", "fetch or make it again")
        return data

    def _take(self, n: int) -> bytes:
        """Return `n` bytes of the current member's data."""
        if n > self._left - self._padding:
            raise Invalid("a sparse file's map in the tar archive exceeds its data", _HINT)
        self._left -= n
        return self._exactly(n)

    def _skip(self) -> None:
        while self._left:
            n = min(CHUNK, self._left)
            self._exactly(n)
            self._left -= n

    def _set_data(self, size: int) -> None:
        self._padding = -size % BLOCK
        self._left = size + self._padding

    # -- headers ---------------------------------------------------------------------------

    def _member(self) -> Member | None:
        """Return the next member with its extended headers applied; None at the end."""
        pax: Pax | None = None
        long: dict[bytes, bytes] = {}
        while True:
            block = self._read(BLOCK)
            if not block or block == _ZEROS:
                if pax is not None or long:
                    raise Invalid("the tar archive ends after an extended header", _HINT)
                self.finished = bool(block)
                return None
            if len(block) != BLOCK:
                raise Invalid("the tar archive is cut off", "fetch or make it again")
            fields = _HEADER.unpack(block)
            _check_sum(block, fields[6])
            kind, size = fields[7], _number(fields[4], "size")
            if kind in (b"x", b"g"):
                records = _records(self._extension(size, MAX_PAX))
                if kind == b"g":
                    self._set_globals(records)
                elif pax is not None:
                    raise Invalid("the tar archive has two pax headers for one member", _HINT)
                else:
                    pax = records
            elif kind in (b"L", b"K"):
                if kind in long:
                    raise Invalid("the tar archive has two long names for one member", _HINT)
                long[kind] = self._extension(size, MAX_PATH + 1).partition(b"\0")[0]
            else:
                return self._entry(block, fields, {**self._globals, **(pax or {})}, long)

    def _extension(self, size: int, limit: int) -> bytes:
        if not 0 <= size <= limit:
            raise Invalid(f"the tar archive has an extended header of {size} bytes", f"at most {limit} are read")
        self._set_data(size)
        data = self._exactly(size)
        self._left = self._padding
        self._skip()
        return data

    def _set_globals(self, records: Pax) -> None:
        for key, value in records.items():
            if key in (b"path", b"linkpath", b"size") or key.startswith((b"GNU.sparse.", b"SCHILY.xattr.")):
                raise Invalid("the tar archive sets names or sizes for all members at once", _HINT)
            if key in _GLOBAL:  # others are not used, and copying them for each member would be slow
                self._globals[key] = value

    def _entry(self, block: bytes, fields: tuple[bytes, ...], pax: Pax, long: dict[bytes, bytes]) -> Member:
        kind, magic = fields[7], fields[9]
        name, link = _text(fields[0]), _text(fields[8])
        if magic == b"ustar\0" and (prefix := _text(fields[15])):
            name = prefix + b"/" + name
        name = _pax_text(pax, b"path", long.get(b"L", name))
        link = _pax_text(pax, b"linkpath", long.get(b"K", link))
        name = _pax_text(pax, b"GNU.sparse.name", name)
        if kind in (b"\0", b"7"):
            kind = REGULAR
        if kind == REGULAR and name.endswith(b"/"):
            kind = DIRECTORY  # the format before 1988
        if kind not in _HEADER_ONLY and kind not in (REGULAR, b"S"):
            raise Invalid(f"the tar archive has a member of type {shorten(kind)}", "make it with tar --format=pax")
        if not name or len(name) > MAX_PATH or len(link) > MAX_PATH:
            raise Invalid("the tar archive has a member with an empty or overlong name", _HINT)
        entry = Member(
            REGULAR if kind == b"S" else kind,
            name,
            link,
            _number(fields[1], "mode") & 0o7777,
            _pax_number(pax, b"uid", _number(fields[2], "uid")),
            _pax_number(pax, b"gid", _number(fields[3], "gid")),
        )
        entry.mtime_ns = _time(pax.get(b"mtime") or None, _number(fields[5], "mtime"))
        entry.stored = entry.size = _pax_number(pax, b"size", _number(fields[4], "size"))
        if not 0 <= entry.size <= MAX_SIZE or (kind in _HEADER_ONLY and entry.size):
            raise Invalid(f"{shorten(name)} in the tar archive has an invalid size", _HINT)
        prefix_length = len(b"SCHILY.xattr.")
        entry.xattrs = {k[prefix_length:]: v for k, v in pax.items() if k.startswith(b"SCHILY.xattr.")}
        self._set_data(entry.stored)
        if kind == b"S":
            self._gnu_sparse(block, entry)
        elif kind == REGULAR:
            self._pax_sparse(pax, entry)
        return entry

    # -- sparse files ----------------------------------------------------------------------

    def _gnu_sparse(self, block: bytes, entry: Member) -> None:
        """Read segments in the old GNU format: 4 in the header, then 21 in each following block."""
        segments = _gnu_segments(block[386:482])
        extended = block[482]
        while extended:
            more = self._exactly(BLOCK)
            segments += _gnu_segments(more[:504])
            extended = more[504]
            if len(segments) > MAX_SEGMENTS:
                raise Invalid("a sparse file in the tar archive has too many pieces", _HINT)
        _set_sparse(entry, segments, _number(block[483:495], "size"), entry.stored)

    def _pax_sparse(self, pax: Pax, entry: Member) -> None:
        """Read segments in the pax formats of GNU tar: 0.0 and 0.1 have them in the header, 1.0 before the data."""
        if not any(key.startswith(b"GNU.sparse.") for key in pax):
            return
        stored = entry.stored
        if b"GNU.sparse.major" in pax:
            if (pax[b"GNU.sparse.major"], pax.get(b"GNU.sparse.minor")) != (b"1", b"0"):
                raise Invalid("the tar archive has a sparse file of unknown format", _HINT)
            numbers, used = self._sparse_map()
            stored -= used
        else:
            numbers = [_decimal(n) for n in pax.get(b"GNU.sparse.map", b"").split(b",") if n]
        size = pax.get(b"GNU.sparse.realsize") or pax.get(b"GNU.sparse.size")
        if size is None or len(numbers) % 2 or len(numbers) > 2 * MAX_SEGMENTS:
            raise Invalid("a sparse file in the tar archive has a broken map", _HINT)
        _set_sparse(entry, list(zip(numbers[::2], numbers[1::2], strict=True)), _decimal(size), stored)

    def _sparse_map(self) -> tuple[list[int], int]:
        """Read a map in format 1.0, decimal lines with their count first, padded to whole blocks.

        Returns the numbers and the bytes read.
        """
        text, used, wanted = b"", 0, 1
        while text.count(b"\n") < wanted:
            text += self._take(BLOCK)
            used += BLOCK
            if wanted == 1 and b"\n" in text:
                wanted = 1 + 2 * _decimal(text.partition(b"\n")[0])
            if wanted > 1 + 2 * MAX_SEGMENTS or used > 48 * MAX_SEGMENTS:
                raise Invalid("a sparse file in the tar archive has too many pieces", _HINT)
        return [_decimal(n) for n in text.split(b"\n")[1:wanted]], used


def _set_sparse(entry: Member, segments: list[tuple[int, int]], size: int, stored: int) -> None:
    end = total = 0
    for start, length in segments:
        if start < end or length < 0 or start + length > size:
            raise Invalid("a sparse file in the tar archive has a broken map", _HINT)
        end, total = start + length, total + length
    if total != stored or not 0 <= size <= MAX_SIZE:
        raise Invalid("a sparse file in the tar archive has a broken map", _HINT)
    entry.segments, entry.size = segments, size


def _gnu_segments(data: bytes) -> list[tuple[int, int]]:
    found = []
    for at in range(0, len(data), 24):
        if not data[at]:
            break
        found.append((_number(data[at : at + 12], "offset"), _number(data[at + 12 : at + 24], "length")))
    return found


def _check_sum(block: bytes, field: bytes) -> None:
    """Check the checksum: the sum of the header's bytes, with the field itself as blanks; old tars sum signed chars."""
    wanted = _number(field, "checksum")
    rest = block[:148] + b" " * 8 + block[156:]
    if wanted not in (sum(rest), sum(rest) - 256 * sum(b > 127 for b in rest)):
        raise Invalid("a header in the tar archive has a wrong checksum", _HINT)


def _text(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def _number(field: bytes, what: str) -> int:
    """Parse octal digits with blanks or NULs around, or GNU's base-256 if the first bit is set."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F if not field[0] & 0x40 else field[0]]) + field[1:], signed=True)
    text = field.strip(b" \0")
    if text.translate(None, b"01234567"):
        raise Invalid(f"a header in the tar archive has a broken {what}", _HINT)
    return int(text, 8) if text else 0


def _decimal(text: bytes) -> int:
    if not text.isdigit() or len(text) > 19:
        raise Invalid("an extended header in the tar archive has a broken number", _HINT)
    return int(text)


def _pax_number(pax: Pax, key: bytes, default: int) -> int:
    value = pax.get(key)
    return _decimal(value) if value else default


def _pax_text(pax: Pax, key: bytes, default: bytes) -> bytes:
    value = pax.get(key) or default
    if b"\0" in value:
        raise Invalid("the tar archive has a name with a NUL byte", _HINT)
    return value


def _time(text: bytes | None, default: int) -> int:
    """Return nanoseconds since the epoch, from pax's decimal fraction or the header's seconds."""
    ns = default * 10**9
    if text is not None:
        whole, _, fraction = text.removeprefix(b"-").partition(b".")
        if fraction and not fraction.isdigit():
            raise Invalid("the tar archive has a broken time", _HINT)
        ns = _decimal(whole) * 10**9 + int(fraction[:9].ljust(9, b"0") or b"0")
        ns = -ns if text.startswith(b"-") else ns
    if not MIN_TIME <= ns // 10**9 <= MAX_TIME:
        raise Invalid("the tar archive has a time out of range", _HINT)
    return ns


def _records(data: bytes) -> Pax:
    """Parse pax records ``length key=value\\n``, whose length counts the whole record."""
    records: Pax = {}
    sparse: list[bytes] = []  # format 0.0 repeats its keys
    at = 0
    while at < len(data):
        space = data.find(b" ", at, at + 20)
        if space <= at:  # -1 if there is none
            raise Invalid("the tar archive has a broken pax header", _HINT)
        length = _decimal(data[at:space])
        record = data[space + 1 : at + length]
        key, equals, value = record[:-1].partition(b"=")
        if length <= space - at + 1 or at + length > len(data) or record[-1:] != b"\n" or not equals or not key:
            raise Invalid("the tar archive has a broken pax header", _HINT)
        if key in (b"GNU.sparse.offset", b"GNU.sparse.numbytes"):
            sparse.append(value)
        else:
            records[key] = value
        at += length
    if sparse:
        records[b"GNU.sparse.map"] = b",".join(sparse)
    return records
