"""`decide`: every state of an instance has its action, and the actions come to an end from every state."""

from __future__ import annotations

import itertools
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from insula.control.instances.decide import DONE, Action, Hold, decide
from insula.control.instances.drivers.base import Observed, ObservedState, Running
from insula.control.instances.drivers.directory import LaunchRecord
from insula.control.instances.restart_policy import after_exit, delay
from insula.model.disks import FurtherDisk
from insula.model.objects import (
    Exit,
    ImageConfig,
    Instance,
    InstanceSpec,
    InstanceStatus,
    MachineOptions,
    OverlayRoot,
    Port,
    Resources,
    RestartPolicy,
    disks_of,
)

BOOT, BEFORE = "boot-2", "boot-1"
NOW = 1000.0
PROCESS, OTHER = Running(7, 70, 1.0), Running(8, 80, 1.0)
STEPS = 9
"""The longest way: adopt, stop, collect the exit, discard, unplug, launch."""


def instance(wanted: str, starts: int, policy: str = "no", **fields: Any) -> Instance:
    spec = InstanceSpec(
        image="x", restart=RestartPolicy(name=policy), remove=fields.pop("remove", False)  # type: ignore[arg-type]
    )  # fmt: skip
    return Instance(
        tenant="acme", name="web", id="0" * 32, spec=spec, image_digest="", host="here", root=OverlayRoot(layers=[]),
        config=ImageConfig(), wanted=wanted, starts=starts, created=0.0, **fields,  # type: ignore[arg-type]
    )  # fmt: skip


def status(state: str, starts: int, **fields: Any) -> InstanceStatus:
    """A stored status; if it runs, with the desired limits applied."""
    if state == "exited":
        fields = {"exit": Exit(exit_status=0, finished=1.0), **fields}
    if state in ("running", "paused", "stopping"):
        fields = {"pid": PROCESS.pid, "start_time": PROCESS.start_time, "resources": Resources(), **fields}
    return InstanceStatus(state=state, starts=starts, observed_generation=1, **fields)  # type: ignore[arg-type]


def observed(state: ObservedState, record: tuple[int, str] | None) -> Observed:
    begun = LaunchRecord(starts=record[0], boot=record[1]) if record else None
    return Observed(state, PROCESS if state != "none" else None, begun)


CREATED, RUNNING, EXITED = status("created", 0), status("running", 1), status("exited", 1)


