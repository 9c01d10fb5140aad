"""Guests of Xen by Insula's driver. Xen 4.17, domain 0, libvirtd and the guest are real; the processor is emulated.

Shown is `LibvirtKeeper` (insula.machine.libvirt) in domain 0. `insula run --vm` has no part in it.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support.guest import CHECKOUT
from tests.support.xen import Domain0
from tests.xen.inside import MARK


@pytest.fixture(scope="module")
def seen(domain0: Domain0) -> dict[str, Any]:
    """What the life of a para-virtualized guest looks like from domain 0."""
    command = f"cd {CHECKOUT} && PYTHONPATH=src:. python3 -m tests.xen.inside pv"
    found: dict[str, Any] = json.loads(domain0.ok(command, timeout=240).splitlines()[-1])
    return found


def test_the_driver_says_that_it_is_xen(seen: dict[str, Any]) -> None:
    assert seen["check"].startswith("Xen 4.17.") and ", libvirt 9." in seen["check"]
    assert seen["domain"] == "this host is its domain 0"


def test_a_para_virtualized_guest_has_its_network_and_its_disk_and_answers(seen: dict[str, Any]) -> None:
    hypervisor, kind, *rest = seen["answer"].splitlines(keepends=True)
    assert (hypervisor, kind) == ("xen\n", "PV\n")
    assert rest[0] == MARK and "-cloud-amd64" in rest[1]
    assert seen["bridge"] == ["guest0"]
    assert "guest " in seen["xl"] and seen["console"].startswith("/dev/pts/")
    assert seen["started"] == "running"


def test_it_stands_still_while_it_is_paused_and_goes_on_afterwards(seen: dict[str, Any]) -> None:
    assert seen["paused"] == ["paused", None]
    assert seen["resumed"] == ["running", True]


def test_it_turns_itself_off_when_it_is_asked_to_and_can_be_killed(seen: dict[str, Any]) -> None:
    assert seen["off"] == ["off", None]
    assert seen["killed"] == "off"


def test_what_it_is_no_time_for_is_refused(seen: dict[str, Any]) -> None:
    assert seen["again"].startswith("Conflict: xen:///system has a guest guest already")
    assert seen["undefine"].startswith("Conflict: guest is running")
    assert seen["gone"].startswith("NotFound: xen:///system has no guest guest")


def test_the_events_tell_of_its_life(seen: dict[str, Any]) -> None:
    told = [
        each for each in seen["events"] if each in ("defined", "started", "paused", "resumed", "stopped", "undefined")
    ]
    once = ["started", "paused", "resumed", "stopped"]
    assert [each for each, last in zip(told, ["", *told], strict=False) if each != last] == [
        "defined",
        *once,
        "started",
        "stopped",
        "undefined",
    ]
