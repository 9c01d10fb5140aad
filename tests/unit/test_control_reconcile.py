"""What the daemon decides about an instance that it finds: every way to die has its row."""

from __future__ import annotations

import pytest

from insula.control.instances.drivers.base import State
from insula.control.instances.drivers.directory import LaunchRecord
from insula.control.reconcile import Action, decide
from insula.model.objects import Exit, ImageConfig, Instance, InstanceSpec, InstanceStatus, OverlayRoot

NOW, BEFORE = "boot-2", "boot-1"


def instance(wanted: str, starts: int) -> Instance:
    return Instance(
        tenant="acme", name="web", id="0" * 32, spec=InstanceSpec(image="x"), image_digest="",
        host="here", root=OverlayRoot(layers=[]),
        config=ImageConfig(), wanted=wanted, starts=starts, created=0.0,  # type: ignore[arg-type]
    )  # fmt: skip


def status(state: str, starts: int) -> InstanceStatus:
    ended = Exit(exit_status=0, finished=1.0) if state == "exited" else None
    return InstanceStatus(state=state, starts=starts, exit=ended)  # type: ignore[arg-type]


RUNNING, EXITED = status("running", 1), status("exited", 1)


@pytest.mark.parametrize(
    ("wanted", "starts", "known", "record", "container", "action"),
    [
        # killed between commit and launch
        ("running", 1, None, None, "none", Action.LAUNCH),
        ("running", 2, EXITED, (1, NOW), "none", Action.LAUNCH),
        ("running", 2, RUNNING, (1, NOW), "ended", Action.LAUNCH),
        # in the middle of a launch
        ("running", 1, None, (1, NOW), "none", Action.LAUNCH),
        ("running", 1, None, (1, NOW), "created", Action.LAUNCH),
        ("running", 2, EXITED, (2, NOW), "created", Action.LAUNCH),
        ("stopped", 1, None, (1, NOW), "created", Action.NOTHING),
        # it ran on without us
        ("running", 1, RUNNING, (1, NOW), "running", Action.ADOPT),
        ("running", 1, None, (1, NOW), "running", Action.ADOPT),
        ("running", 1, EXITED, (1, NOW), "running", Action.ADOPT),  # restarted by policy just before
        # killed during stop and restart
        ("stopped", 1, RUNNING, (1, NOW), "running", Action.STOP),
        ("running", 2, RUNNING, (1, NOW), "running", Action.REPLACE),
        # it ended without us
        ("running", 1, RUNNING, (1, NOW), "ended", Action.HARVEST),
        ("stopped", 1, RUNNING, (1, NOW), "ended", Action.HARVEST),
        ("running", 1, EXITED, (1, NOW), "ended", Action.HARVEST),  # stored, but not tidied up
        ("running", 1, RUNNING, (1, NOW), "none", Action.LOST),
        # it had ended, and that was settled
        ("running", 1, EXITED, (1, NOW), "none", Action.RESUME),
        ("running", 1, status("failed", 1), (1, NOW), "none", Action.RESUME),
        # the host went down
        ("running", 1, RUNNING, (1, BEFORE), "none", Action.REBOOTED),
        ("stopped", 1, EXITED, (1, BEFORE), "none", Action.REBOOTED),
        # never started
        ("stopped", 0, None, None, "none", Action.NOTHING),
        # killed during removal
        ("removed", 1, RUNNING, (1, NOW), "running", Action.REMOVE),
        ("removed", 1, None, None, "none", Action.REMOVE),
    ],
)
def test_decide(
    wanted: str,
    starts: int,
    known: InstanceStatus | None,
    record: tuple[int, str] | None,
    container: State,
    action: Action,
) -> None:
    begun = LaunchRecord(starts=record[0], boot=record[1]) if record else None
    assert decide(instance(wanted, starts), known, begun, container, NOW) is action