@pytest.mark.parametrize(
    ("wanted", "starts", "known", "record", "state", "hold", "action"),
    [
        # killed between commit and launch
        ("running", 1, CREATED, None, "none", "tidy", Action.LAUNCH),
        ("running", 2, EXITED, (1, BOOT), "none", "tidy", Action.LAUNCH),
        ("running", 2, RUNNING, (1, BOOT), "ended", "unknown", Action.COLLECT_EXIT),
        # in the middle of a launch
        ("running", 1, CREATED, (1, BOOT), "none", "unknown", Action.DISCARD),
        ("running", 1, CREATED, (1, BOOT), "none", "tidy", Action.LAUNCH),
        ("running", 1, CREATED, (1, BOOT), "created", "unknown", Action.DISCARD),
        ("running", 2, EXITED, (2, BOOT), "created", "unknown", Action.DISCARD),
        ("running", 2, EXITED, (2, BOOT), "none", "tidy", Action.LAUNCH),
        ("stopped", 1, CREATED, (1, BOOT), "none", "tidy", Action.NOTHING),
        # it ran on without us
        ("running", 1, RUNNING, (1, BOOT), "running", "unknown", Action.ADOPT),
        ("running", 1, CREATED, (1, BOOT), "running", "unknown", Action.ADOPT),
        ("running", 1, EXITED, (1, BOOT), "running", "unknown", Action.ADOPT),  # restarted by policy just before
        ("stopped", 1, RUNNING, (1, BOOT), "running", "unknown", Action.ADOPT),
        ("running", 1, RUNNING, (1, BOOT), "running", "watched", Action.NOTHING),
        # killed during stop and restart
        ("stopped", 1, RUNNING, (1, BOOT), "running", "watched", Action.STOP),
        ("stopped", 1, status("stopping", 1), (1, BOOT), "running", "watched", Action.STOP),
        ("stopped", 1, status("paused", 1), (1, BOOT), "paused", "watched", Action.STOP),
        ("running", 2, RUNNING, (1, BOOT), "running", "watched", Action.REPLACE),
        # it ended without us
        ("running", 1, RUNNING, (1, BOOT), "ended", "unknown", Action.COLLECT_EXIT),
        ("stopped", 1, RUNNING, (1, BOOT), "ended", "unknown", Action.COLLECT_EXIT),
        ("running", 1, EXITED, (1, BOOT), "ended", "unknown", Action.COLLECT_EXIT),  # stored, but not tidied up
        ("running", 1, RUNNING, (1, BOOT), "none", "tidy", Action.LOST),
        # it had ended, and that was settled
        ("running", 1, EXITED, (1, BOOT), "none", "unknown", Action.DISCARD),
        ("running", 1, EXITED, (1, BOOT), "none", "tidy", Action.NOTHING),
        ("running", 1, status("failed", 1), (1, BOOT), "none", "tidy", Action.NOTHING),
        ("running", 1, status("failed", 1), None, "none", "tidy", Action.NOTHING),
        # the host went down
        ("running", 1, RUNNING, (1, BEFORE), "none", "tidy", Action.LOST),
        ("stopped", 1, EXITED, (1, BEFORE), "none", "tidy", Action.NOTHING),
        # never started
        ("stopped", 0, CREATED, None, "none", "tidy", Action.NOTHING),
        # killed during removal
        ("removed", 1, RUNNING, (1, BOOT), "running", "unknown", Action.ADOPT),
        ("removed", 1, RUNNING, (1, BOOT), "running", "watched", Action.KILL),
        ("removed", 1, RUNNING, (1, BOOT), "ended", "watched", Action.COLLECT_EXIT),
        ("removed", 1, CREATED, None, "none", "unknown", Action.DISCARD),
        ("removed", 1, CREATED, None, "none", "tidy", Action.REMOVE),
    ],
)
def test_decide(
    wanted: str,
    starts: int,
    known: InstanceStatus,
    record: tuple[int, str] | None,
    state: ObservedState,
    hold: Hold,
    action: Action,
) -> None:
    assert decide(instance(wanted, starts), known, observed(state, record), hold, BOOT, NOW) is action


@pytest.mark.parametrize(
    ("wanted", "generation", "state", "measured", "action"),
    [
        ("paused", 2, "running", "running", Action.PAUSE),
        ("running", 2, "paused", "paused", Action.UNPAUSE),
        ("paused", 1, "paused", "paused", Action.NOTHING),
        # somebody else froze it or woke it: that is told, and no more
        ("running", 1, "paused", "running", Action.ADOPT),
        ("running", 1, "paused", "paused", Action.NOTHING),
        ("paused", 1, "running", "running", Action.NOTHING),
    ],
)
def test_pause(wanted: str, generation: int, state: ObservedState, measured: str, action: Action) -> None:
    wished = instance(wanted, 1, generation=generation)
    assert decide(wished, status(measured, 1), observed(state, (1, BOOT)), "watched", BOOT, NOW) is action


FIRST, SECOND = (
    Port(tenant="acme", network=f"n{n}", instance="web", index=n, interface=f"eth{n}", mac="02:10:00:00:00:01",
         address="10.0.0.2")
    for n in (0, 1)
)  # fmt: skip
LEAVING = msgspec.structs.replace(SECOND, wanted="removed")


