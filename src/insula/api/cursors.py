"""Cursors: sealed marks of a place in a list or in the events, which clients pass back unchanged.

A cursor is encrypted and authenticated, so that nobody can read or make one, and belongs to one principal and one
list: the same text from somebody else, or for another list, is refused. The nonce is a MAC of the text (a synthetic
initialization vector, as in RFC 5297), so that the same place has always the same cursor.
"""

from __future__ import annotations

import hmac
import os
from base64 import urlsafe_b64decode, urlsafe_b64encode
from hashlib import sha256, shake_256
from pathlib import Path

from insula.control.identities.authority import Authority
from insula.model.errors import Invalid

_TAG = 16
_KEY = 32
MAX_CURSOR = 2048
"""Characters: the longest names are those of groups, of 273 characters, and each may be four bytes of UTF-8."""
PATTERN = "^[A-Za-z0-9_-]+$"


def context_of(sender: Authority, *parts: str) -> str:
    """Return the context of the cursors of a principal in a list, which the other parts name."""
    return "\n".join([sender.principal.id if sender.principal else sender.proof, *parts])


class Cursors:
    """Seals and opens cursors with a key of this host."""

    def __init__(self, key: bytes) -> None:
        self._tag_key = sha256(b"tag" + key).digest()
        self._stream_key = sha256(b"stream" + key).digest()

    def seal(self, text: str, context: str) -> str:
        """Return the cursor for `text`; it can be opened with the same context only."""
        plain = text.encode()
        tag = self._tag(plain, context)
        return urlsafe_b64encode(tag + self._mixed(plain, tag)).decode().rstrip("=")

    def open(self, cursor: str, context: str) -> str:
        """Return the text of a cursor. Invalid if it was not made by this host for this context."""
        try:
            data = urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4))
            tag, plain = data[:_TAG], self._mixed(data[_TAG:], data[:_TAG])
            if len(cursor) <= MAX_CURSOR and hmac.compare_digest(tag, self._tag(plain, context)):
                return plain.decode()
        except ValueError:
            pass
        raise Invalid("the cursor is not one of this list", "take it from the answer before, or begin without one")

    def _tag(self, plain: bytes, context: str) -> bytes:
        whole = len(context).to_bytes(4, "big") + context.encode("utf-8", "surrogatepass") + plain
        return hmac.digest(self._tag_key, whole, "sha256")[:_TAG]

    def _mixed(self, data: bytes, tag: bytes) -> bytes:
        stream = shake_256(self._stream_key + tag).digest(len(data))
        return bytes(a ^ b for a, b in zip(data, stream, strict=True))


def load(path: Path) -> Cursors:
    """Return the cursors of the key in a file, which is made if it is missing: they are valid over restarts."""
    try:
        key = path.read_bytes()
    except FileNotFoundError:
        key = b""
    if len(key) != _KEY:
        key = os.urandom(_KEY)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(key)
    return Cursors(key)
