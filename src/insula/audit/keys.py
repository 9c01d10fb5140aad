"""The key of the next line, in a file; and verification keys, which are shown once.

The file has one record of fixed size, which is overwritten in place, so that the earlier key is gone from it: number
and hash of the last line, the key, a checksum. It is written after the lines that it is about are on the disk: after a
crash it may be behind the log by a second, never ahead. A file system that keeps old blocks (snapshots, log-structured
ones) may keep old keys: the state directory of insulad belongs on none that others can read.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import NamedTuple

from insula.audit.chain import Chain, ChainHead

_RECORD = re.compile(rb"([0-9]{20}) ([0-9a-f]{64}) ([0-9a-f]{64}) ([0-9a-f]{16})\n")
_SIZE = 168
_TEXT = re.compile(r"insula-audit-key:([0-9]{1,19}):([0-9a-f]{64})")
_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NOCTTY


class KeyFile:
    """The file. Without a path nothing is kept: then each start begins with a key that nobody knows."""

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def load(self) -> Chain | None:
        """Return where the chain stood; None if the file is damaged. OSError."""
        if self.path is None:
            return None
        fd = os.open(self.path, os.O_RDONLY | _FLAGS)
        try:
            match = _RECORD.fullmatch(os.pread(fd, _SIZE + 1, 0))
        finally:
            os.close(fd)
        if match is None or _checksum(match[0][:150]) != match[4]:
            return None
        digest = match[2].decode()
        return Chain(ChainHead(int(match[1]), digest), digest, bytes.fromhex(match[3].decode()))

    def save(self, chain: Chain) -> None:
        """Replace the record, durably. OSError."""
        if self.path is None:
            return
        text = b"%020d %b %b" % (chain.head.seq, chain.head.hash.encode(), chain.key.hex().encode())
        record = b"%b %b\n" % (text, _checksum(text))
        if self.path.exists():
            _write(self.path, record)
        else:  # on a full disk there is no file then, and not an empty one
            _write(draft := self.path.with_name(f"{self.path.name}.new"), record, os.O_CREAT)
            draft.rename(self.path)


def _write(path: Path, record: bytes, flags: int = 0) -> None:
    fd = os.open(path, os.O_WRONLY | flags | _FLAGS, 0o600)
    try:
        os.pwrite(fd, record, 0)
        os.fdatasync(fd)
    finally:
        os.close(fd)


def _checksum(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest()[:16].encode()


class VerificationKey(NamedTuple):
    """The key of line `seq`; those of later lines follow from it. As text ``insula-audit-key:SEQ:HEX``."""

    seq: int
    key: bytes

    def __str__(self) -> str:
        return f"insula-audit-key:{self.seq}:{self.key.hex()}"

    @property
    def fingerprint(self) -> str:
        """A hash of the key, which the log has where the key begins."""
        return hashlib.sha256(b"insula audit fingerprint\n" + self.key).hexdigest()[:16]


def parse_keys(text: str) -> list[VerificationKey]:
    """Return the keys in the lines of a text, without empty lines and comments (#). ValueError for another line."""
    found = []
    for line in filter(None, (line.partition("#")[0].strip() for line in text.splitlines())):
        match = _TEXT.fullmatch(line)
        if match is None:
            raise ValueError("it has a line that is no key, as in insula-audit-key:1:…")
        found.append(VerificationKey(int(match[1]), bytes.fromhex(match[2])))
    return sorted(found)
