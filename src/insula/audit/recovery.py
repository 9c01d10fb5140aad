"""Where the chain goes on after a start, and what the end of insulad has left unfinished.

Three sources say where the chain stood: the last line in the files, the file of the key, and the head that the store
has. Usually the files are the furthest, because the other two follow within a second. If they are behind, lines are
missing: the chain goes on with the number after the missing ones and a record of it, so that verification finds them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from insula.audit.chain import Chain, ChainHead, begin, evolve, hash_of, parse
from insula.audit.files import LONGEST_LINE, last_line, numbered, open_for_reading
from insula.audit.keys import KeyFile

_MOST = 10_000_000  # lines that the files may be ahead of the key
_SCANNED = 64 << 20  # bytes at the end of a file that are looked through
_ID = re.compile(rb'"id":"([0-9a-f]{16})"')
_ABOUT = ("id", "user", "verb", "tenant", "name")


class Recovered(NamedTuple):
    """`last` is the last line, if it is known, and `remains` what follows it; `records` are to be written first.

    `foreign`: the log has only lines that are not sealed, those of an Insula that did not seal, or of somebody else.
    """

    chain: Chain
    last: bytes | None
    remains: bytes
    records: list[dict[str, Any]]
    foreign: bool


def recover(path: Path, files: int, keys: KeyFile, stored: ChainHead | None) -> Recovered:
    """Return where the chain goes on. OSError."""
    try:
        saved = keys.load()
    except FileNotFoundError:
        saved = None
    line, rest, foreign = _end(path, files)
    records: list[dict[str, Any]] = []
    at = ChainHead(0, "")
    if line is not None:
        sealed = parse(line)
        assert sealed
        at = ChainHead(sealed.seq, hash_of(line))
    if saved is None:
        key = begin().key
        if at.seq or (stored and stored.seq):
            records.append({"chain": "key", "why": "the key of the chain was lost"})
    elif at.seq - saved.head.seq > _MOST:
        at, line, key = ChainHead(0, ""), None, saved.key
    else:
        key = evolve(saved.key, max(0, at.seq - saved.head.seq))
    known = max(filter(None, (saved and saved.head, stored)), default=at)
    if known.seq > at.seq:
        if saved and known.seq > saved.head.seq:
            key = evolve(saved.key, min(known.seq - saved.head.seq, _MOST))
        records.insert(0, {"chain": "gap", "after": at.seq, "through": known.seq})
        return Recovered(Chain(known, known.hash, key), None, b"", records, foreign)
    if line is None:
        if foreign:
            records.append({"chain": "begin", "after": "lines that are not sealed"})
        return Recovered(begin(key), b"", b"", records, foreign)
    return Recovered(Chain(at, at.hash, key), line, rest, records, False)


def _end(path: Path, files: int) -> tuple[bytes | None, bytes, bool]:
    """Return the last sealed line of all files, what follows it, and whether the log has other lines only."""
    rest, foreign = b"", False
    for number in range(files + 1):
        file = numbered(path, number)
        try:
            found = last_line(file)
            size = file.stat().st_size
        except OSError:  # not there, or not readable: the writer will say so
            continue
        if found:
            return found[0], found[1] + rest, foreign
        foreign |= number == 0 and size > 0
        if size <= LONGEST_LINE:
            rest = file.read_bytes() + rest
    return None, b"", foreign


class Unfinished(NamedTuple):
    """`open` are the begun requests that have not ended, by ID; `found` the wanted IDs that are in the log."""

    open: dict[str, dict[str, Any]]
    found: set[str]


def unfinished(path: Path, wanted: Collection[str] = ()) -> Unfinished:
    """Look through the log, and the file before it, for what the last insulad has left. Files that can't be read have
    nothing."""
    opened: dict[str, dict[str, Any]] = {}
    found: set[str] = set()
    names = set(wanted)
    for number in (1, 0):
        try:
            with open_for_reading(numbered(path, number)) as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - _SCANNED))
                for line in file:
                    if names and (match := _ID.search(line)) and match[1].decode() in names:
                        found.add(match[1].decode())
                    if b'"phase":"' in line or b'"chain":"file"' in line:
                        _follow(line, opened)
        except OSError:
            continue
    return Unfinished(opened, found)


def _follow(line: bytes, opened: dict[str, dict[str, Any]]) -> None:
    try:
        entry = json.loads(line)
        if entry.get("chain") == "file":
            opened.clear()
            opened.update({each["id"]: each for each in entry["open"]})
        elif entry.get("phase") == "begun":
            opened[entry["id"]] = about(entry)
        elif entry.get("phase") == "ended":
            opened.pop(entry["id"], None)
    except (ValueError, AttributeError, KeyError, TypeError):
        return


def about(entry: dict[str, Any]) -> dict[str, Any]:
    """Return what a record of the end of a request needs of that of its beginning."""
    return {name: entry.get(name) for name in _ABOUT}
