"""Lines, heads and the key of the audit log."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from insula.audit.chain import OVERHEAD, Chain, ChainHead, begin, parse, parse_head
from insula.audit.keys import KeyFile


@given(st.binary(max_size=300))
def test_what_is_no_line_is_none(data: bytes) -> None:
    assert parse(data) is None
    line, _ = begin().seal(b'{"a":1}')
    assert parse(line[:-1]) is None and parse(line + data) is None if data else parse(line)


@given(st.dictionaries(st.text(min_size=1), st.text() | st.integers(), min_size=1))
def test_sealing_adds_no_more_than_it_says(members: dict[str, Any]) -> None:
    data = json.dumps(members, separators=(",", ":")).encode()
    line, chain = begin().seal(data)
    assert len(line) <= len(data) + OVERHEAD
    sealed = parse(line)
    assert sealed and sealed.seq == 1 and chain.head.seq == 1
    assert {name: json.loads(line)[name] for name in members if name not in ("seq", "prev", "mac")} == {
        name: value for name, value in members.items() if name not in ("seq", "prev", "mac")
    }


@pytest.mark.parametrize("text", ["", "17", "17:", ":" + "0" * 64, "-1:" + "0" * 64, "17:" + "0" * 63, "١:" + "0" * 64])
def test_what_is_no_head(text: str) -> None:
    with pytest.raises(ValueError, match="is no head"):
        parse_head(text)
    assert parse_head("17:" + "0" * 64) == ChainHead(17, "0" * 64)


@pytest.mark.parametrize("there", [False, True])
def test_a_key_that_finds_no_room_leaves_the_file_as_it_was(tmp_path: Path, there: bool) -> None:
    """An empty one would be said to be damaged at the next start."""
    keys, first = KeyFile(tmp_path / "audit.key"), Chain(ChainHead(7, "a" * 64), "a" * 64, b"k" * 32)
    if there:
        keys.save(first)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limit[1]))  # write(2) fails with EFBIG
    try:
        with pytest.raises(OSError):
            keys.save(Chain(ChainHead(8, "b" * 64), "b" * 64, b"l" * 32))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert (keys.load() == first) if there else not (tmp_path / "audit.key").exists()
    keys.save(first)
    assert keys.load() == first
