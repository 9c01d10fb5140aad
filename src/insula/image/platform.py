"""What this machine runs: its architecture by the image-spec's names, and on amd64 the level of its processor.

The levels of x86-64 (psABI, "Micro-Architecture Levels") are variants of amd64: v1, which every processor has, to v4.
An image for a level may have instructions that a processor of a lower level doesn't have.
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
# by level, what /proc/cpuinfo must list among its flags beside those of the level below
_LEVELS = {
    2: {"cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3"},
    3: {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"},
    4: {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
}


def architecture() -> str:
    """This machine's architecture by its name in Go, which the image-spec uses."""
    machine = os.uname().machine
    return _ARCHITECTURES.get(machine, machine)


def level_of(flags: set[str]) -> int:
    """The level of an x86-64 processor with these flags of /proc/cpuinfo, 1 to 4."""
    level = 1
    while _LEVELS.get(level + 1, {""}) <= flags:
        level += 1
    return level


@cache
def level() -> int:
    """The level of this machine's processor; 1 where it is no x86-64."""
    if architecture() != "amd64":
        return 1
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "flags":
            return level_of(set(value.split()))
    return 1


def fitness(variant: str | None) -> int | None:
    """How well amd64's `variant` suits this machine, more is better; None if it can't run here."""
    if not variant:
        return 1
    number = variant.removeprefix("v")
    if not (number.isascii() and number.isdigit() and len(number) == 1):
        return 0  # nobody knows it: only if there is nothing else
    return int(number) if int(number) <= level() else None
