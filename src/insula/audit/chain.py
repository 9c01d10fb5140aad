"""The chain: how a line is sealed, and how a sealed line is taken apart.

A sealed line is the JSON object of an entry with three more members at its end, in this order, and a newline:

    {"time":"…","verb":"…","seq":17,"prev":"SHA-256","mac":"HMAC-SHA-256"}

`prev` is the hash of all bytes from the start of the line with the number before to the start of this one, as they are
in the file. Those are that line, and also the remains of writes that a full disk or a kill has cut off. `mac` is of all
bytes of the line before ``,"mac"``. Both are over bytes as written: nothing is parsed and encoded again.

The key of line n + 1 is a hash of that of line n. Who finds the key of now can't compute that of an earlier line.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from typing import NamedTuple

NO_HASH = "0" * 64
_MAC = len(',"mac":"') + 64 + len('"}\n')
_PREV = len(',"prev":"') + 64 + len('"')
OVERHEAD = _MAC + _PREV + len(',"seq":') + 20
"""Bytes that sealing adds to an entry, at most."""
_SEQ = b',"seq":'
_HEX = re.compile(rb"[0-9a-f]{64}")
_HEAD = re.compile(r"([0-9]{1,19}):([0-9a-f]{64})")


class ChainHead(NamedTuple):
    """The last line of a chain: its number and its hash. As text ``17:HASH``."""

    seq: int
    hash: str

    def __str__(self) -> str:
        return f"{self.seq}:{self.hash}"


def parse_head(text: str) -> ChainHead:
    """Parse ``17:HASH``. ValueError."""
    match = _HEAD.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text.strip()[:80]!r} is no head: a number, a colon, 64 hexadecimal digits")
    return ChainHead(int(match[1]), match[2])


def hash_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def evolve(key: bytes, times: int = 1) -> bytes:
    """Return the key `times` lines later."""
    for _ in range(times):
        key = hashlib.sha256(b"insula audit key\n" + key).digest()
    return key


def mac_of(key: bytes, body: bytes) -> str:
    return hmac.new(key, body, hashlib.sha256).hexdigest()  # hmac.digest gives up the interpreter's lock each time


class Chain(NamedTuple):
    """Where a chain stands: its last line, what the next `prev` is, and the key of the next line.

    `prev` differs from the hash of the last line only if remains of a write follow that line.
    """

    head: ChainHead
    prev: str
    key: bytes

    def seal(self, entry: bytes) -> tuple[bytes, Chain]:
        """Seal a JSON object that has members; returns the line, and the chain after it."""
        seq = self.head.seq + 1
        body = b'%b,"seq":%d,"prev":"%b"' % (entry[:-1], seq, self.prev.encode())
        line = b'%b,"mac":"%b"}\n' % (body, mac_of(self.key, body).encode())
        digest = hash_of(line)
        return line, Chain(ChainHead(seq, digest), digest, evolve(self.key))


def begin(key: bytes | None = None) -> Chain:
    """Return a chain without lines; without `key` with one that nobody knows."""
    return Chain(ChainHead(0, NO_HASH), NO_HASH, key or os.urandom(32))


class SealedLine(NamedTuple):
    """The parts of a sealed line. `body` is what `mac` is of."""

    seq: int
    prev: str
    mac: str
    body: bytes


def parse(line: bytes) -> SealedLine | None:
    """Take a line apart; None if it is not a sealed one."""
    body, mac = line[:-_MAC], line[-_MAC:]
    if not (body.startswith(b"{") and mac.startswith(b',"mac":"') and mac.endswith(b'"}\n')):
        return None
    prev = body[-_PREV:]
    start = body.rfind(_SEQ, 0, -_PREV)
    digits = body[start + len(_SEQ) : -_PREV]
    if start < 0 or not (digits.isdigit() and len(digits) < 20 and prev.startswith(b',"prev":"')):
        return None
    if not (_HEX.fullmatch(mac, 8, 72) and _HEX.fullmatch(prev, 9, 73)):
        return None
    return SealedLine(int(digits), prev[9:73].decode(), mac[8:72].decode(), body)
