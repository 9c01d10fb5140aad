"""Any bytes as a layer: a tree inside of the target, or one line of refusal; and nothing else anywhere.

hypothesis makes archives that are nearly right, since random bytes hardly get past a checksum: headers whose fields are
odd one at a time, extended headers that lie about lengths, names that lead elsewhere, maps of sparse files, endings in
the middle. What is asked of the reader is the same for all: no exception but its own, no memory or disk beyond its
bounds.
"""

from __future__ import annotations

import io
import os
import tempfile
import tracemalloc
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from insula.image.layer import extract, set_opaque
from insula.image.limits import ExtractionLimits
from insula.image.tar import BLOCK, Reader
from insula.model.errors import InsulaError
from tests.forked import forked
from tests.support.images import member, tar, tree

ROOM = ExtractionLimits(bytes=1 << 20, entries=50)
MOST_MEMORY = 16 << 20
slow = settings(deadline=None, suppress_health_check=list(HealthCheck), max_examples=150)

GOOD_NAMES = [b"a", b"b", b"c", b"d/e", b"d/f/g", b"./h", b"./", b".wh.i", b"d/.wh.j", b"k/.wh..wh..opq", b"l/",
              b"/m", b"/d", b".wh.d", b".wh..wh.plnk/1.2", b".wh..wh.aufs", b"/"]  # fmt: skip
ODD_NAMES = [b"..", b"../x", b"a/../../x", b"/a", b"", b".", b"a/b", b"d//e", b"c/", b".wh.", b".wh..wh.plnk", b"a\0b",
             b"\xff\xfe", b"a\nb", b"n" * 100, b"OUT/x", b"/OUT/x", b"../outside/x", b"n/" * 50]  # fmt: skip
KEYS = [b"path", b"linkpath", b"size", b"uid", b"gid", b"mtime", b"SCHILY.xattr.user.x", b"hdrcharset", b"", b"\xff",
        b"SCHILY.xattr.trusted.overlay.redirect", b"SCHILY.xattr.security.capability",
        b"SCHILY.xattr.user.overlay.opaque",
        b"GNU.sparse.major", b"GNU.sparse.minor", b"GNU.sparse.realsize", b"GNU.sparse.size", b"GNU.sparse.map",
        b"GNU.sparse.name", b"GNU.sparse.offset", b"GNU.sparse.numbytes"]  # fmt: skip