@pytest.mark.parametrize(
    ("ports", "plugged", "action"),
    [
        ([FIRST], [0], Action.NOTHING),
        ([FIRST, SECOND], [0], Action.PLUG),
        ([FIRST, SECOND], [0, 1], Action.NOTHING),
        ([FIRST, SECOND], [], Action.PLUG),  # it is not known which are: stored by an earlier version
        ([FIRST, LEAVING], [0, 1], Action.UNPLUG),
        ([FIRST, LEAVING], [0], Action.UNPLUG),  # killed before it was deleted from the store
        ([LEAVING], [1], Action.UNPLUG),
        ([], [], Action.NOTHING),
    ],
)
def test_ports(ports: list[Port], plugged: list[int], action: Action) -> None:
    wish, running = instance("running", 1, ports=ports), observed("running", (1, BOOT))
    assert decide(wish, status("running", 1, ports=plugged), running, "watched", BOOT, NOW) is action
    paused = status("paused", 1, ports=plugged)
    assert decide(wish, paused, observed("paused", (1, BOOT)), "watched", BOOT, NOW) is action
    stopped = instance("stopped", 1, ports=ports)
    assert decide(stopped, status("running", 1, ports=plugged), running, "watched", BOOT, NOW) is Action.STOP
    without_plug = Action.NOTHING if action is Action.PLUG else action
    assert decide(stopped, EXITED, observed("none", (1, BOOT)), "tidy", BOOT, NOW) is without_plug
    removed = instance("removed", 1, ports=ports)
    assert decide(removed, EXITED, observed("none", (1, BOOT)), "tidy", BOOT, NOW) is Action.REMOVE


def test_limits_that_are_not_in_force() -> None:
    measured = status("running", 1, resources=Resources(memory=1 << 30))
    action = decide(instance("running", 1), measured, observed("running", (1, BOOT)), "watched", BOOT, NOW)
    assert action is Action.RESIZE


@pytest.mark.parametrize(
    ("wanted", "has", "action"),
    [
        (["data"], ["data"], Action.NOTHING),
        (["data"], [], Action.DISKS),
        ([], ["data"], Action.DISKS),
        (["data", "logs"], ["logs", "data"], Action.NOTHING),
    ],
)
def test_disks(wanted: list[str], has: list[str], action: Action) -> None:
    wish = instance("running", 1)
    options = MachineOptions(disks=[FurtherDisk(name=name, size=1 << 30) for name in wanted])
    wish = msgspec.structs.replace(wish, spec=msgspec.structs.replace(wish.spec, options=options))
    running = observed("running", (1, BOOT))
    assert decide(wish, status("running", 1, disks=has), running, "watched", BOOT, NOW) is action
    assert decide(wish, EXITED, observed("none", (1, BOOT)), "tidy", BOOT, NOW) is Action.NOTHING


@pytest.mark.parametrize(
    ("policy", "measured", "action"),
    [
        ("no", status("exited", 1), Action.NOTHING),
        ("always", status("exited", 1, next_start=NOW + 5), Action.WAIT),
        ("always", status("exited", 1, next_start=NOW - 5), Action.RELAUNCH),
        ("always", status("exited", 1, next_start=NOW + 1e6), Action.RELAUNCH),  # the clock was set back
        ("always", status("exited", 1), Action.RELAUNCH),  # stored by 0.1.0, or by a daemon that died
        ("on-failure", status("exited", 1), Action.NOTHING),
        ("on-failure", status("exited", 1, exit=Exit(exit_status=3, finished=1.0)), Action.RELAUNCH),
        ("always", status("failed", 1), Action.NOTHING),  # a start that the user asked for
        ("always", status("failed", 1, next_start=NOW + 5), Action.WAIT),
    ],
)
def test_restart_policies(policy: str, measured: InstanceStatus, action: Action) -> None:
    ended = observed("none", (1, BOOT))
    assert decide(instance("running", 1, policy), measured, ended, "tidy", BOOT, NOW) is action
    assert decide(instance("stopped", 1, policy), measured, ended, "tidy", BOOT, NOW) is Action.NOTHING


