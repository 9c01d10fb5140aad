"""Verification: which lines of a log were changed, are missing, stand twice or elsewhere.

It takes the bytes of the files, oldest first, and what somebody has kept elsewhere: heads and keys. Without a head the
end of the log can't be known. Without a key only hashes are compared, which whoever changes all later lines can
compute. So a result says what it was able to check.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from insula.audit.chain import NO_HASH, ChainHead, SealedLine, evolve, mac_of, parse
from insula.audit.files import open_all
from insula.audit.keys import VerificationKey

_MOST = 100  # findings that are kept
_FARTHEST = 20_000_000  # lines between that of a given key and the first one
_GAP = 100_000  # missing lines over which a key is computed
_GAPS = 20_000_000  # the same, of all gaps together


class Finding(NamedTuple):
    """What is wrong at a line. `where` is the file and the number of the line in it."""

    seq: int
    where: str
    what: str

    def __str__(self) -> str:
        return f"line {self.seq} ({self.where}): {self.what}"


class Result(NamedTuple):
    """`lines` were read, from `first` to `last`; of `sealed` the HMAC was checked by a key, and `heads` of those that
    were given are lines that are there. `findings` has at most 100 of the `wrong` ones. `notes` are no faults."""

    lines: int
    first: int
    last: ChainHead
    sealed: int
    heads: int
    wrong: int
    findings: list[Finding]
    notes: list[str]


class Verification:
    """A verification in progress: `line` for each line in order, then `end`."""

    def __init__(self, heads: Iterable[ChainHead] = (), keys: Iterable[VerificationKey] = ()) -> None:
        self._heads: dict[int, set[str]] = {}
        for head in heads:
            self._heads.setdefault(head.seq, set()).add(head.hash)
        self._given = sorted(keys)
        self._keys = list(self._given)
        self._key: tuple[int, bytes] | None = None  # a line, and its key
        self._steps = _FARTHEST + _GAPS
        self._first: int | None = None
        self._last = ChainHead(0, NO_HASH)
        self._where = "the beginning"
        self._chunk = hashlib.sha256()  # since the start of the last line
        self._loose = 0  # bytes after the last line that are no lines
        self._loose_lines = 0
        self._before = 0
        self._upgraded = False
        self._cut = 0
        self._lines = self._sealed = self._matched = self._wrong = 0
        self._findings: list[Finding] = []
        self._notes: list[str] = []

    def line(self, raw: bytes, where: str) -> None:
        """Check the next line, as it is in the file, with its newline."""
        sealed = parse(raw)
        if sealed is None:
            self._unsealed(raw)
            return
        self._lines += 1
        chunk = hashlib.sha256(raw)
        digest = chunk.hexdigest()
        if self._is_next(sealed, where):
            self._chunk, self._loose, self._loose_lines = chunk, 0, 0
            self._last, self._where = ChainHead(sealed.seq, digest), where
            if sealed.seq in self._heads:
                self._check_head(sealed.seq, digest, where)
        if self._keys or self._key:
            self._check_mac(sealed, where)
        if b'"chain":"' in sealed.body:
            self._record(sealed, raw, where)

    def _unsealed(self, raw: bytes) -> None:
        if self._first is None:
            self._before += 1
            return
        self._chunk.update(raw)
        self._loose += len(raw)
        self._loose_lines += raw.endswith(b"\n")

    def _is_next(self, line: SealedLine, where: str) -> bool:
        """Compare number and hash with the line before; returns whether the line stands after it."""
        last = self._last.seq
        if self._first is None:
            self._first = line.seq
            if line.seq == 1 and line.prev != NO_HASH:
                self._find(1, where, "it says that there are lines before it")
            return True
        if line.seq <= last:
            self._find(line.seq, where, f"it stands after line {last}: it was moved, or stands twice")
            return False
        if line.seq > last + 1:
            self._find(last + 1, where, f"lines {last + 1} to {line.seq - 1} are missing before line {line.seq}")
        elif line.prev != self._chunk.hexdigest():
            self._find(last, self._where, f"it was changed, or what follows it: line {line.seq} has another hash of it")
        return True

    def _check_head(self, seq: int, digest: str, where: str) -> None:
        wrong = self._heads.pop(seq) - {digest}
        if wrong:
            self._find(seq, where, "it is another line than the head that was kept of it")
        else:
            self._matched += 1

    def _check_mac(self, line: SealedLine, where: str) -> None:
        while self._keys and self._keys[0].seq <= line.seq:
            self._key = self._keys.pop(0)
        if self._key is None:
            return
        at, key = self._key
        steps = line.seq - at
        if not 0 <= steps <= (_GAP if self._sealed else _FARTHEST) or steps > self._steps:  # which was found already
            return
        key = evolve(key, steps)
        matches = mac_of(key, line.body) == line.mac
        if matches or steps <= 1:
            self._key = line.seq, key
        else:
            self._steps -= steps  # somebody may have made up its number
        if matches:
            self._sealed += 1
        else:
            self._find(line.seq, where, "its HMAC is not that of the key: it was changed, or sealed with another key")

    def _record(self, line: SealedLine, raw: bytes, where: str) -> None:
        """Take what a record of the chain itself says."""
        with contextlib.suppress(ValueError, AttributeError):
            entry: dict[str, Any] = json.loads(raw)
            kind = entry.get("chain")
            for name in ("through", "cut"):
                if kind in ("cut", "file") and isinstance(entry.get(name), int):
                    self._cut = max(self._cut, entry[name])
            self._upgraded |= kind == "begin"
            if kind == "gap":
                self._notes.append(f"at its start insulad found {entry.get('after')} lines of {entry.get('through')}")
            if kind == "key":
                self._new_key(line.seq, entry, where)

    def _new_key(self, seq: int, entry: dict[str, Any], where: str) -> None:
        if any(key.seq == seq + 1 and key.fingerprint == entry.get("fingerprint") for key in self._given):
            return
        why = entry.get("why") or f"with the fingerprint {entry.get('fingerprint')}, made by {entry.get('user')}"
        if self._key is not None:
            self._find(seq + 1, where, f"another key begins here that was not given: {why}")
            self._key = None
        else:
            self._notes.append(f"a key begins at line {seq + 1}: {why}")

    def _find(self, seq: int, where: str, what: str) -> None:
        self._wrong += 1
        if len(self._findings) < _MOST:
            self._findings.append(Finding(seq, where, what))

    def end(self) -> Result:
        """Return the result, after the last line."""
        first, last = self._first or 0, self._last.seq
        if first > self._cut + 1:
            self._find(
                self._cut + 1, "the beginning", f"lines {self._cut + 1} to {first - 1} are missing at the beginning"
            )
        if self._before:
            what = f"{self._before} lines before line {first} are not sealed"
            if first == 1 and self._upgraded:
                self._notes.append(f"{what}: the log had them before its chain began")
            else:
                self._find(first, "the beginning", what)
        missing = max((seq for seq in self._heads if seq > last), default=None)
        if missing is not None:
            self._find(last + 1, "the end", f"lines {last + 1} to {missing} are missing at the end")
        unseen = sum(len(each) for seq, each in self._heads.items() if seq < first)
        if unseen:
            self._notes.append(f"{unseen} heads are of lines that retention has removed")
        if self._loose_lines:
            self._find(last, self._where, f"{self._loose_lines} lines after it are not sealed")
        elif self._loose:
            self._notes.append(f"the last {self._loose} bytes are a line that was not finished")
        return Result(
            self._lines, first, self._last, self._sealed, self._matched, self._wrong, self._findings, self._notes
        )


def verify(
    lines: Iterable[tuple[str, bytes]], heads: Iterable[ChainHead] = (), keys: Iterable[VerificationKey] = ()
) -> Result:
    """Verify lines, each with where it stands."""
    verification = Verification(heads, keys)
    for where, raw in lines:
        verification.line(raw, where)
    return verification.end()


def lines_of_files(path: Path, most: int = 1000) -> Iterator[tuple[str, bytes]]:
    """Yield the lines of a log and its rotated files, oldest first, each with its file and number."""
    with contextlib.ExitStack() as stack:
        for file in reversed(open_all(path, most, stack)):
            for number, raw in enumerate(file, 1):
                yield f"{Path(f'/proc/self/fd/{file.fileno()}').readlink().name}:{number}", raw


def lines_of_pieces(pieces: Iterable[bytes]) -> Iterator[tuple[str, bytes]]:
    """Yield the lines in the pieces of a stream, each with its number."""
    rest, number = b"", 0
    for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for raw in lines:
            number += 1
            yield f"line {number} of the log", raw + b"\n"
    if rest:
        yield f"line {number + 1} of the log", rest


def describe(result: Result, heads: Sequence[ChainHead], keys: Sequence[VerificationKey]) -> list[str]:
    """Return what was checked, and what was found, in lines for people."""
    found = [str(each) for each in result.findings]
    if result.wrong > len(found):
        found.append(f"and {result.wrong - len(found)} more")
    of_heads = f"{result.heads} of {len(heads)} heads" if heads else "no head, so that its end is not known"
    of_keys = f"{result.sealed} by key" if keys else "none by key"
    checked = f"{result.lines} lines, {result.first} to {result.last.seq}: checked by {of_heads}; {of_keys}"
    return [*found, *(f"note: {note}" for note in result.notes), checked]
