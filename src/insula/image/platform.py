"""The platform of this machine: its architecture in the image-spec's terms, and on amd64 the level of its processor.

The levels of x86-64 (psABI, "Micro-Architecture Levels") are the variants v1 to v4 of amd64; every processor has v1. An
image for a level may have instructions that processors of lower levels lack.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

_ARCHITECTURES = {
    "x86_64": "amd64",
    "aarch64": "arm64",
    "armv7l": "arm",
    "armv6l": "arm",
    "i686": "386",
    "ppc64le": "ppc64le",
    "s390x": "s390x",
    "riscv64": "riscv64",
}
# the flags of /proc/cpuinfo that each level adds to the level below
_LEVELS = {
    2: {"cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3"},
    3: {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"},
    4: {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
}


def architecture() -> str:
    """Return this machine's architecture by its name in Go, which the image-spec uses."""
    machine = os.uname().machine
    return _ARCHITECTURES.get(machine, machine)


def level_of(flags: set[str]) -> int:
    """Return the level, 1 to 4, of an x86-64 processor with these flags of /proc/cpuinfo."""
    level = 1
    while _LEVELS.get(level + 1, {""}) <= flags:
        level += 1
    return level


@cache
def level() -> int:
    """Return the level of this machine's processor; 1 if it is not x86-64."""
    if architecture() != "amd64":
        return 1
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "flags":
            return level_of(set(value.split()))
    return 1


def fitness(variant: str | None) -> int | None:
    """Rate amd64's `variant` for this machine, higher is better; None if it can't run here."""
    if not variant:
        return 1
    number = variant.removeprefix("v")
    if not (number.isascii() and number.isdigit() and len(number) == 1):
        return 0  # unknown: the last choice
    return int(number) if int(number) <= level() else None
