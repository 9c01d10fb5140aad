"""Messages of DNS: what is composed is parsed as the same, and nothing that is sent breaks the parser."""

from __future__ import annotations

import contextlib
import struct
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from insula.network.names import edns, wire
from insula.network.names.wire import MalformedMessage, Message, Question, Record

LABELS = st.binary(min_size=1, max_size=20)
NAMES = st.lists(LABELS, max_size=6).map(lambda labels: b"".join(bytes([len(x)]) + x for x in labels) + b"\0")
TTLS = st.integers(0, (1 << 31) - 1)


def records() -> st.SearchStrategy[Record]:
    plain = st.builds(Record, NAMES, st.sampled_from([1, 28, 16, 65, 999]), st.just(1), TTLS, st.binary(max_size=40))
    names = st.builds(Record, NAMES, st.sampled_from([wire.CNAME, wire.PTR, wire.NS]), st.just(1), TTLS, NAMES)
    numbers = st.binary(min_size=20, max_size=20)
    soa = st.builds(lambda name, a, b, rest: Record(name, wire.SOA, 1, 60, a + b + rest), NAMES, NAMES, NAMES, numbers)
    return plain | names | soa


MESSAGES = st.builds(
    Message,
    st.integers(0, 65535),
    st.integers(0, 65535),
    st.lists(st.builds(Question, NAMES, st.integers(0, 65535), st.integers(0, 65535)), max_size=3),
    st.lists(records(), max_size=8),
    st.lists(records(), max_size=3),
    st.lists(records(), max_size=3),
)


@given(MESSAGES)
def test_what_was_composed_is_parsed_as_the_same(message: Message) -> None:
    packed = wire.compose(message)
    assert wire.parse(packed) == message
    assert wire.compose(wire.parse(packed)) == packed


@given(st.binary(max_size=600))
def test_bytes_are_a_message_or_malformed(data: bytes) -> None:
    try:
        message = wire.parse(data)
    except MalformedMessage:
        return
    assert wire.parse(wire.compose(message)) == message


@given(MESSAGES, st.data())
def test_a_damaged_message_is_a_message_or_malformed(message: Message, data: st.DataObject) -> None:
    packed = bytearray(wire.compose(message))
    for _ in range(data.draw(st.integers(1, 4))):
        packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(MalformedMessage):
        wire.parse(bytes(packed[: data.draw(st.integers(0, len(packed)))]))


def header(questions: int = 1, answers: int = 0) -> bytes:
    return struct.pack("!6H", 7, 0x100, questions, answers, 0, 0)


@pytest.mark.parametrize(
    "name",
    [
        b"\xc0\x0c",  # leads to itself
        b"\xc0\x20",  # forward
        b"\x01a\xc0\x0c",  # a loop of two
        b"\xc0\x00",  # into the header
        b"\x80a",  # reserved types
        b"\x40a",
        b"\x05ab",  # longer than the message
        b"\x3f" + 63 * b"a",  # no end
        4 * (b"\x3f" + 63 * b"a") + b"\0",  # 257 bytes
        b"\xc0",
        b"",
    ],
)
def test_names_that_never_end_are_malformed(name: bytes) -> None:
    with pytest.raises(MalformedMessage):
        wire.parse(header() + name + b"\0\1\0\1" if name.startswith((b"\xc0\x0c", b"\xc0\x20")) else header() + name)


def test_a_name_is_decompressed_over_several_pointers() -> None:
    first = b"\3www\7example\3com\0"
    second = b"\3api\xc0\x10"  # api.example.com
    third = b"\1x" + struct.pack("!H", 0xC000 | (12 + len(first) + 4))
    message = wire.parse(header(3) + first + b"\0\1\0\1" + second + b"\0\1\0\1" + third + b"\0\1\0\1")
    assert [wire.text_of(q.name) for q in message.questions] == [
        "www.example.com",
        "api.example.com",
        "x.api.example.com",
    ]


def test_many_pointers_take_no_long_time() -> None:
    """Each of four thousand names has as many labels as it can, by a pointer to the one before."""
    data, start = bytearray(header(0, wire.MAX_RECORDS)), 12
    data += b"\1a\0" + b"\0\1\0\1" + 4 * b"\0" + b"\0\0"
    for number in range(1, wire.MAX_RECORDS):
        here, target = len(data), start if number % 120 else 12
        data += b"\1a" + (0xC000 | target).to_bytes(2, "big") + b"\0\1\0\1" + 4 * b"\0" + b"\0\0"
        start = here if here < 0x3FFF else 12
    began = time.process_time()
    with contextlib.suppress(MalformedMessage):
        wire.parse(bytes(data))
    assert time.process_time() - began < 1


def test_text_has_no_odd_bytes() -> None:
    assert wire.text_of(b"\3A.b\2\0\xff\0") == "a\\.b.\\000\\255"
    assert wire.name_of("Api.example.com.") == b"\3Api\7example\3com\0"
    for wrong in ("a..b", "a" * 64, ".".join(4 * ["a" * 63])):
        with pytest.raises(MalformedMessage):
            wire.name_of(wrong)


def test_a_long_answer_is_truncated_and_says_so() -> None:
    question = Question(wire.name_of("a.test"), wire.A)
    answer = Message(1, wire.RESPONSE, [question], additionals=[edns.opt()])
    answer.answers = [Record(question.name, wire.A, 1, 60, bytes(4)) for _ in range(100)]
    short = wire.parse(wire.compose(answer, 512))
    assert short.flags & wire.TRUNCATED and not short.answers and short.questions == [question]
    assert edns.edns_of(short) is not None and len(wire.compose(answer)) > 512


def test_edns() -> None:
    query = Message(1, 0, [Question(wire.name_of("a.test"), wire.A)])
    assert edns.edns_of(query) is None
    query.additionals = [edns.opt()._replace(class_=100)]
    assert edns.edns_of(query) == edns.Edns(512, 0), "at least what is allowed without EDNS"
    query.additionals *= 2
    with pytest.raises(MalformedMessage):
        edns.edns_of(query)
    assert edns.errors_in(Message(1, additionals=[edns.opt(edns.FILTERED, "no")])) == [17]
