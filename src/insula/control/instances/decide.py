"""What to do next about one instance: `decide`, which is pure, and the only source of actions.

There are four witnesses: the record in the store (`Instance`: what is wanted), the status that was measured last, what
is on this host (`Observed`, from the driver), and what this daemon has done about it since it started (`Hold`). Each
action makes one of them truer, and `decide` is asked again, until there is nothing to do. So the same happens after a
verb, after the end of a process, after a crash at any point, and after a reboot.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import Literal

from insula.control.instances.drivers.base import Observed
from insula.control.instances.restart_policy import LONGEST, after_boot, after_exit
from insula.model.objects import Instance, InstanceStatus

Hold = Literal["unknown", "watched", "tidy"]
"""What this daemon did since it started: nothing yet; it waits for the end of what runs; it has removed what was left
on this host, apart from the directory."""


class Action(Enum):
    ADOPT = auto()  # it runs: take that as its status, and watch it
    PAUSE = auto()
    UNPAUSE = auto()
    RESIZE = auto()  # put the limits in force that are wanted
    STOP = auto()  # as the user asked for
    REPLACE = auto()  # stop it, for another start is wanted
    KILL = auto()  # stop it at once: it is to be removed
    COLLECT_EXIT = auto()  # it ended: take its exit as its status, and remove what is left on this host
    LOST = auto()  # it ran, is gone, and nobody knows how it ended
    DISCARD = auto()  # remove what is left on this host, or was never told to start
    LAUNCH = auto()
    RELAUNCH = auto()  # by its restart policy
    START_ANEW = auto()  # the host was booted: want another start
    REMOVE = auto()  # from the store, with its directory
    WAIT = auto()  # until `InstanceStatus.next_start`
    NOTHING = auto()


DONE = frozenset({Action.WAIT, Action.NOTHING})


def decide(instance: Instance, status: InstanceStatus, observed: Observed, hold: Hold, boot: str, now: float) -> Action:
    """The next action. `boot` is the host's boot ID (random(4)), `now` in seconds since the epoch."""
    if observed.state in ("running", "paused"):
        return _of_one_that_runs(instance, status, observed, hold)
    if observed.state == "ended":
        return Action.COLLECT_EXIT
    if observed.state == "created" or hold != "tidy":
        return Action.DISCARD
    if instance.wanted == "removed":
        return Action.REMOVE
    return _of_one_that_is_not_there(instance, status, observed, boot, now)


def _of_one_that_runs(instance: Instance, status: InstanceStatus, observed: Observed, hold: Hold) -> Action:
    if hold != "watched":
        return Action.ADOPT
    if instance.wanted == "removed":
        return Action.KILL
    if instance.wanted == "stopped":
        return Action.STOP
    if not _is_current(instance, observed):
        return Action.REPLACE
    if instance.generation > status.observed_generation:  # else somebody else froze it, which is told and no more
        if instance.wanted == "paused" and observed.state == "running":
            return Action.PAUSE
        if instance.wanted == "running" and observed.state == "paused":
            return Action.UNPAUSE
    if status.state != observed.state or (observed.running and status.pid != observed.running.pid):
        return Action.ADOPT
    return Action.RESIZE if status.resources != instance.spec.resources else Action.NOTHING


def _of_one_that_is_not_there(
    instance: Instance, status: InstanceStatus, observed: Observed, boot: str, now: float
) -> Action:
    starts = instance.wanted in ("running", "paused")
    known = status.starts == instance.starts and status.state in ("exited", "failed")
    if _is_current(instance, observed) and not known and (status.starts == instance.starts or _of_old(observed, boot)):
        return Action.LOST
    if known and instance.spec.remove:
        return Action.REMOVE
    if _is_current(instance, observed) and _of_old(observed, boot):
        return Action.START_ANEW if after_boot(instance, started_before=True) else Action.NOTHING
    if not known:
        return Action.LAUNCH if starts else Action.NOTHING
    if not starts or not _restarts(instance, status):
        return Action.NOTHING
    # a time further away than any pause is one of a clock that was set back
    return Action.WAIT if 0 < (status.next_start or now) - now <= LONGEST else Action.RELAUNCH


def _is_current(instance: Instance, observed: Observed) -> bool:
    """Whether the start that was begun last is the one that is wanted."""
    return observed.record is not None and observed.record.starts == instance.starts


def _of_old(observed: Observed, boot: str) -> bool:
    """Whether it was begun before the host was booted."""
    return observed.record is not None and observed.record.boot != boot


def _restarts(instance: Instance, status: InstanceStatus) -> bool:
    """Whether its restart policy has it run again. A start that failed counts only if it was by the policy."""
    if status.state == "failed":
        return status.next_start is not None
    return status.exit is not None and after_exit(instance.spec.restart, status.exit, status.restarts)
