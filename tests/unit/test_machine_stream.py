"""QEMU's migration stream is split into memory and state; what is none is refused. Streams of a real QEMU are in
tests/system/machine."""

from __future__ import annotations

import os
import random
import struct
import tempfile
import threading
from collections.abc import Iterable

import pytest

from insula.machine.qemu import stream

PAGE = 4096
SIZE = 64 * PAGE
BEFORE = b"QEVM\0\0\0\3\7\0\0\0\4pc-q"
AFTER = b"\4devices" + bytes(5000) + b"\0"
FOOTER = b"\x7e\0\0\0\2"
ZERO, SIZES, WHOLE, END, SAME = 2, 4, 8, 16, 32
Page = tuple[bytes, int, bytes]  # block, number, contents, of which one byte stands for a page of zeros


def block(name: bytes) -> bytes:
    return bytes([len(name)]) + name


def records(pages: Iterable[Page]) -> bytes:
    """Records of pages, in order. A name is there only when it changes."""
    made, last = b"", b""
    for name, number, data in pages:
        flags = (WHOLE if len(data) == PAGE else ZERO) | (SAME if name == last else 0)
        made += struct.pack(">Q", number * PAGE | flags) + (b"" if name == last else block(name)) + data
        last = name
    return made + struct.pack(">Q", END)


def sent(*sections: list[Page], size: int = SIZE) -> bytes:
    """A stream with these sections of pages."""
    sizes = struct.pack(">Q", size + PAGE | SIZES)
    sizes += b"".join(block(name) + struct.pack(">QQ", each, 0) for name, each in ((b"ram", size), (b"bios", PAGE)))
    made = BEFORE + b"\1\0\0\0\2" + stream._SECTION + sizes + struct.pack(">Q", END) + FOOTER
    for number, pages in enumerate(sections, 1):
        made += bytes([3 if number == len(sections) else 2]) + b"\0\0\0\2" + records(pages) + FOOTER
    return made + AFTER


def split(data: bytes, most: int = 1 << 30, size: int = SIZE) -> tuple[bytes, bytes]:
    """The memory and the state of a stream."""
    with tempfile.TemporaryFile() as memory, tempfile.TemporaryFile() as state:
        read, write = os.pipe()
        sender = threading.Thread(target=send, args=(write, data))
        sender.start()
        try:
            stream.split(read, memory.fileno(), state.fileno(), size, most, threading.Event())
        finally:
            os.close(read)
            sender.join()
        memory.seek(0)
        state.seek(0)
        return memory.read(), state.read()


def send(write: int, data: bytes) -> None:
    try:
        with open(write, "wb") as file:
            file.write(data)
    except BrokenPipeError:
        pass


def test_pages_are_where_they_are_in_memory_and_the_rest_is_kept() -> None:
    one, two, three = (os.urandom(PAGE) for _ in range(3))
    first = [(b"ram", 3, one), (b"ram", 4, two), (b"ram", 5, b"\0"), (b"bios", 0, three), (b"ram", 9, three)]
    again = [(b"ram", 4, b"\0"), (b"ram", 3, three), (b"ram", 63, one)]
    memory, state = split(sent(first, again))
    expected = bytearray(SIZE)
    for number, data in ((3, three), (9, three), (63, one)):
        expected[number * PAGE : number * PAGE + PAGE] = data
    assert memory == expected, "the last one counts"
    assert state == sent([(b"bios", 0, three)], []), "others' pages stay"


def test_a_memory_that_is_larger_than_the_buffer() -> None:
    size = 1024 * PAGE
    pages = [os.urandom(PAGE) if number % 3 else b"\0" for number in range(1024)]
    data = sent([(b"ram", number, page) for number, page in enumerate(pages)], size=size)
    memory, state = split(data, size=size)
    assert memory == b"".join(page if len(page) == PAGE else bytes(PAGE) for page in pages)
    assert state == sent([], size=size)
    assert split(data, len(data), size)[0] == memory
    with pytest.raises(OSError, match="more than its memory"):
        split(data, len(data) - 1, size)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "no memory"),
        (b"QEVM", "no memory"),
        (os.urandom(100_000), "no memory"),
        (BEFORE + stream._SECTION, "not come first"),
        (sent([(b"ram", 64, bytes(PAGE))]), "larger"),
        (sent([(b"ram", 1 << 50, b"\0")]), "larger"),
        (sent([], size=2 * SIZE), "bytes"),
        (sent([(b"ram", 1, bytes(PAGE))])[: -len(AFTER) - 1000], "cut off"),
        (sent([]).replace(FOOTER, b"\x7e\0\0\0\3"), "no end"),
        (sent([]).replace(FOOTER + b"\3\0\0\0\2", FOOTER + b"\3\0\0\0\7"), "something else"),
        (sent([]).replace(struct.pack(">Q", END), struct.pack(">Q", 0x80)), "flags"),
    ],
)
def test_what_is_no_such_stream_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(OSError, match=why):
        split(data)


def test_whatever_is_sent_is_split_or_refused() -> None:
    """Also of a stream in which some bytes are others: memory never has another size."""
    numbers = random.Random(7)
    whole = sent([(b"ram", number, os.urandom(PAGE)) for number in range(8)], [(b"bios", 0, os.urandom(PAGE))])
    refused = 0
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(numbers.randint(1, 4)):
            at = numbers.choice((numbers.randrange(len(data)), numbers.randrange(200)))
            data[at] = numbers.choice((0, 1, 4, 8, 0x7F, 0xFF, numbers.randrange(256)))
        del data[numbers.choice((len(data), numbers.randrange(len(data)))) :]
        try:
            assert len(split(bytes(data))[0]) == SIZE
        except OSError:
            refused += 1
    assert 0 < refused < 400


def test_it_is_given_up() -> None:
    read, write = os.pipe()
    over = threading.Event()
    over.set()
    given_up = pytest.raises(OSError, match="did not send")
    with tempfile.TemporaryFile() as memory, tempfile.TemporaryFile() as state, open(read), open(write, "wb"), given_up:
        stream.split(read, memory.fileno(), state.fileno(), SIZE, 1 << 30, over)