def mostly(right: st.SearchStrategy[bytes], odd: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """One in fifteen is odd: with several fields in several members, about every second archive has an odd one."""
    return st.integers(0, 14).flatmap(lambda number: odd if number == 14 else right)


names = mostly(st.sampled_from(GOOD_NAMES), st.sampled_from(ODD_NAMES) | st.binary(max_size=100))
octal = st.integers(0, 0o777).map(lambda n: b"%o" % n)
odd_numbers = st.sampled_from([b"", b" 7 ", b"-1", b"9", b"\x80" + bytes(6) + b"\5", b"\xff" * 12, b"7" * 12])
numbers = mostly(octal, odd_numbers | st.binary(max_size=12))
own = mostly(st.just(b"0"), numbers)
odd_kinds = st.sampled_from([b"g", b"K", b"S", b"3", b"4", b"6", b"7", b"D", b"V", b"\0"])
kinds = mostly(
    st.sampled_from([b"0", b"0", b"5", b"2", b"1", b"x", b"L", b"3"]), odd_kinds | st.binary(min_size=1, max_size=1)
)


@st.composite
def pax(draw: st.DrawFn) -> bytes:
    """Records of an extended header, some with a wrong length."""
    values = names | own | st.sampled_from([b"1", b"0", b"1.5", b"-3.x", b"9" * 30, b"0,5", b"0,5,3", b"5,1,0,1"])
    records = b""
    for key, value in draw(st.lists(st.tuples(st.sampled_from(KEYS), values), max_size=3)):
        body = b" " + key + b"=" + value + b"\n"
        length = len(body) + len(str(len(body)))
        length += len(str(length)) != len(str(len(body)))
        records += b"%d" % (length + draw(st.sampled_from([0] * 20 + [1, -1, 1000, -1000]))) + body
    return records


@st.composite
def members(draw: st.DrawFn) -> bytes:
    """A header with a checksum that holds, and what follows it."""
    kind = draw(kinds)
    content = {b"x": pax(), b"g": pax(), b"L": names, b"K": names, b"0": st.binary(max_size=600)}
    data = draw(content.get(kind, mostly(st.just(b""), st.binary(max_size=600))))
    size = draw(mostly(st.just(b"%o" % len(data)), odd_numbers | octal))
    widths = (100, 8, 8, 8, 12, 12)
    fields = (draw(names), draw(numbers), draw(own), draw(own), size, draw(numbers))
    head = b"".join(value[:width].ljust(width, b"\0") for value, width in zip(fields, widths, strict=True))
    magic = draw(mostly(st.just(b"ustar\x0000"), st.sampled_from([b"ustar  \0", bytes(8)])))
    link = draw(names) if kind in (b"1", b"2") else b""
    tail = (
        kind
        + link[:100].ljust(100, b"\0")
        + magic
        + bytes(80)
        + draw(mostly(st.just(b""), names | st.binary(max_size=167)))
    )
    block = bytearray((head + b" " * 8 + tail).ljust(BLOCK, b"\0")[:BLOCK])
    block[148:156] = b"%06o\0 " % sum(block)
    padding = -len(data) % BLOCK + (7 if draw(st.integers(0, 30)) == 30 else 0)
    return bytes(block) + data + bytes(padding)


archives = st.lists(members(), max_size=6).flatmap(
    lambda found: st.sampled_from([b"".join(found) + bytes(1024), b"".join(found), b"".join(found)[:-100]])
)


def attempt(data: bytes, *, plain: bool) -> str | None:
    """Extracts; the refusal, if there is one. Whatever happened, only the target has changed."""
    with tempfile.TemporaryDirectory() as scratch:
        target, outside = Path(scratch, "target"), Path(scratch, "outside")
        target.mkdir()
        outside.mkdir()
        (outside / "secret").write_text("s")
        data = data.replace(b"/OUT", os.fsencode(outside)[:90])
        before = tree(outside)
        fd = os.open(target, os.O_RDONLY | os.O_DIRECTORY)
        refusal = None
        try:
            made = extract(Reader(io.BytesIO(data).read), fd, ROOM, plain=plain)
            assert 0 <= made.entries <= ROOM.entries and 0 <= made.bytes <= ROOM.bytes
            set_opaque(fd, made.opaque)
        except InsulaError as error:
            refusal = error.message
            assert error.hint and "\n" not in str(error) and "\n" not in error.hint and len(str(error)) < 1000
        finally:
            os.close(fd)
        assert tree(outside) == before
        assert sorted(os.listdir(scratch)) == ["outside", "target"]
        assert plain or not (_attributes(target) - {"trusted.overlay.opaque", "security.capability", "user.x"})
        # a hole costs no disk, so only what was stored counts
        assert sum(path.lstat().st_blocks for path in target.rglob("*")) * 512 <= 4 * (ROOM.bytes + len(data))
        return refusal


def _attributes(target: Path) -> set[str]:
    return {name for path in target.rglob("*") for name in os.listxattr(path, follow_symlinks=False)}


@slow
@given(archives, st.booleans())
def test_archives_that_are_nearly_right(data: bytes, plain: bool) -> None:
    attempt(data, plain=plain)


@settings(slow, max_examples=100)
@given(st.binary(max_size=3000))
def test_bytes(data: bytes) -> None:
    attempt(data, plain=False)


def test_some_are_extracted_and_some_are_refused() -> None:
    """The control: what hypothesis makes reaches both ends."""
    seen: dict[bool, int] = {True: 0, False: 0}

    @settings(slow, max_examples=300, database=None)
    @given(archives)
    def look(data: bytes) -> None:
        seen[attempt(data, plain=False) is None] += 1

    look()
    assert seen[True] > 10 and seen[False] > 10, seen


def test_an_extended_header_whose_second_record_has_no_length() -> None:
    """Found here: what came before was taken for the record, again and again, for ever."""
    header = member("x", b"10 path=a\n" + b"x" * 40, kind=b"x")
    refusal = forked(lambda: attempt(tar(header, member("f", b"")), plain=False), timeout=10)
    assert refusal == "the tar archive has a broken pax header"


@settings(slow, max_examples=60)
@given(archives)
def test_memory_is_bounded(data: bytes) -> None:
    """A few hundred bytes that claim to be terabytes: of names, of extended headers, of maps."""
    tracemalloc.start()
    try:
        attempt(data, plain=False)
        assert tracemalloc.get_traced_memory()[1] < MOST_MEMORY
    finally:
        tracemalloc.stop()