@pytest.mark.parametrize(
    ("policy", "wanted", "action"),
    [
        ("always", "running", Action.START_ANEW),
        ("always", "stopped", Action.START_ANEW),
        ("unless-stopped", "running", Action.START_ANEW),
        ("unless-stopped", "paused", Action.START_ANEW),
        ("unless-stopped", "stopped", Action.NOTHING),
        ("on-failure", "running", Action.NOTHING),
        ("no", "running", Action.NOTHING),
    ],
)
def test_after_a_reboot(policy: str, wanted: str, action: Action) -> None:
    measured = status("exited", 1, exit=Exit(exit_status=None, finished=1.0), next_start=NOW + 5)
    assert decide(instance(wanted, 1, policy), measured, observed("none", (1, BEFORE)), "tidy", BOOT, NOW) is action


@pytest.mark.parametrize("state", ["exited", "failed"])
def test_one_that_is_removed_when_it_ends(state: str) -> None:
    gone = instance("stopped", 1, remove=True)
    assert decide(gone, status(state, 1), observed("none", (1, BOOT)), "tidy", BOOT, NOW) is Action.REMOVE


# -- it comes to an end ------------------------------------------------------------------------------------------------


class World:
    """An instance, and actions as they change it: a model of `Lifecycle`, in which launches succeed or fail."""

    def __init__(self, wish: Instance, measured: InstanceStatus, found: Observed, hold: Hold, launches: bool) -> None:
        self.instance, self.status, self.observed, self.hold = wish, measured, found, hold
        self.launches = launches
        self.gone = False

    def decide(self) -> Action:
        return decide(self.instance, self.status, self.observed, self.hold, BOOT, NOW)

    def act(self, action: Action) -> None:
        getattr(self, action.name.lower())()

    def note(self, **fields: Any) -> None:
        self.status = msgspec.structs.replace(self.status, **fields)

    def launch(self) -> None:
        starts = self.instance.starts
        restarts = self.status.restarts + 1 if self.status.starts == starts else 0
        record = LaunchRecord(starts=starts, boot=BOOT)
        self.status = status("running", starts, pid=OTHER.pid, restarts=restarts)
        self.note(resources=self.instance.spec.resources, observed_generation=self.instance.generation)
        self.note(ports=[port.index for port in self.instance.plugged])
        self.observed, self.hold = Observed("running", OTHER, record), "watched"
        if not self.launches:
            again = after_exit(self.instance.spec.restart, Exit(exit_status=None, finished=NOW), restarts)
            self.status = status("failed", starts, next_start=NOW + delay(1) if again else None)
            self.observed, self.hold = Observed("none", record=record), "tidy"

    relaunch = launch

    def adopt(self) -> None:
        assert self.observed.running
        starts = self.observed.record.starts if self.observed.record else self.instance.starts
        self.status = status(self.observed.state, starts, pid=self.observed.running.pid)
        self.hold = "watched"

    def pause(self) -> None:
        self.observed = self.observed._replace(state="paused")
        self.note(state="paused", observed_generation=self.instance.generation)

    def unpause(self) -> None:
        self.observed = self.observed._replace(state="running")
        self.note(state="running", observed_generation=self.instance.generation)

    def resize(self) -> None:
        self.note(resources=self.instance.spec.resources)

    def disks(self) -> None:
        self.note(disks=[each.name for each in disks_of(self.instance.spec)])

    def plug(self) -> None:
        self.note(ports=[port.index for port in self.instance.plugged])

    def unplug(self) -> None:
        self.instance = msgspec.structs.replace(self.instance, ports=self.instance.plugged)

    def stop(self) -> None:
        self.observed = self.observed._replace(state="ended")
        self.note(state="stopping")

    replace = kill = stop

    def discard(self) -> None:
        self.observed, self.hold = Observed("none", record=self.observed.record), "tidy"

    def collect_exit(self) -> None:
        record = self.observed.record
        ended = Exit(exit_status=1, finished=NOW)
        again = after_exit(self.instance.spec.restart, ended, self.status.restarts)
        starts = record.starts if record else self.instance.starts
        self.status = status("exited", starts, exit=ended, next_start=NOW + delay(0) if again else None)
        self.discard()

    lost = collect_exit

    def start_anew(self) -> None:
        self.instance = msgspec.structs.replace(
            self.instance, wanted="running", starts=self.instance.starts + 1, generation=self.instance.generation + 1
        )

    def remove(self) -> None:
        self.gone = True


