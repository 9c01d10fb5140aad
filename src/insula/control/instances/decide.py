"""`decide`: the next action for one instance. It is a pure function, and the only source of actions.

It has four inputs: the desired state (`Instance`, from the store), the last status, the state of this host
(`Observed`, from the driver), and how far this daemon has taken charge of the instance (`Hold`). Each action brings
them closer together, and `decide` is called again until nothing is to do. So the same code runs after a verb, after
the end of a process, after a crash at any point, and after a reboot.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import Literal

from insula.control.instances.attached import attached
from insula.control.instances.drivers.base import Observed
from insula.control.instances.restart_policy import LONGEST, after_boot, after_exit
from insula.model.objects import Instance, InstanceStatus

Hold = Literal["unknown", "watched", "tidy"]
"""The state of the instance in this daemon. "unknown": nothing was done since the daemon started. "watched": the daemon
waits for the end of its first process. "tidy": nothing of it is on this host but its directory."""


class Action(Enum):
    ADOPT = auto()  # it runs: record that as its status, and watch it
    PAUSE = auto()
    UNPAUSE = auto()
    RESIZE = auto()  # apply the desired limits
    DISKS = auto()  # attach and detach disks, until it has the wanted ones
    PLUG = auto()  # plug in the wanted ports
    UNPLUG = auto()  # unplug the ports that are to be removed, and delete them
    STOP = auto()  # stop it, as the user asked
    REPLACE = auto()  # stop it, since a newer start is desired
    KILL = auto()  # kill it at once, since it is to be removed
    COLLECT_EXIT = auto()  # it ended: record its exit as its status, and remove its remains on this host
    LOST = auto()  # it ended, and its exit status is not known
    DISCARD = auto()  # remove its remains on this host, or a container that was never started
    LAUNCH = auto()
    RELAUNCH = auto()  # launch it by its restart policy
    START_ANEW = auto()  # the host was booted: commit another start
    REMOVE = auto()  # remove it from the store, and its directory
    WAIT = auto()  # until `InstanceStatus.next_start`
    NOTHING = auto()


DONE = frozenset({Action.WAIT, Action.NOTHING})


def decide(instance: Instance, status: InstanceStatus, observed: Observed, hold: Hold, boot: str, now: float) -> Action:
    """The next action. `boot` is the host's boot ID (random(4)), `now` in seconds since the epoch."""
    if observed.state in ("starting", "running", "paused"):
        return _if_running(instance, status, observed, hold)
    if observed.state == "ended":
        return Action.COLLECT_EXIT
    if observed.state == "created" or hold != "tidy":
        return Action.DISCARD
    if instance.wanted == "removed":
        return Action.REMOVE
    return _if_absent(instance, status, observed, boot, now)


def _if_running(instance: Instance, status: InstanceStatus, observed: Observed, hold: Hold) -> Action:
    if hold != "watched":
        return Action.ADOPT
    if instance.wanted == "removed":
        return Action.KILL
    if instance.wanted == "stopped":
        return Action.STOP
    if not _is_current(instance, observed):
        return Action.REPLACE
    if instance.generation > status.observed_generation:  # else another program froze it; that is only reported
        if instance.wanted == "paused" and observed.state == "running":
            return Action.PAUSE
        if instance.wanted == "running" and observed.state == "paused":
            return Action.UNPAUSE
    if status.state != observed.state or (observed.running and status.pid != observed.running.pid):
        return Action.ADOPT
    if status.resources != instance.spec.resources:
        return Action.RESIZE
    if {*status.disks} != {*attached(instance)}:
        return Action.DISKS
    if _leaving(instance):
        return Action.UNPLUG
    return Action.PLUG if any(port.index not in status.ports for port in instance.plugged) else Action.NOTHING


def _if_absent(instance: Instance, status: InstanceStatus, observed: Observed, boot: str, now: float) -> Action:
    if _leaving(instance):
        return Action.UNPLUG
    starts = instance.wanted in ("running", "paused")
    known = status.starts == instance.starts and status.state in ("exited", "failed")
    current, old = _is_current(instance, observed), _is_old(observed, boot)
    if current and not known and (status.starts == instance.starts or old):
        return Action.LOST
    if known and instance.spec.remove:
        return Action.REMOVE
    if current and old:
        return Action.START_ANEW if after_boot(instance, started_before=True) else Action.NOTHING
    if not known:
        return Action.LAUNCH if starts else Action.NOTHING
    if not starts or not _restarts(instance, status):
        return Action.NOTHING
    # a time further away than the longest pause: the clock was set back
    return Action.WAIT if 0 < (status.next_start or now) - now <= LONGEST else Action.RELAUNCH


def _leaving(instance: Instance) -> bool:
    """Whether a port of it is to be removed."""
    return any(port.wanted == "removed" for port in instance.ports)


def _is_current(instance: Instance, observed: Observed) -> bool:
    """Whether the last start on this host is the desired one."""
    return observed.record is not None and observed.record.starts == instance.starts


def _is_old(observed: Observed, boot: str) -> bool:
    """Whether the last start was before the host was booted."""
    return observed.record is not None and observed.record.boot != boot


def _restarts(instance: Instance, status: InstanceStatus) -> bool:
    """Whether its restart policy starts it again. After a failed start it does so only if the policy had started it."""
    if status.state == "failed":
        return status.next_start is not None
    return status.exit is not None and after_exit(instance.spec.restart, status.exit, status.restarts)
