"""Pages and filters of lists, and the cursors that lead from one to the next."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from insula.api.cursors import MAX_CURSOR, PATTERN, Cursors, load
from insula.client.http import head
from insula.model import rules
from insula.model.errors import Invalid
from tests.unit.conftest import StubDaemon
from tests.unit.test_problems import Answered, ask, problem_of

CURSORS = Cursors(b"k" * 32)


def walk(stub: StubDaemon, target: str) -> Iterator[list[dict[str, Any]]]:
    """The pages of a list, by the links that the answers have."""
    while target:
        answer = ask(stub, head("GET", target))
        assert answer.status == 200, answer.body
        yield json.loads(answer.body)
        link = re.fullmatch(r'<(.*)>; rel="next"', answer.headers.get("link", ""))
        target = link[1] if link else ""


def names(page: list[dict[str, Any]]) -> list[str]:
    return [view["tenant"]["name"] for view in page]


@pytest.fixture
def tenants(stub: StubDaemon) -> StubDaemon:
    for name in ("d", "b", "e", "a", "c-1", "c"):
        stub.client.tenants.create(name, {"team": "blue" if name in "bd" else "red", "n": name})
    return stub


def test_pages_have_every_item_once(tenants: StubDaemon) -> None:
    pages = [names(page) for page in walk(tenants, "/v1/tenants?limit=2")]
    assert pages == [["a", "b"], ["c", "c-1"], ["d", "e"]]
    assert [names(page) for page in walk(tenants, "/v1/tenants?limit=4")] == [["a", "b", "c", "c-1"], ["d", "e"]]
    [whole] = walk(tenants, "/v1/tenants")
    assert sorted(names(whole)) == ["a", "b", "c", "c-1", "d", "e"]


def test_what_changes_between_pages_hides_and_repeats_nothing(tenants: StubDaemon) -> None:
    pages = walk(tenants, "/v1/tenants?limit=2")
    assert names(next(pages)) == ["a", "b"]
    tenants.client.tenants.remove("a")
    tenants.client.tenants.remove("c")
    tenants.client.tenants.create("aa")
    tenants.client.tenants.create("cc")
    assert [name for page in pages for name in names(page)] == ["c-1", "cc", "d", "e"]


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("prefix=c", ["c", "c-1"]),
        ("label=team=blue", ["b", "d"]),
        ("label=team", ["a", "b", "c", "c-1", "d", "e"]),
        ("label=team=red&label=n=a", ["a"]),
        ("label=team=green", []),
        ("label=none", []),
        ("label=team=red&prefix=c-", ["c-1"]),
    ],
)
def test_filters(query: str, found: list[str], tenants: StubDaemon) -> None:
    for limit in ("", "&limit=1", "&limit=1000"):
        pages = list(walk(tenants, f"/v1/tenants?{query}{limit}"))
        assert sorted(name for page in pages for name in names(page)) == found


def test_filters_by_label_are_few(tenants: StubDaemon) -> None:
    """Each is compared with every item of a list."""
    for query, status in (
        ("&".join(f"label=x{number}" for number in range(64)), 200),
        ("&".join(f"label=x{number}" for number in range(65)), 400),
        ("&".join(["label=team"] * 3000), 200),  # once is enough
    ):
        assert ask(tenants, head("GET", f"/v1/tenants?{query}")).status == status


def test_instances_by_state(stub: StubDaemon) -> None:
    for name in ("a", "b"):
        stub.client.instances.run("acme", "x", ["true"], name=name, start=False)
    stub.client.instances.pause("acme", "b")
    for where in ("/v1/tenants/acme/instances", "/v1/instances"):
        [page] = walk(stub, f"{where}?state=paused")
        assert [view["instance"]["name"] for view in page] == ["b"]
        assert ask(stub, head("GET", f"{where}?state=happy")).status == 400


def cursor_of(stub: StubDaemon, target: str) -> str:
    link = ask(stub, head("GET", target)).headers["link"]
    found = re.search(r"cursor=([^&>]+)", link)
    assert found
    return found[1]


def test_a_cursor_is_good_for_its_own_list_only(tenants: StubDaemon) -> None:
    cursor = cursor_of(tenants, "/v1/tenants?limit=2&label=team")

    def get(target: str) -> Answered:
        return ask(tenants, head("GET", target))

    assert get(f"/v1/tenants?limit=2&label=team&cursor={cursor}").status == 200
    for target in (
        f"/v1/tenants?limit=2&cursor={cursor}",
        f"/v1/tenants?limit=2&label=n&cursor={cursor}",
        f"/v1/instances?limit=2&cursor={cursor}",
        f"/v1/tenants?limit=2&label=team&cursor={cursor[:-2]}AA",
        "/v1/tenants?cursor=x",
        "/v1/tenants?cursor=%C3%BC",
    ):
        answer = get(target)
        assert (answer.status, problem_of(answer)["code"]) == (400, "Invalid"), target
    for limit in ("0", "1001", "-1", "many"):
        assert get(f"/v1/tenants?limit={limit}").status == 400


@example("p" * 16 + ":" + "\U0001f600" * 256, "the longest name of a group")
@example("a" * rules.MAX_REFERENCE, "the longest name of an image")
@given(st.text(max_size=200), st.text(max_size=40))
def test_a_cursor_gives_back_its_text(text: str, context: str) -> None:
    cursor = CURSORS.seal(text, context)
    assert CURSORS.open(cursor, context) == text
    assert re.fullmatch(PATTERN, cursor) and len(cursor) <= MAX_CURSOR
    with pytest.raises(Invalid):
        CURSORS.open(cursor, context + "x")
    with pytest.raises(Invalid):
        Cursors(b"other" * 8).open(cursor, context)


@given(st.integers(0, 40), st.integers(1, 255))
def test_a_changed_cursor_is_refused(position: int, flip: int) -> None:
    from base64 import urlsafe_b64decode, urlsafe_b64encode

    sealed = CURSORS.seal("4711 and what follows it", "acme")
    data = bytearray(urlsafe_b64decode(sealed + "=" * (-len(sealed) % 4)))
    data[position % len(data)] ^= flip
    with pytest.raises(Invalid):
        CURSORS.open(urlsafe_b64encode(data).decode().rstrip("="), "acme")


def test_a_cursor_does_not_show_what_is_in_it() -> None:
    """Neither the text, nor how two of them are ordered."""
    cursors = [CURSORS.seal(str(revision), "acme") for revision in range(1000, 1100)]
    assert len(set(cursors)) == 100 and cursors != sorted(cursors)
    assert not any("100" in cursor[:8] for cursor in cursors if cursor.startswith("100"))


def test_the_key_is_kept_and_private(tmp_path: Path) -> None:
    path = tmp_path / "cursors.key"
    cursor = load(path).seal("x", "y")
    assert load(path).open(cursor, "y") == "x"
    assert path.stat().st_mode & 0o777 == 0o600
    path.write_bytes(b"damaged")
    with pytest.raises(Invalid):
        load(path).open(cursor, "y")
