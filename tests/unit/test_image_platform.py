"""Choice of the image of an index that suits this machine's processor."""

from __future__ import annotations

import subprocess

import pytest

from insula.image import manifest, platform
from insula.image.manifest import Descriptor, Platform

V2 = {"cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3"}
V3 = V2 | {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"}
V4 = V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}


@pytest.mark.parametrize(("flags", "level"), [(set(), 1), (V2, 2), (V3, 3), (V4, 4), (V4 - {"ssse3"}, 1)])
def test_levels(flags: set[str], level: int) -> None:
    assert platform.level_of(flags | {"fpu", "sse2"}) == level
    for flag in flags & V2:
        assert platform.level_of(flags - {flag}) == 1


def test_this_machines_level_is_what_the_c_library_finds() -> None:
    """ld.so(8) lists the levels that it looks for libraries of."""
    said = subprocess.run(["/lib64/ld-linux-x86-64.so.2", "--help"], capture_output=True, text=True).stdout
    supported = [int(line.split()[0][-1]) for line in said.splitlines() if "x86-64-v" in line and "supported" in line]
    if not supported:
        pytest.skip("this machine's ld.so lists no levels")
    assert platform.level() == max(supported)


def choose(monkeypatch: pytest.MonkeyPatch, level: int, *variants: str | None) -> list[str | None]:
    """The variants that suit a processor of this level, the best first."""
    monkeypatch.setattr(platform, "level", lambda: level)
    monkeypatch.setattr(manifest, "architecture", lambda: "amd64")
    entries = [
        Descriptor(media_type="", digest="", size=0, platform=Platform(os="linux", architecture="amd64", variant=each))
        for each in variants
    ]
    fitting = [entry for entry in manifest.by_preference(entries) if manifest.matches(entry.platform)]
    return [entry.platform.variant for entry in fitting if entry.platform]


def test_the_best_that_the_processor_can_run_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    everything = ("v1", None, "v4", "v2", "v3", "odd")
    assert choose(monkeypatch, 4, *everything)[0] == "v4"
    assert choose(monkeypatch, 3, *everything) == ["v3", "v2", "v1", None, "odd"]
    assert choose(monkeypatch, 1, *everything) == ["v1", None, "odd"]
    assert choose(monkeypatch, 2, "v3", "v4") == []
    assert choose(monkeypatch, 2, None, "v3") == [None]