STATES = ("created", "starting", "running", "paused", "stopping", "exited", "failed")
worlds = st.builds(
    World,
    st.builds(
        instance,
        st.sampled_from(("running", "paused", "stopped", "removed")),
        st.integers(0, 2),
        st.sampled_from(("no", "always", "unless-stopped", "on-failure")),
        remove=st.booleans(),
        generation=st.integers(1, 2),
        ports=st.sampled_from(([], [FIRST], [FIRST, SECOND], [FIRST, LEAVING], [LEAVING])),
    ),
    st.builds(
        status,
        st.sampled_from(STATES),
        st.integers(0, 2),
        next_start=st.sampled_from((None, NOW - 1, NOW + 1)),
        ports=st.sampled_from(([], [0], [1], [0, 1])),
        disks=st.sampled_from(([], ["data"])),
    ),
    st.builds(
        observed,
        st.sampled_from(get_args(ObservedState)),
        st.none() | st.tuples(st.integers(0, 2), st.sampled_from((BOOT, BEFORE))),
    ),
    st.sampled_from(get_args(Hold)),
    st.booleans(),
)


@given(worlds)
def test_the_actions_come_to_an_end(world: World) -> None:
    """And then it is as it is wanted."""
    for _ in range(STEPS):
        action = world.decide()
        if action in DONE or world.gone:
            break
        world.act(action)
    assert action in DONE or world.gone
    if world.gone:
        assert world.instance.wanted == "removed" or world.instance.spec.remove
        assert world.observed.state == "none"
    elif world.instance.wanted == "stopped":
        assert world.observed.state == "none"
    elif world.observed.state in ("starting", "running", "paused"):
        assert world.observed.record and world.observed.record.starts == world.instance.starts
        assert (world.hold, world.status.state) == ("watched", world.observed.state)
        assert {port.index for port in world.instance.ports} <= {*world.status.ports}
    else:
        assert world.status.state in ("exited", "failed") and world.hold == "tidy"


def test_every_action_is_reached() -> None:
    """The control: what the model of the test does is what `decide` can ask for."""
    seen = set()
    for wanted, policy, state, known, hold, record in itertools.product(
        ("running", "paused", "stopped", "removed"), ("no", "always"), get_args(ObservedState), STATES, get_args(Hold),
        (None, (1, BOOT), (2, BOOT), (2, BEFORE)),
    ):  # fmt: skip
        for later in (None, NOW + 1):
            wish = instance(wanted, 2, policy, generation=2)
            measured = status(known, 2, next_start=later)
            seen.add(decide(wish, measured, observed(state, record), hold, BOOT, NOW))
    measured = status("running", 2, resources=Resources(memory=1))
    seen.add(decide(instance("running", 2), measured, observed("running", (2, BOOT)), "watched", BOOT, NOW))
    measured = status("running", 2, disks=["data"])
    seen.add(decide(instance("running", 2), measured, observed("running", (2, BOOT)), "watched", BOOT, NOW))
    for port in (FIRST, LEAVING):
        wish = instance("running", 2, ports=[port])
        seen.add(decide(wish, status("running", 2), observed("running", (2, BOOT)), "watched", BOOT, NOW))
    assert seen == set(Action)
