"""The record at the start of each connection from the gate: who is at the other end.

    4 bytes    the length of the rest, big endian
    JSON       {"address": "192.0.2.7", "port": 50122, "tls": "TLSv1.3", "certificate": base64 of DER, or null}

insulad takes it only on the gate's own socket, and only from the user that the gate runs as (SO_PEERCRED). On every
other socket these bytes are a malformed HTTP request.
"""

from __future__ import annotations

import base64
import json
import struct

LENGTH = struct.Struct(">I")
LONGEST = 32 << 10
"""Bytes of a record: more than the largest certificate that a handshake takes."""


class ClientRecord:
    """The other end of a connection: its address, and the certificate that it has proven to hold, as DER."""

    def __init__(self, address: str, port: int, tls: str, certificate: bytes | None) -> None:
        self.address = address
        self.port = port
        self.tls = tls
        self.certificate = certificate

    def encode(self) -> bytes:
        certificate = base64.b64encode(self.certificate).decode() if self.certificate else None
        fields = {"address": self.address, "port": self.port, "tls": self.tls, "certificate": certificate}
        body = json.dumps(fields).encode()
        return LENGTH.pack(len(body)) + body


def split(data: bytes) -> tuple[ClientRecord, bytes] | None:
    """Return the record at the start of `data` and the bytes after it; None if it is not whole yet. ValueError."""
    if len(data) < LENGTH.size:
        return None
    (length,) = LENGTH.unpack_from(data)
    if length > LONGEST:
        raise ValueError(f"a record of {length} bytes")
    end = LENGTH.size + length
    if len(data) < end:
        return None
    fields = json.loads(data[LENGTH.size : end])
    certificate = base64.b64decode(fields["certificate"]) if fields["certificate"] else None
    return ClientRecord(str(fields["address"]), int(fields["port"]), str(fields["tls"]), certificate), data[end:]
