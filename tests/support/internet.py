"""An internet in a network namespace: a name server, and servers of TLS, HTTP and anything else.

`World` is a client, a router with the rules of egress by name, and the internet beyond, each a namespace of its own:
what `insula.network.names` needs of a tenant's network, and no more. The addresses are public ones, because names may
not lead to others.
"""

from __future__ import annotations

import datetime
import functools
import os
import select
import socket
import ssl
import struct
import threading
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from insula.kernel.netns import call_in
from insula.network.names import edns, wire
from insula.network.names.wire import Message, Question, Record

DNS4, DNS6 = "9.9.9.9", "2620:fe::fe"
Answer = Callable[[Question], Message | None]


def family_of(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def address_record(name: str, address: str, ttl: int = 60) -> Record:
    packed = ip_address(address).packed
    return Record(wire.name_of(name), wire.A if len(packed) == 4 else wire.AAAA, wire.IN, ttl, packed)


def alias_record(name: str, target: str, ttl: int = 60) -> Record:
    return Record(wire.name_of(name), wire.CNAME, wire.IN, ttl, wire.name_of(target))


class NameServer:
    """A name server in a namespace. `records` are what it answers with; `asked` has the names of all its questions.

    `change` may change an answer, or return bytes instead of it, or None for no answer; it gets whether TCP was used.
    """

    def __init__(self, netns: int, addresses: tuple[str, ...] = (DNS4, DNS6), port: int = 53) -> None:
        self.records: list[Record] = []
        self.asked: list[tuple[str, int]] = []
        self.change: Callable[[Message, Message, bool], Message | bytes | None] = lambda query, answer, tcp: answer
        self.udp_limit = 512
        for address in addresses:
            for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
                sock = call_in(netns, functools.partial(socket.socket, family_of(address), kind))
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.bind((address, port))
                serve = self._datagrams if kind == socket.SOCK_DGRAM else self._streams
                threading.Thread(target=serve, args=(sock,), daemon=True).start()

    def names(self, name: str, *addresses: str, ttl: int = 60) -> None:
        """Have a name lead to addresses."""
        self.records += [address_record(name, address, ttl) for address in addresses]

    def _answer(self, data: bytes, tcp: bool) -> bytes | None:
        query = wire.parse(data)
        [question] = query.questions
        self.asked.append((wire.text_of(question.name), question.type))
        answer = Message(query.id, wire.RESPONSE | wire.RECURSION_AVAILABLE, [question])
        name, seen = question.name.lower(), set[bytes]()
        while name not in seen:
            seen.add(name)
            alias = [each for each in self.records if each.name == name and each.type == wire.CNAME]
            answer.answers += alias[:1]
            answer.answers += [each for each in self.records if each.name == name and each.type == question.type]
            name = alias[0].data if alias else name
        if not answer.answers and not any(each.name == question.name.lower() for each in self.records):
            answer.flags |= wire.NXDOMAIN
        changed = self.change(query, answer, tcp)
        if changed is None or isinstance(changed, bytes):
            return changed
        size = edns.edns_of(query)
        return wire.compose(changed, 65535 if tcp else size.size if size else 512)

    def _datagrams(self, sock: socket.socket) -> None:
        while True:
            data, peer = sock.recvfrom(4096)
            if (answer := self._answer(data, False)) is not None:
                sock.sendto(answer, peer)

    def _streams(self, listener: socket.socket) -> None:
        listener.listen(64)
        while True:
            sock, _ = listener.accept()
            with sock, sock.makefile("rb") as incoming:
                length = incoming.read(2)
                answer = self._answer(incoming.read(int.from_bytes(length, "big")), True) if len(length) == 2 else None
                if answer is not None:
                    sock.sendall(struct.pack("!H", len(answer)) + answer)


def certificate(directory: Path, *names: str) -> tuple[str, str]:
    """Make a certificate for these names; returns the paths of certificate and key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "internet")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(each) for each in names]), critical=False)
        .sign(key, hashes.SHA256())
    )
    paths = directory / "certificate.pem", directory / "key.pem"
    paths[0].write_bytes(made.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return str(paths[0]), str(paths[1])


class TcpServer:
    """A server in a namespace that calls `serve` with each connection, in a thread of its own."""

    def __init__(self, netns: int, address: str, port: int, serve: Callable[[socket.socket], None]) -> None:
        self.connections = 0
        listener = call_in(netns, lambda: socket.socket(family_of(address), socket.SOCK_STREAM))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen(512)

        def accept() -> None:
            while True:
                sock, _ = listener.accept()
                self.connections += 1
                threading.Thread(target=one, args=(sock,), daemon=True).start()

        def one(sock: socket.socket) -> None:
            with sock:
                try:
                    serve(sock)
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()


def echo(sock: socket.socket) -> None:
    """Send back what arrives, after a greeting that says which address was reached."""
    sock.sendall(f"{sock.getsockname()[0]}\n".encode())
    while data := sock.recv(65536):
        sock.sendall(data)


def tls_echo(paths: tuple[str, str]) -> Callable[[socket.socket], None]:
    """`echo` over TLS, which says the server name first."""

    def serve(sock: socket.socket) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*paths)
        names: list[str | None] = []
        context.sni_callback = lambda _sock, name, _context: names.append(name)
        with context.wrap_socket(sock, server_side=True) as wrapped:
            wrapped.sendall(f"{names[0]}\n".encode())
            while data := wrapped.recv(65536):
                wrapped.sendall(data)

    return serve


def http(sock: socket.socket) -> None:
    """Answer each request with its host and path; bodies with a length are read."""
    with sock.makefile("rb") as incoming:
        while line := incoming.readline():
            _, path, _ = line.split()
            fields = dict(
                field.rstrip(b"\r\n").lower().split(b": ", 1) for field in iter(incoming.readline, b"\r\n") if field
            )
            body = incoming.read(int(fields.get(b"content-length", b"0")))
            answer = fields.get(b"host", b"?") + b" " + path + b" " + body
            sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(answer) + answer)


def ask(
    netns: int, name: str, type_: int = wire.A, server: str = "10.0.0.1", *, timeout: float = 20.0, tcp: bool = False,
    source: str = "", **more: Any,
) -> Message | None:  # fmt: skip
    """Ask a name server from a namespace; None if it gives no answer in time. `more` is for `query_of`."""
    query = query_of(name, type_, **more)
    kind = socket.SOCK_STREAM if tcp else socket.SOCK_DGRAM
    with call_in(netns, lambda: socket.socket(family_of(server), kind)) as sock:
        sock.settimeout(timeout)
        try:
            sock.bind((source, 0))
            sock.connect((server, 53))
            if tcp:
                sock.sendall(struct.pack("!H", len(query)) + query)
                with sock.makefile("rb") as incoming:
                    data = incoming.read(int.from_bytes(incoming.read(2), "big"))
            else:
                sock.send(query)
                data = sock.recv(65535)
        except OSError:
            return None
    answer = wire.parse(data) if data else None
    assert answer is None or answer.id == int.from_bytes(query[:2], "big")
    return answer


def query_of(name: str, type_: int = wire.A, *, size: int | None = 1232, class_: int = wire.IN) -> bytes:
    """A query; `size` is that of EDNS, which is left out with None."""
    query = Message(int.from_bytes(os.urandom(2), "big"), wire.RECURSION_DESIRED)
    query.questions = [Question(wire.name_of(name), type_, class_)]
    if size is not None:
        query.additionals = [edns.opt()._replace(class_=size)]
    return wire.compose(query)


def addresses_in(answer: Message | None) -> list[str]:
    """The addresses in an answer, and none if there is no answer."""
    if answer is None:
        return []
    return [str(ip_address(each.data)) for each in answer.answers if each.type in (wire.A, wire.AAAA)]


def greeting(netns: int, address: str, port: int, timeout: float = 3.0, source: str = "") -> str | None:
    """The first line of a server; None if there is no connection, or it is reset or silent."""
    with call_in(netns, lambda: socket.socket(family_of(address), socket.SOCK_STREAM)) as sock:
        sock.settimeout(timeout)
        try:
            sock.bind((source, 0))
            sock.connect((address, port))
            return sock.recv(200).decode().rstrip("\n") or None
        except OSError:
            return None


def tls_greeting(netns: int, address: str, name: str | None, port: int = 443, timeout: float = 5.0) -> str | None:
    """The first line of a server of TLS that was asked for by a name; None if there is no connection."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with call_in(netns, lambda: socket.socket(family_of(address), socket.SOCK_STREAM)) as sock:
        sock.settimeout(timeout)
        try:
            sock.connect((address, port))
            with context.wrap_socket(sock, server_hostname=name) as wrapped:
                return wrapped.recv(200).decode().rstrip("\n")
        except OSError:
            return None


def readable(sock: socket.socket, timeout: float) -> bool:
    return bool(select.select([sock], [], [], timeout)[0])
