"""Files with holes in tar archives: GNU tar's PAX format 1.0 (GNU tar manual, "Storing Sparse Files").

An extended header has records ``GNU.sparse.*``. The entry's data begins with a map, decimal numbers on a line each: the
number of pieces, and the offset and length of each in the file. The pieces follow.
"""

from __future__ import annotations

import errno
import os
import tarfile
from itertools import chain

MAX_PIECES = 1 << 18
"""The maximum number of pieces of a file, because of the memory for its map."""

_BLOCK = 512

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Pieces = list[tuple[int, int]]
    """Offset and length of pieces with data, in ascending order."""


class TooManyPieces(Exception):
    """A file has more than MAX_PIECES."""


def pieces(fd: int, size: int) -> Pieces:
    """Return the pieces with data in the first `size` bytes of a file, by SEEK_DATA (lseek(2)) if it is supported."""
    found: Pieces = []
    at = 0
    while at < size:
        try:
            begin = os.lseek(fd, at, os.SEEK_DATA)
            end = min(os.lseek(fd, begin, os.SEEK_HOLE), size)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole up to the end
                break
            if error.errno == errno.EINVAL:  # not supported
                return [(0, size)]
            raise
        if begin < end:
            found.append((begin, end - begin))
            if len(found) > MAX_PIECES:
                raise TooManyPieces
        at = max(end, begin + 1)  # a hole may appear between the two calls
    return found


def header(info: tarfile.TarInfo, size: int, data: Pieces) -> bytes:
    """Make the headers and the map of a file of `size` bytes with the pieces `data`; their content follows."""
    if not data or sum(data[-1]) < size:
        data = [*data, (size, 0)]
    table = "".join(f"{number}\n" for number in (len(data), *chain.from_iterable(data))).encode()
    table += bytes(-len(table) % _BLOCK)
    plain = tarfile.TarInfo("GNUSparseFile.0/file")  # for readers without support for the format
    plain.mode, plain.uid, plain.gid, plain.mtime = info.mode, info.uid, info.gid, info.mtime
    plain.size = len(table) + sum(length for _, length in data)
    plain.pax_headers = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": info.name,
        "GNU.sparse.realsize": str(size),
    }
    return plain.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape") + table


def repair(member: tarfile.TarInfo, tar: Any) -> None:
    """Correct tarfile's error in an entry whose stored data is larger than 8 GiB (a record "size")."""
    if member.issparse() and "size" in member.pax_headers:
        if "GNU.sparse.realsize" in member.pax_headers:
            member.size = int(member.pax_headers["GNU.sparse.realsize"])
        length = sum(length for _, length in stored(member))
        tar.offset = member.offset_data + length + -length % _BLOCK  # where the next header is


def stored(member: tarfile.TarInfo) -> Pieces:
    """Return the pieces of an entry in the order of the archive; ReadError if its map is malformed."""
    if not member.issparse():
        return [(0, member.size)]
    table: Pieces = list(member.sparse)  # type: ignore[arg-type]  # it is a list by now
    found = [(offset, length) for offset, length in table if length]  # some fill a block, or mark the end
    at = 0
    for offset, length in found:
        if length < 0 or offset < at or offset + length > member.size:
            raise tarfile.ReadError("the map of a sparse file is malformed")
        at = offset + length
    return found
