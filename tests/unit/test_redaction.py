"""Errors from deep below, as the operator and as a tenant's member see them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from insula.api import redaction
from insula.api.errors import answer
from insula.api.narrowing import for_sender
from insula.api.problems import encoded
from insula.api.redaction import HIDDEN, hide, pattern_of, shown
from insula.api.streams import end_of
from insula.control.identities.authority import OPERATOR, Authority
from insula.model.declared import DeclaredItem
from insula.model.errors import Failed
from insula.model.objects import InstanceStatus
from insula.model.own_views import OwnInstanceView
from insula.model.views import InstanceView
from tests.support import objects

ROOT, RUN = "/var/lib/insula", "/run/insula"
PATTERN = pattern_of((ROOT, RUN))
DEEP = {
    f"its remains can't be removed: [Errno 16] Device or resource busy: '{ROOT}/instances/0f/upper'":
        "its remains can't be removed: [Errno 16] Device or resource busy: '…'",
    "the group of tenant acme can't be made: [Errno 28] No space left on device: '/sys/fs/cgroup/pids/insula/acme'":
        "the group of tenant acme can't be made: [Errno 28] No space left on device: '…'",
    f"cannot store state in {ROOT}/state.db: disk I/O error": "cannot store state in …: disk I/O error",
    "cannot join: No such process /proc/4711/ns/net": "cannot join: No such process …",
    "the namespace /run/netns/insula-other is missing": "the namespace … is missing",
    f"{RUN}/containers/x: not there; see {RUN}": "…: not there; see …",
}  # fmt: skip
HARMLESS = (
    "cannot execute /no/such/program: No such file or directory",
    "cannot mount /proc: cannot mount over it /proc",
    "cannot mount /data/proc/1: Not a directory",
    f"cannot mount /mnt{ROOT}/x",
    f"{ROOT}-other/x is yours",
    "`insula -T acme ps -a` lists them",
)


@pytest.fixture(autouse=True)
def again() -> Iterator[None]:
    token = redaction._hidden.set(PATTERN)
    yield
    redaction._hidden.reset(token)


@pytest.mark.parametrize(("deep", "told"), DEEP.items())
def test_paths_of_the_host_are_for_who_sees_it(deep: str, told: str) -> None:
    error = Failed(deep, deep)
    for see, text in ((None, deep), (PATTERN, told)):
        hide(see)
        problem: Any = answer(error).content
        assert (problem["detail"], problem["message"], problem["hint"]) == (text, text, text)
        assert json.loads(encoded(error)[2])["detail"] == text
        assert json.loads(end_of("application/x-ndjson", error))["detail"] == text


@pytest.mark.parametrize("text", HARMLESS)
def test_what_a_tenant_knows_is_shown(text: str) -> None:
    assert shown(text) == text


BELOW = st.from_regex(r"(/[a-z0-9._-]+)*", fullmatch=True)


@given(st.text(), st.sampled_from([ROOT, RUN, "/proc/17", "/sys/fs/cgroup/x"]), BELOW)
def test_no_path_below_those_is_left(before: str, directory: str, rest: str) -> None:
    told = shown(f"{before} '{directory}{rest}' failed")
    assert f"'{directory}" not in told and told.endswith("failed")
    assert HIDDEN in told


def test_status_events_and_declared_items() -> None:
    deep, told = next(iter(DEEP.items()))
    member = Authority(proof="x", tenants={"acme": "member"})
    status = InstanceStatus(state="failed", error=deep, hint=deep)
    view = InstanceView(instance=objects.instance(), status=status)
    event = {"action": "failed", "error": deep, "pid": 5}
    item = DeclaredItem(kind="Instance", name="x", operation="create", state="failed", reason=deep)
    hide(None)
    assert for_sender(event, OPERATOR)["error"] == deep and for_sender(item, OPERATOR).reason == deep
    hide(PATTERN)
    assert for_sender(event, member) == {"action": "failed", "error": told}
    assert for_sender(item, member).reason == told
    own = for_sender(view, member)
    assert isinstance(own, OwnInstanceView) and (own.status.error, own.status.hint) == (told, told)
