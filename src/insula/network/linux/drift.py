"""Differences of the installed tables from the rules that they should have."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import SequenceMatcher

from insula.kernel.nftables import Nft
from insula.network.linux.rules import as_listed


def rule_drift(nft: Nft, table: str, families: tuple[str, ...], wanted: str) -> Iterator[str]:
    """Return missing and added lines of our tables. Other tables are ignored."""
    reference = as_listed(wanted, table)
    for family in families:
        was = [line.strip() for line in reference[family].splitlines()]
        now = [line.strip() for line in nft.rules(family, table).splitlines()]
        # by default lines that are frequent in a long text, as "}" is, are not compared
        for _, i, j, k, m in SequenceMatcher(None, was, now, autojunk=False).get_opcodes():
            if was[i:j] != now[k:m]:
                yield from (f"rule missing in {family} {table}: {line}" for line in was[i:j])
                yield from (f"rule added in {family} {table}: {line}" for line in now[k:m])
