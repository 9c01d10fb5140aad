"""The first bytes of connections: server names of TLS, and hosts of HTTP."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from insula.network.names.client_hello import LONGEST, ClientHelloReader, NoClientHello, server_name
from insula.network.names.http_requests import LONGEST_HEAD, BadRequest, RequestBegins, RequestReader


def hello_of_openssl(name: str | None) -> bytes:
    """A ClientHello as OpenSSL sends it, in one record."""
    outgoing = ssl.MemoryBIO()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=name).do_handshake()
    return outgoing.read()


def vector(data: bytes, size: int = 2) -> bytes:
    return len(data).to_bytes(size, "big") + data


def extension(type_: int, data: bytes) -> bytes:
    return type_.to_bytes(2, "big") + vector(data)


def sni(*names: bytes, type_: int = 0) -> bytes:
    return extension(0, vector(b"".join(bytes([type_]) + vector(name) for name in names)))


def hello(*extensions: bytes) -> bytes:
    """A handshake message with these extensions."""
    body = (
        b"\3\3" + bytes(32) + vector(bytes(32), 1) + vector(b"\x13\1") + vector(b"\0", 1) + vector(b"".join(extensions))
    )
    return b"\1" + vector(body, 3)


def records(message: bytes, size: int = 1 << 14) -> bytes:
    pieces = [message[at : at + size] for at in range(0, len(message), size)]
    return b"".join(b"\x16\3\1" + vector(piece) for piece in pieces)


@pytest.mark.parametrize("step", [1, 7, 1460, 1 << 20])
@pytest.mark.parametrize("name", ["api.example.com", "a" * 60 + ".test"])
def test_the_name_is_found_in_segments_of_any_size(step: int, name: str) -> None:
    data, reader, found = hello_of_openssl(name), ClientHelloReader(), None
    for at in range(0, len(data), step):
        assert found is None
        found = reader.feed(data[at : at + step])
    assert found == name and reader.received == data


@pytest.mark.parametrize("size", [1, 3, 100, 5000])
def test_the_name_is_found_in_records_of_any_size_and_behind_large_keys(size: int) -> None:
    message = hello(extension(51, bytes(1800)), sni(b"api.example.com"))
    data = records(message, size)
    if len(data) <= LONGEST:
        assert ClientHelloReader().feed(data) == "api.example.com"


def test_the_outer_name_is_taken_with_encrypted_client_hello() -> None:
    assert (
        ClientHelloReader().feed(records(hello(extension(0xFE0D, bytes(200)), sni(b"public.example.com"))))
        == "public.example.com"
    )


@pytest.mark.parametrize(
    "data",
    [
        hello_of_openssl(None),
        b"GET / HTTP/1.1\r\n",
        b"SSH-2.0-x\r\n",
        b"\0",
        b"\x15\3\1\0\2\2\0",  # an alert
        b"\x16\2\0\0\1\1",  # SSL 2
        b"\x16\3\1\0\0",  # an empty record
        b"\x16\3\1\xff\xff",
        records(b"\2" + vector(bytes(40), 3)),  # ServerHello
        records(b"\1" + vector(bytes(LONGEST + 1), 3)),
        records(hello(sni(b"a.test", b"b.test"))),
        records(hello(sni(b"a.test"), sni(b"b.test"))),
        records(hello(sni(b"a.test", type_=1))),
        records(hello(sni())),
        records(hello(sni(b"\xc3\xa4.test"))),
        records(hello(extension(0, vector(b"\0" + vector(b"a.test")) + b"x"))),
        records(b"\1" + vector(b"\3\3" + bytes(32) + vector(b"", 1) + vector(b"\x13\1") + vector(b"\0", 1), 3)),
        records(b"\1" + vector(b"\3\3" + bytes(10), 3)),
        records(hello(extension(21, bytes(LONGEST)), sni(b"a.test"))),
        records(hello(sni(b"a.test")), 1)[: 6 * 3] + 20 * (b"\x16\3\1" + vector(bytes(1000))),
    ],
)  # fmt: skip
def test_what_has_no_single_name_is_refused(data: bytes) -> None:
    with pytest.raises(NoClientHello):
        reader = ClientHelloReader()
        for at in range(0, len(data), 1460):
            if reader.feed(data[at : at + 1460]) is not None:
                return


@given(st.binary(max_size=400))
def test_any_body_has_a_name_or_is_refused(body: bytes) -> None:
    with contextlib.suppress(NoClientHello):
        server_name(body)


@given(st.data())
def test_a_damaged_hello_has_a_name_or_is_refused(data: st.DataObject) -> None:
    packed = bytearray(records(hello(extension(10, b"\0\4\0\x1d\0\x17"), sni(b"a.test"))))
    packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    try:
        name = ClientHelloReader().feed(bytes(packed))
        assert name is None or name.isascii()
    except NoClientHello:
        pass


# -- HTTP --------------------------------------------------------------------------------------------------------------


def read(data: bytes, step: int = 1 << 20) -> tuple[list[str], bytes]:
    """The hosts of the requests, and the bytes that may be sent."""
    hosts, sent, reader = [], b"", RequestReader()
    for at in range(0, len(data), step):
        for each in reader.feed(data[at : at + step]):
            if isinstance(each, RequestBegins):
                hosts.append(f"{each.host}:{each.port}")
            else:
                sent += each
    return hosts, sent


GET = b"GET / HTTP/1.1\r\nHost: a.test\r\n\r\n"
POST = b"POST /x HTTP/1.1\r\nhost:  b.test:80 \r\nContent-Length: 18\r\n\r\nGET / HTTP/1.1\r\n\r\n"
CHUNKED = (
    b"PUT /x HTTP/1.1\r\nHost: c.test:8080\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"5;a=b\r\nhello\r\n0012\r\nGET / HTTP/1.1\r\n\r\n\r\n0\r\nExpires: never\r\n\r\n"
)
ABSOLUTE = b"GET http://a.test/x?y HTTP/1.1\r\nHost: A.test\r\n\r\n"
OPTIONS = b"OPTIONS * HTTP/1.0\r\nHost: a.test\r\nAccept:\r\n\r\n"


@pytest.mark.parametrize("step", [1, 3, 17, 1 << 20])
def test_every_request_on_a_connection_has_its_host_told(step: int) -> None:
    data = GET + POST + CHUNKED + ABSOLUTE + GET + OPTIONS
    assert read(data, step) == (["a.test:80", "b.test:80", "c.test:8080", "A.test:80", "a.test:80", "a.test:80"], data)


def test_nothing_is_sent_before_its_checkpoint() -> None:
    steps: Iterator[RequestBegins | bytes] = RequestReader().feed(GET + GET)
    assert [type(each) for each in steps] == [RequestBegins, bytes, RequestBegins, bytes]


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a.test\r\nHost: b.test\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a.test\r\n b.test\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost : a.test\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a.test,b.test\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a.test\nHost: b.test\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a.test\r\nX: \0\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: [::1]\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost:\r\n\r\n",
        b"GET http://b.test/ HTTP/1.1\r\nHost: a.test\r\n\r\n",
        b"GET https://a.test/ HTTP/1.1\r\nHost: a.test\r\n\r\n",
        b"GET //b.test HTTP/2.0\r\nHost: a.test\r\n\r\n",
        b"GET  / HTTP/1.1\r\nHost: a.test\r\n\r\n",
        b"CONNECT a.test:80 HTTP/1.1\r\nHost: a.test\r\n\r\n",
        b"CONNECT / HTTP/1.1\r\nHost: a.test\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a.test\r\nUpgrade: websocket\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 1, 1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: +1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST / HTTP/1.0\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n",
        b"POST / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nabc\r\n",
        b"POST / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nbad trailer\r\n\r\n",
        b"\x16\3\1\0\1\0",
        b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a.test\r\nX: " + LONGEST_HEAD * b"x",
        b"SSH-2.0-OpenSSH\0",
    ],
)  # fmt: skip
def test_what_could_be_taken_in_two_ways_is_refused(data: bytes) -> None:
    for step in (1, 1 << 20):
        with pytest.raises(BadRequest):
            read(data, step)
    with pytest.raises(BadRequest):
        read(GET + data)


@given(st.binary(max_size=300))
def test_any_bytes_are_requests_or_refused(data: bytes) -> None:
    try:
        _, sent = read(data)
    except BadRequest:
        return
    assert data.startswith(sent)


@given(st.lists(st.sampled_from([GET, POST, CHUNKED, ABSOLUTE]), max_size=6), st.data())
def test_pieces_make_no_difference(parts: list[bytes], data: st.DataObject) -> None:
    whole = b"".join(parts)
    assert read(whole, data.draw(st.integers(1, 60))) == read(whole)
