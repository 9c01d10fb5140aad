"""Decompression: every form is read as its own tool reads it, and padding costs next to nothing."""

from __future__ import annotations

import gzip
import io
import os
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from insula.image.worker import Meter, _Gzip
from insula.model.errors import Invalid


class Counting(io.BytesIO):
    """A file that counts how often it is read."""

    reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads += 1
        return super().read(size)


def gunzip(data: bytes) -> bytes:
    meter = Meter(io.BufferedReader(_Gzip(io.BytesIO(data)), 1000), 1 << 30)
    pieces = []
    while piece := meter.read(777):
        pieces.append(piece)
    return b"".join(pieces)


@given(st.lists(st.binary(max_size=3000), min_size=1, max_size=5), st.integers(0, 2000), st.booleans())
def test_members_and_padding_are_read_as_python_reads_them(members: list[bytes], zeros: int, between: bool) -> None:
    packed = (bytes(zeros) if between else b"").join(gzip.compress(member) for member in members) + bytes(zeros)
    assert gunzip(packed) == gzip.decompress(packed) == b"".join(members)


@pytest.mark.parametrize(
    "damage", ["cut off", "cut off in the header", "garbage after", "wrong sum", "empty member cut"]
)
def test_damage_is_refused(damage: str) -> None:
    good = gzip.compress(os.urandom(100_000))
    bad = {
        "cut off": good[:-9],
        "cut off in the header": good[:5],
        "garbage after": good + b"x",
        "wrong sum": good[:-8] + b"\1\2\3\4" + good[-4:],
        "empty member cut": good + gzip.compress(b"")[:-1],
    }[damage]
    with pytest.raises(Invalid, match="does not decompress"):
        gunzip(bad)
    assert len(gunzip(good)) == 100_000


def test_padding_is_read_in_large_pieces() -> None:
    """Hostile: some bytes, and gigabytes of zeros behind them. Python's own reader takes them one by one."""
    packed = gzip.compress(b"x") + bytes(1 << 20)
    ours, theirs = Counting(packed), Counting(packed)
    assert io.BufferedReader(_Gzip(ours)).read() == gzip.GzipFile(fileobj=theirs).read() == b"x"
    assert ours.reads < 30
    assert theirs.reads > 1_000_000  # the control


def test_members_without_content_are_read_in_large_pieces() -> None:
    file = Counting(gzip.compress(b"") * 10_000 + gzip.compress(b"x"))
    assert io.BufferedReader(_Gzip(file)).read() == b"x"
    assert file.reads < 30


def test_a_zlib_stream_without_a_gzip_header_is_refused() -> None:
    with pytest.raises(Invalid, match="does not decompress"):
        gunzip(b"\x1f\x8b" + zlib.compress(b"x"))
