"""Frames between a machine and its host: whatever pieces a stream arrives in."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from insula.machine import protocol

FRAMES = st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 10), st.binary(max_size=300)), max_size=8)


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    at = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[low:high] for low, high in itertools.pairwise(at)]


@given(FRAMES, st.lists(st.integers(0, 5000), max_size=10))
def test_frames_are_the_same_in_whatever_pieces_they_arrive(
    frames: list[tuple[int, int, bytes]], cuts: list[int]
) -> None:
    decoder = protocol.FrameDecoder()
    data = b"".join(protocol.encode(*frame) for frame in frames)
    assert [frame for piece in pieces(data, cuts) for frame in decoder.feed(piece)] == frames


@pytest.mark.parametrize(
    "frame", [protocol.HEADER.pack(1, 99, 0), protocol.HEADER.pack(1, 3, protocol.MAX_PAYLOAD + 1)]
)
def test_what_is_no_frame_is_refused(frame: bytes) -> None:
    with pytest.raises(ValueError, match="no frame"):
        list(protocol.FrameDecoder().feed(frame))
