"""Sources of base images (apt's own), and static busyboxes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from insula.image.builtin import Mirror, find_mirror, is_static
from insula.model.errors import NotFound

KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
DEB822 = f"""\
Types: deb
# a comment
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By: {KEYRING}

Types: deb
URIs: http://mirror.example/debian-security
Suites: bookworm-security
Components: main
"""
DISABLED = "Types: deb\nEnabled: no\nURIs: http://off.example/debian\nSuites: bookworm\nComponents: main\n\n"
ONE_LINE = f"""\
# deb http://old.example/debian bookworm main
deb-src http://source.example/debian bookworm main
deb [arch=amd64] https://packages.example/apt stable contrib
deb [arch=amd64 signed-by={KEYRING}] http://one.example/debian bookworm main non-free # comment
deb http://one.example/debian trixie main
"""


def write(directory: Path, *, list_: str = "", **parts: str) -> Path:
    (directory / "sources.list").write_text(list_)
    (directory / "sources.list.d").mkdir()
    for name, text in parts.items():
        (directory / "sources.list.d" / name.replace("_", ".")).write_text(text)
    return directory


@pytest.mark.parametrize(
    ("release", "files", "wanted"),
    [
        ("bookworm", {"debian_sources": DEB822}, Mirror("http://mirror.example/debian", ["main", "contrib"], KEYRING)),
        ("trixie", {"debian_sources": DEB822}, Mirror("http://mirror.example/debian", ["main", "contrib"], KEYRING)),
        (
            "bookworm",
            {"debian_sources": DISABLED, "list_": ONE_LINE},
            Mirror("http://one.example/debian", ["main", "non-free"], KEYRING),
        ),
        ("trixie", {"list_": ONE_LINE}, Mirror("http://one.example/debian", ["main"], "")),
        ("bookworm", {"own_list": ONE_LINE}, Mirror("http://one.example/debian", ["main", "non-free"], KEYRING)),
    ],
)
def test_the_mirror_is_the_hosts(release: str, files: dict[str, str], wanted: Mirror, tmp_path: Path) -> None:
    assert find_mirror(release, write(tmp_path, **files)) == wanted


@pytest.mark.parametrize("text", ["", "nonsense\n", DISABLED, "deb http://x.example/apt stable contrib\n"])
def test_a_host_without_a_mirror(text: str, tmp_path: Path) -> None:
    kind = {"a_sources": text} if text.startswith("Types") else {"list_": text}
    with pytest.raises(NotFound) as e:
        find_mirror("bookworm", write(tmp_path, **kind))
    assert e.value.hint


def test_static_programs_are_told_from_others() -> None:
    assert is_static(Path("/bin/busybox").read_bytes())
    assert not is_static(Path(sys.executable).resolve().read_bytes())
    assert not is_static(b"#!/bin/sh\n")
    assert not is_static(b"\x7fELF\x02\x01")
