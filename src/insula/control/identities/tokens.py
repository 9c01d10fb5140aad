"""Bearer tokens (RFC 6750): their text, and its check.

    insula_4f1c09d2a7b85e36_9fGq…43 characters…Xw_1c0a2b3f
    prefix  ID, 16 hex       secret, 256 bits        CRC-32 of what is before it

The prefix and the checksum are for programs that search files for secrets that leaked, and for typing mistakes, which
are refused without a look-up. The ID is no secret. The secret is random, so that one SHA-256 of it is enough in the
store: there is nothing to guess, which slow hashes such as scrypt are for.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import zlib
from typing import NamedTuple

PREFIX = "insula"
PATTERN = r"insula_[0-9a-f]{16}_[A-Za-z0-9_-]{43}_[0-9a-f]{8}"
"""What a token looks like, for programs that search for secrets."""
_TOKEN = re.compile(rf"{PREFIX}_(?P<id>[0-9a-f]{{16}})_(?P<secret>[A-Za-z0-9_-]{{43}})_(?P<check>[0-9a-f]{{8}})")
_NOBODY = hashlib.sha256(secrets.token_bytes(32)).hexdigest()


class Parsed(NamedTuple):
    """The parts of a token: its ID, and the digest of its secret as it is stored."""

    id: str
    digest: str


def generate() -> tuple[str, Parsed]:
    """Make a new token; returns its text, which is not stored anywhere, and its parts."""
    token_id, secret = secrets.token_hex(8), secrets.token_urlsafe(32)
    body = f"{PREFIX}_{token_id}_{secret}"
    return f"{body}_{_checksum(body)}", Parsed(token_id, _digest(secret))


def parse(text: str) -> Parsed | None:
    """Return the parts of a token; None if it is malformed, or its checksum is wrong."""
    match = _TOKEN.fullmatch(text) if len(text) < 128 else None
    if match is None or not hmac.compare_digest(_checksum(text.rpartition("_")[0]), match["check"]):
        return None
    return Parsed(match["id"], _digest(match["secret"]))


def matches(given: Parsed, stored_digest: str | None) -> bool:
    """Whether the secret is the stored one. None, an unknown token, takes as long as a wrong secret."""
    return hmac.compare_digest(given.digest, stored_digest or _NOBODY) and stored_digest is not None


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _checksum(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"
