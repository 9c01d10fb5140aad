"""Checks of specs, ranges of IDs, and restart policies."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from insula.control.instances import restart_policy
from insula.control.instances.specs import check, check_labels, make_name
from insula.control.tenants import FIRST_ID, MAX_TENANTS
from insula.model.errors import Invalid
from insula.model.objects import (
    IDS_PER_TENANT,
    AddressPair,
    Exit,
    InstanceSpec,
    NetworkAttachment,
    Resources,
    RestartPolicy,
    TmpfsMount,
)
from insula.model.units import check_label
from tests.support import objects

BAD: list[dict[str, object]] = [
    {"name": "Web"},
    {"name": "a" * 64},
    {"name": "../x"},
    {"networks": [NetworkAttachment(network="No")]},
    {"networks": [NetworkAttachment(network="a"), NetworkAttachment(network="a")]},
    {"networks": [NetworkAttachment(network=f"n{i}") for i in range(17)]},
    {"networks": [NetworkAttachment(network="a", mac="01:00:5e:00:00:01")]},
    {"networks": [NetworkAttachment(network="a", allowed_pairs=[AddressPair(address="10.0.0.1/24")])]},
    {"networks": [NetworkAttachment(network="a", allowed_pairs=[AddressPair(address="224.0.0.18")])]},
    {"networks": [NetworkAttachment(network="a", allowed_pairs=[AddressPair(address="fe80::1%eth0")])]},
    {"networks": [NetworkAttachment(network="a", allowed_pairs=[AddressPair(address="10.0.0.9", mac="no")])]},
    {"networks": [NetworkAttachment(network="a", allowed_pairs=[AddressPair(address="10.0.0.9")] * 33)]},
    {"labels": {"": "x"}},
    {"labels": {"a": "b\n"}},
    {"labels": {str(i): "" for i in range(65)}},
    {"resources": Resources(memory=1)},
    {"stop_timeout": -1.0},
    {"stop_timeout": float("nan")},
    {"stop_signal": "SIGNOTHING"},
    {"stop_signal": "0"},
    {"stop_signal": "65"},
    {"restart": RestartPolicy(name="always", max_retries=3)},
    {"restart": RestartPolicy(name="on-failure", max_retries=-1)},
    {"restart": RestartPolicy(name="always"), "remove": True},
    {"log_size": 1},
    {"log_files": 0},
    {"mounts": [TmpfsMount(path=f"/t{i}") for i in range(101)]},
]


@pytest.mark.parametrize("fields", BAD, ids=str)
def test_invalid_specs_are_refused_with_a_hint(fields: dict[str, object]) -> None:
    with pytest.raises(Invalid) as error:
        check(InstanceSpec(image="busybox", **fields))  # type: ignore[arg-type]
    assert error.value.hint and "\n" not in str(error.value)


def test_valid_specs_are_accepted() -> None:
    spec = InstanceSpec(image="busybox", name="web", labels={"app.kubernetes.io/name": "ü"}, stop_signal="int")
    assert check(spec).stop_signal == "SIGINT"
    assert check(InstanceSpec(image="busybox", networks=[])).networks == []


@given(st.text(max_size=200))
def test_a_generated_name_is_valid(image: str) -> None:
    assert check_label("instance", make_name(image))
    assert re.fullmatch(r".*-[0-9a-f]{6}", make_name(image))


def test_a_generated_name_contains_the_images() -> None:
    assert make_name("registry.example:5000/team/My_App:1.2@sha256:00").startswith("my-app-")


def test_labels_are_returned() -> None:
    assert check_labels({"a": "1"}) == {"a": "1"}


def test_ranges_of_ids_are_disjoint_and_below_the_others() -> None:
    ends = FIRST_ID + MAX_TENANTS * IDS_PER_TENANT
    assert FIRST_ID > 600_100_000  # SUB_UID_MAX, login.defs(5)
    assert ends == 0x70000000 < 1 << 31


def test_the_pause_doubles_up_to_a_minute() -> None:
    assert [restart_policy.delay(n) for n in (0, 1, 2, 9, 10, 1000)] == [0.1, 0.2, 0.4, 51.2, 60.0, 60.0]


@pytest.mark.parametrize(
    ("name", "retries", "status", "restarts", "again"),
    [
        ("no", 0, 1, 0, False),
        ("always", 0, 0, 99, True),
        ("unless-stopped", 0, 0, 0, True),
        ("on-failure", 0, 0, 0, False),
        ("on-failure", 0, 1, 99, True),
        ("on-failure", 3, 1, 2, True),
        ("on-failure", 3, 1, 3, False),
        ("on-failure", 0, None, 0, True),
    ],
)
def test_restart_policies(name: str, retries: int, status: int | None, restarts: int, again: bool) -> None:
    chosen = RestartPolicy(name=name, max_retries=retries)  # type: ignore[arg-type]
    assert restart_policy.after_exit(chosen, Exit(exit_status=status, finished=0.0), restarts) is again


@pytest.mark.parametrize(
    ("name", "wanted", "before", "again"),
    [
        ("no", "running", True, False),
        ("on-failure", "running", True, False),
        ("always", "running", True, True),
        ("always", "stopped", True, True),
        ("always", "stopped", False, False),
        ("unless-stopped", "running", True, True),
        ("unless-stopped", "stopped", True, False),
        ("always", "removed", True, False),
    ],
)
def test_after_a_reboot(name: str, wanted: str, before: bool, again: bool) -> None:
    restart = RestartPolicy(name=name)  # type: ignore[arg-type]
    instance = objects.instance(spec=InstanceSpec(image="x", restart=restart), wanted=wanted)
    assert restart_policy.after_boot(instance, started_before=before) is again
