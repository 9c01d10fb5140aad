"""Frames over a console, with what else may be on it."""

from __future__ import annotations

import os
import random

import pytest

from insula.machine import protocol
from insula.machine.console import ConsoleCoding

FRAMES = [(1, protocol.STDOUT, bytes(range(256)) * 3), (2, protocol.GRANT, b""), (3, protocol.STDIN, b"\x0f~}\x11" * 9)]


def encoded() -> list[bytes]:
    coding = ConsoleCoding()
    return [coding.encode(*each) for each in FRAMES]


@pytest.mark.parametrize("size", [1, 7, 4096])
def test_frames_arrive_however_they_are_cut(size: int) -> None:
    data, other = b"".join(encoded()), ConsoleCoding()
    pieces = [data[at : at + size] for at in range(0, len(data), size)]
    assert [each for piece in pieces for each in other.feed(piece)] == FRAMES


def test_what_a_line_takes_for_itself_is_not_sent() -> None:
    for frame in encoded():
        assert not {0x0F, 0x11, 0x13} & {*frame}
        assert frame.count(b"~") == 2


def test_what_is_no_frame_is_dropped() -> None:
    """What a kernel says while it boots and between frames, of a frame's length, and beginning like one."""
    random.seed(20)
    noise = [b"[    0.000000] Linux version 6.1\r\n", os.urandom(300), b"~~}", b"}" * 99, b"~" + b"x" * 90 + b"~"]
    other = ConsoleCoding()
    found: list[tuple[int, int, bytes]] = []
    for frame in encoded():
        for each in random.sample(noise, len(noise)):
            found += other.feed(each)
        found += other.feed(b"~" + frame)
    assert found == FRAMES


def test_a_frame_that_is_lost_or_damaged_is_noticed() -> None:
    one, two, three = encoded()
    damaged = bytes([two[0], two[1] ^ 1, *two[2:]])
    for second in (b"", damaged):
        other = ConsoleCoding()
        assert [*other.feed(one + second)] == FRAMES[:1]
        with pytest.raises(ValueError, match="a frame was lost"):
            list(other.feed(three))


def test_noise_without_an_end_is_not_kept() -> None:
    other = ConsoleCoding()
    for _ in range(64):
        assert not [*other.feed(b"x" * 100_000)]
    assert len(other._buffer) <= 4 << 20
    assert [each for frame in encoded() for each in other.feed(b"~" + frame)] == FRAMES
