"""Parts of verbs that need no container: merging of limits, formats of statistics."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from insula.container.config import check_resources, no_more_processes, since
from insula.oci.verbs.events import statistics
from insula.oci.verbs.update import lift_swap, merge, without_zeros
from tests.unit.valid_config import FULL


def test_limits_are_merged_by_field_and_lists_replaced() -> None:
    now = {"memory": {"limit": 1, "swap": 2}, "devices": [{"allow": False}], "pids": {"limit": 3}}
    wanted = {"memory": {"limit": 5}, "devices": [{"allow": True}], "cpu": {"shares": 6}}
    before = copy.deepcopy(now)
    assert merge(now, wanted) == {
        "memory": {"limit": 5, "swap": 2},
        "devices": [{"allow": True}],
        "pids": {"limit": 3},
        "cpu": {"shares": 6},
    }
    assert now == before, "what is in force is known until the kernel has taken the new"


@pytest.mark.parametrize(
    ("sent", "left"),
    [
        ({"memory": {"limit": 0, "swappiness": 0}}, {"memory": {"swappiness": 0}}),
        ({"memory": {"disableOOMKiller": False, "swap": -1}}, {"memory": {"disableOOMKiller": False, "swap": -1}}),
        ({"cpu": {"idle": 0, "burst": 0, "cpus": ""}}, {"cpu": {"idle": 0, "burst": 0}}),
        ({"pids": {"limit": 0}, "devices": [], "unified": {}}, {}),
        ({"blockIO": {"weight": 0, "throttleReadBpsDevice": []}}, {}),
    ],
)
def test_zero_means_unchanged_where_it_is_no_limit(sent: dict[str, Any], left: dict[str, Any]) -> None:
    assert without_zeros(sent) == left


@pytest.mark.parametrize(
    ("version", "limit", "becomes"),
    [("1.3.0", 0, 1), ("1.4.0-dev", 0, 1), ("1.2.1", 0, 0), ("1.0.2-dev", 0, 0), ("1.3.0", -1, -1), ("1.3.0", 7, 7)],
)
def test_since_1_3_a_pids_limit_of_0_is_one(version: str, limit: int, becomes: int) -> None:
    resources = {"pids": {"limit": limit}}
    if since({"ociVersion": version}, 3):
        no_more_processes(resources)
    assert resources == {"pids": {"limit": becomes}}


@pytest.mark.parametrize(
    ("now", "wanted", "swap"),
    [
        ({"limit": 1 << 20, "swap": 1 << 21}, {"limit": -1}, -1),
        ({"limit": 1 << 20, "swap": 1 << 21}, {"limit": -1, "swap": 1 << 30}, 1 << 30),
        ({"limit": 1 << 20, "swap": 1 << 21}, {"limit": 1 << 21}, None),
        ({"limit": 1 << 20}, {"limit": -1}, None),
    ],
)
def test_without_a_limit_of_memory_there_is_none_with_swap(now: Any, wanted: Any, swap: int | None) -> None:
    lift_swap(now, wanted)
    assert wanted.get("swap") == swap


def test_the_limits_of_a_full_config_can_be_merged_with_themselves() -> None:
    resources = copy.deepcopy(FULL["linux"]["resources"])
    merged = merge(resources, without_zeros(check_resources(copy.deepcopy(resources), alone=False)))
    assert merged == resources
    assert check_resources(merged) == resources


def test_statistics_are_in_runcs_words() -> None:
    stats = {
        "cpu": {"usage": 9, "user": 4, "system": 5, "periods": 3, "throttled_periods": 2, "throttled": 1},
        "memory": {"usage": 7, "limit": None, "peak": 8, "swap": None, "failures": 6, "stat": {"file": 2}},
        "pids": {"current": 1, "limit": None},
        "io": {"8:0": {"read_bytes": 10, "write_operations": 11}},
        "hugetlb": {"2MB": {"usage": 0, "limit": None, "failures": None}},
        "pressure": {"cpu": {"some": {"avg10": 1.5}}},
    }
    found = statistics(stats)
    assert found["cpu"]["usage"] == {"total": 9, "percpu": [], "kernel": 5, "user": 4}
    assert found["cpu"]["throttling"] == {"periods": 3, "throttledPeriods": 2, "throttledTime": 1}
    assert found["memory"]["usage"] == {"limit": 0, "usage": 7, "max": 8, "failcnt": 6}
    assert found["memory"]["cache"] == 2
    assert found["pids"] == {"current": 1, "limit": 0}
    assert found["blkio"]["ioServiceBytesRecursive"] == [
        {"major": 8, "minor": 0, "op": "Read", "value": 10},
        {"major": 8, "minor": 0, "op": "Write", "value": 0},
    ]
    assert found["blkio"]["ioServicedRecursive"][1]["value"] == 11
    assert found["hugetlb"] == {"2MB": {"usage": 0, "failcnt": 0}}
    assert found["pressure"] == stats["pressure"]
    assert statistics({})["pids"] == {"current": 0, "limit": 0}
