"""Names of images: parsing and refusals."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from insula.image.reference import check_digest, normalise_reference, parse
from insula.model.errors import Invalid

DIGEST = "sha256:" + "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("text", "familiar", "locator"),
    [
        ("busybox", "busybox:latest", "docker.io/library/busybox:latest"),
        ("busybox:1.36", "busybox:1.36", "docker.io/library/busybox:1.36"),
        ("docker.io/library/busybox", "busybox:latest", "docker.io/library/busybox:latest"),
        ("index.docker.io/busybox", "busybox:latest", "docker.io/library/busybox:latest"),
        ("team/app", "team/app:latest", "docker.io/team/app:latest"),
        ("localhost/app", "localhost/app:latest", "localhost/app:latest"),
        ("127.0.0.1:5000/a/b:x", "127.0.0.1:5000/a/b:x", "127.0.0.1:5000/a/b:x"),
        ("[::1]:5000/a", "[::1]:5000/a:latest", "[::1]:5000/a:latest"),
        ("Registry.Example/a__b/c-d.e", "Registry.Example/a__b/c-d.e:latest", "Registry.Example/a__b/c-d.e:latest"),
        (f"busybox@{DIGEST}", f"busybox@{DIGEST}", f"docker.io/library/busybox@{DIGEST}"),
        (f"busybox:1@{DIGEST}", "busybox:1", f"docker.io/library/busybox@{DIGEST}"),
        ("a.b", "a.b:latest", "docker.io/library/a.b:latest"),
    ],
)
def test_names(text: str, familiar: str, locator: str) -> None:
    assert parse(text).familiar == familiar
    assert parse(text).locator == locator


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            " ",
            ":",
            "/",
            "a/",
            "/a",
            "a//b",
            "A",
            "a:",
            "a:b:c",
            "a:b/c d",
            "a@",
            "a@sha256:12",
            "-a",
            "a-",
            "a..b",
        ),
        *("a/../b", "../a", "a:.x", "a:" + "t" * 129, "x" * 256, "a\0", "a\n", "a b", "ä", "a@" + DIGEST.upper()),
        *("host:port/a", "host:123456/a", "-o.x/a", "docker://a", "--src.x/a", "a@sha512:" + "0" * 128),
    ],
)
def test_refused(text: str) -> None:
    with pytest.raises(Invalid) as e:
        parse(text)
    assert e.value.hint
    assert "\n" not in str(e.value)


@given(st.text(alphabet="abA01.:/@-_ []\0\nä", max_size=40) | st.text(max_size=300))
def test_parsing_is_stable_and_never_fails_otherwise(text: str) -> None:
    try:
        name = normalise_reference(text)
    except Invalid:
        return
    assert normalise_reference(name) == name
    assert parse(name).locator == parse(text).locator or "@" in text
    assert not name.startswith("-")


@pytest.mark.parametrize("text", [None, 1, "", DIGEST[:-1], DIGEST + "0", DIGEST + "\n", "../../../etc/passwd"])
def test_digests_are_strict(text: object) -> None:
    with pytest.raises(Invalid):
        check_digest(text)
    assert check_digest(DIGEST) == DIGEST
