"""Checks of configs: the times of a deadline, and mappings of a user namespace."""

from __future__ import annotations

import pytest

from insula.container.config import check
from insula.model.errors import Invalid
from tests.unit.valid_config import MISSING, changed


def refused(config: object) -> Invalid:
    with pytest.raises(Invalid) as caught:
        check(config, bundle="")
    return caught.value


@pytest.mark.parametrize(
    ("times", "valid"),
    [((2000, 3000, 4000), True), ((2000, 2000, 0), True), ((1023, 2000, 3000), False), ((3000, 2000, 4000), False)],
)
def test_a_deadline_has_three_times(times: tuple[int, int, int], valid: bool) -> None:
    entry = dict(zip(("runtime", "deadline", "period"), times, strict=True), policy="SCHED_DEADLINE")
    config = changed("process.scheduler", entry)
    if valid:
        check(config, bundle="")
    else:
        assert refused(config).message.startswith("process.scheduler.runtime: ")
    assert refused(changed("process.scheduler", {**entry, "policy": "SCHED_BATCH"})).message.startswith(
        "process.scheduler.policy: SCHED_BATCH has no runtime"
    )


@pytest.mark.parametrize(
    ("times", "field", "complaint"),
    [
        ({"deadline": 3000}, "runtime", "requires `runtime`"),
        ({"runtime": 2000}, "deadline", "requires `deadline`"),
        ({"runtime": 0, "deadline": 3000}, "runtime", "runtime must be greater than 0"),
        ({"runtime": 1023, "deadline": 3000}, "runtime", "runtime 1023 must be between 1024 and 9223372036854775807"),
        ({"runtime": 1 << 63, "deadline": 1 << 63}, "runtime", f"runtime {1 << 63} must be between 1024 and"),
        ({"runtime": 3001, "deadline": 3000}, "runtime", "runtime 3001 must be <= deadline 3000"),
        ({"runtime": 2000, "deadline": 3000, "period": 2999}, "deadline", "deadline 3000 must be <= period 2999"),
        ({"runtime": 2000, "deadline": 3000, "period": 1 << 63}, "deadline", "deadline and period must be at most"),
    ],
)
def test_errors_of_a_deadline_are_named(times: dict[str, int], field: str, complaint: str) -> None:
    message = refused(changed("process.scheduler", {"policy": "SCHED_DEADLINE", **times})).message
    assert message.startswith(f"process.scheduler.{field}: sched_setattr: `SCHED_DEADLINE` {complaint}")


def test_a_new_user_namespace_has_both_mappings_or_none() -> None:
    assert refused(changed("linux.gidMappings", MISSING)).message.startswith("linux.gidMappings: is missing beside uid")
    assert refused(changed("linux.uidMappings", MISSING)).message.startswith("linux.uidMappings: is missing beside gid")
    check(changed("linux.gidMappings", MISSING, changed("linux.uidMappings", MISSING)), bundle="")
