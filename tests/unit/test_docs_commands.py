"""Every command line of the documentation is one: its verb, options and arguments are known."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from insula.cli.main import find
from insula.cli.options import UsageError, parse, split_global

ROOT = Path(__file__).parents[2]
FILES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
FENCE = re.compile(r"^```(?:sh|console|bash)\n(.*?)^```", re.M | re.S)
COMMAND = re.compile(r"(?:^|[;|&(`\"]|&& |\bdo |[#$] |sudo |[A-Z_]+=\S+ |time )\s*(insula (?!=).*)")
SHELL = re.compile(r"(?<![\w$]);|\||&&|\)(?=\s|$|\")|\s2?>|\s<|`")


def commands(text: str) -> Iterator[str]:
    """The command lines in blocks of shell, each without what the shell makes of it."""
    for block in FENCE.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            plain = re.sub(r"\$\([^)]*\)", "X", line)
            plain = re.sub(r"(?:^|(?<=\s))#\s(?!insula).*", "", plain)
            for found in COMMAND.finditer(plain):
                yield SHELL.split(re.sub(r"\s#\s.*", "", found[1]))[0].strip()


def known(command: str) -> None:
    """Raise UsageError for one that the command line would refuse."""
    given, rest = split_global(shlex.split(command)[1:])
    if rest and not given.help and rest[0] not in ("help", "version"):
        name, verb, words = find(rest)
        if verb is not None:
            parse(verb, name, words, given)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_it_is_known(file: Path) -> None:
    wrong = []
    for command in commands(file.read_text()):
        if "…" in command or "..." in command:
            continue
        try:
            known(command)
        except UsageError as error:
            wrong.append(f"{command}: {error.message}")
        except ValueError as error:  # a quote that ends in another line
            wrong.append(f"{command}: {error}")
    assert wrong == []


def test_most_are_looked_at() -> None:
    """The controls: so many are found, and a wrong one is noticed."""
    found = [command for file in FILES for command in commands(file.read_text())]
    assert len(found) > 80 and "insula -T acme user bind ann member" in found
    for wrong in ("insula rnu busybox", "insula ps --no-such", "insula user bind ann", "insula token create ann"):
        with pytest.raises(UsageError):
            known(wrong)
