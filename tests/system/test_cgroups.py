"""Limits of control groups: real groups, real processes, with the version that the host has."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from insula.control.instances.drivers.container import spec
from insula.kernel import syscalls
from insula.kernel.cgroups import Cgroup, Hierarchy, hierarchy
from insula.kernel.seccomp.load import load
from insula.model.objects import Resources
from tests.forked import Killed, errno_of, forked
from tests.support import groups
from tests.support.groups import Counter, inside, running, spin, touch
from tests.support.machine import Run
from tests.support.wait import patiently, until

MIB = 1 << 20
V1 = hierarchy().version == 1
TREES = groups.trees()
only_v1 = pytest.mark.skipif(not V1, reason="version 1 only: this host has version 2")
only_v2 = pytest.mark.skipif(V1, reason="version 2 only: this host has version 1")


@pytest.fixture
def group(run_: Run) -> Iterator[Cgroup]:
    with groups.made(run_.name) as group:
        yield group


@pytest.fixture(params=TREES)
def either(run_: Run, request: pytest.FixtureRequest) -> Iterator[Cgroup]:
    """For what version 2 has without any controller."""
    with groups.made(run_.name, TREES[request.param]) as group:
        yield group


def content(group: Cgroup, controller: str, file: str) -> str:
    return Path(group.directory(controller) or "", file).read_text().strip()


# -- memory -----------------------------------------------------------------------------------------------------------


def test_memory_runs_out(group: Cgroup) -> None:
    group.limit({"memory": {"limit": 32 * MIB, "swap": 32 * MIB}})
    with group.oom_notifications() as notifications:
        poll = select.poll()
        poll.register(notifications, select.POLLIN)
        assert inside(group, lambda: len(touch(8 * MIB))) == 8 * MIB  # the control
        assert notifications.take() == 0
        with pytest.raises(Killed) as caught:
            inside(group, lambda: len(touch(64 * MIB)))
        assert caught.value.signum == signal.SIGKILL
        assert poll.poll(1000 * patiently(10)), "nobody was told"
        until(lambda: notifications.take() == 1, "the kill is counted")
    assert group.oom_kills() == 1
    group.update({"memory": {"limit": 128 * MIB, "swap": 128 * MIB}})
    assert inside(group, lambda: len(touch(64 * MIB))) == 64 * MIB


def test_memory_events_end_with_the_group(group: Cgroup) -> None:
    with group.oom_notifications() as notifications, running(group, spin):
        notifications.take()
        poll = select.poll()
        poll.register(notifications, select.POLLIN)
        assert poll.poll(0) == []
        group.remove()
        assert poll.poll(1000 * patiently(10))
        assert notifications.take() == 0


@pytest.mark.parametrize(("limit", "swap"), [(64, 64), (16, 16), (64, 128), (256, 512), (300, 300), (20, 30), (-1, -1)])
def test_memory_and_swap_are_raised_and_lowered_in_any_step(group: Cgroup, limit: int, swap: int) -> None:
    unit = MIB if limit > 0 else 1
    group.limit({"memory": {"limit": 64 * MIB, "swap": 96 * MIB}})
    group.update({"memory": {"limit": limit * unit, "swap": swap * unit}})
    memory = group.stats()["memory"]
    assert (memory["limit"], memory["swap_limit"]) == (
        (limit * MIB, (swap - limit) * MIB) if limit > 0 else (None, None)
    )


def test_no_limit_of_memory_is_no_limit_of_swap(group: Cgroup) -> None:
    group.limit({"memory": {"limit": 64 * MIB, "swap": 64 * MIB}})
    group.update({"memory": {"limit": -1}})
    memory = group.stats()["memory"]
    assert memory["limit"] is memory["swap_limit"] is None


def test_a_limit_below_usage_is_refused_first(group: Cgroup) -> None:
    group.limit({"memory": {"limit": 64 * MIB}})

    def use() -> None:
        memory = touch(16 * MIB)
        time.sleep(1000)
        del memory

    with running(group, use) as process:
        until(lambda: group.stats()["memory"]["usage"] > 12 * MIB, "memory is used")
        with pytest.raises(
            OSError, match=r"linux\.resources\.memory\.limit: 4194304 is less than the \d+ bytes in use"
        ):
            group.update({"memory": {"limit": 4 * MIB, "checkBeforeUpdate": True}})
        assert group.stats()["memory"]["limit"] == 64 * MIB
        group.update({"memory": {"limit": 48 * MIB, "checkBeforeUpdate": True}})
        assert group.stats()["memory"]["limit"] == 48 * MIB
        assert process.alive()


@only_v1
def test_memory_settings_of_version_1_only(group: Cgroup) -> None:
    group.limit({"memory": {"reservation": 8 * MIB, "swappiness": 7, "disableOOMKiller": True, "useHierarchy": True}})
    files = ("memory.soft_limit_in_bytes", "memory.swappiness", "memory.use_hierarchy")
    assert [content(group, "memory", file) for file in files] == [str(8 * MIB), "7", "1"]
    assert "oom_kill_disable 1" in content(group, "memory", "memory.oom_control")


@only_v2
def test_settings_of_version_2_only(group: Cgroup) -> None:
    group.limit({"unified": {"memory.high": str(24 * MIB), "cpu.weight": "77"}, "memory": {"reservation": MIB}})
    assert content(group, "memory", "memory.high") == str(24 * MIB)
    assert (content(group, "cpu", "cpu.weight"), content(group, "memory", "memory.low")) == ("77", str(MIB))
    with pytest.raises(OSError, match=r"linux\.resources\.memory\.swappiness"):
        group.limit({"memory": {"swappiness": 7}})


# -- processes and processors -----------------------------------------------------------------------------------------


def test_processes_are_counted(group: Cgroup) -> None:
    def forks() -> int:
        made: list[int] = []
        try:
            while len(made) < 20:
                made.append(os.fork())
                if made[-1] == 0:
                    time.sleep(60)
                    os._exit(0)
        except BlockingIOError:  # EAGAIN
            pass
        for pid in made:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        return len(made)

    assert inside(group, forks) == 20
    group.update({"pids": {"limit": 5}})
    assert inside(group, forks) == 4
    group.update({"pids": {"limit": -1}})
    assert inside(group, forks) == 20


def test_a_quota_throttles(group: Cgroup) -> None:
    with running(group, spin):
        start = group.stats()["cpu"]["usage"]
        until(lambda: group.stats()["cpu"]["usage"] > start + 20_000_000, "it works")
        assert not group.stats()["cpu"].get("throttled_periods")  # the control
        group.update({"cpu": {"quota": 5000, "period": 50_000}})
        until(lambda: group.stats()["cpu"]["throttled_periods"] > 2, "it is throttled")
        until(lambda: group.stats()["cpu"]["throttled"] > 0, "how long is counted")
        cpu = group.stats()["cpu"]
        assert cpu["periods"] >= cpu["throttled_periods"]
        group.update({"cpu": {"quota": -1}})


@pytest.mark.parametrize("steps", [[(90_000, 100_000), (9_000, 10_000)], [(20_000, 40_000), (80_000, 160_000)]])
def test_quota_and_period_change_together(group: Cgroup, steps: list[tuple[int, int]]) -> None:
    """Whichever is first, in between a child would have more than its parent."""
    parent = Cgroup(os.path.dirname(group.path))
    parent.limit({"cpu": {"quota": 95_000, "period": 100_000}})
    for quota, period in steps:
        group.update({"cpu": {"quota": quota, "period": period}})
        found = group.values()
        in_force = f"{found['cpu.cfs_quota_us']} {found['cpu.cfs_period_us']}" if V1 else found["cpu.max"]
        assert in_force == f"{quota} {period}"
    with pytest.raises(OSError, match=r"linux\.resources\.cpu\.(quota|period)") if V1 else _allowed():
        group.update({"cpu": {"quota": 200_000, "period": 100_000}})  # version 2 lets a child have more in words


class _allowed:
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


def test_shares_idle_and_burst(group: Cgroup) -> None:
    group.limit({"cpu": {"shares": 512, "quota": 50_000, "period": 100_000, "burst": 10_000}})
    burst = "cpu.cfs_burst_us" if V1 else "cpu.max.burst"
    assert content(group, "cpu", burst) == "10000"
    assert content(group, "cpu", "cpu.shares" if V1 else "cpu.weight") == ("512" if V1 else "59")
    group.update({"cpu": {"idle": 1, "shares": 512}})
    assert content(group, "cpu", "cpu.idle") == "1"
    group.update({"cpu": {"idle": 0, "shares": 1024}})
    assert content(group, "cpu", "cpu.shares" if V1 else "cpu.weight") == ("1024" if V1 else "100")


def test_cpusets_apply_to_running_processes(group: Cgroup) -> None:
    """In version 1 the set has no group yet when the process is there already, and begins empty."""
    with running(group, spin) as process:
        group.limit({"cpu": {"cpus": "0", "mems": "0"}})
        assert os.sched_getaffinity(process.pid) == {0}
        assert inside(group, lambda: os.sched_getaffinity(0)) == {0}
        other = sorted(os.sched_getaffinity(0) - {0})
        if other:
            group.update({"cpu": {"cpus": str(other[0])}})
            assert os.sched_getaffinity(process.pid) == {other[0]}
    with pytest.raises(OSError, match=r"linux\.resources\.cpu\.cpus"):
        group.update({"cpu": {"cpus": "99999"}})


# -- stop and go, and the end -----------------------------------------------------------------------------------------


def test_frozen_processes_stand_still(either: Cgroup) -> None:
    counter = Counter()
    with running(either, counter):
        until(lambda: counter.value > 100, "it counts")
        assert not either.frozen()
        either.freeze()
        assert either.frozen()
        at = counter.value
        time.sleep(0.2)
        assert counter.value == at
        either.thaw()
        assert not either.frozen()
        until(lambda: counter.value > at, "it goes on")


def test_a_frozen_group_can_be_killed_and_removed(either: Cgroup) -> None:
    counter = Counter()
    with running(either, counter) as process:
        until(lambda: counter.value > 100, "it counts")
        either.freeze()
        either.remove()
        assert process.end() == -signal.SIGKILL
        assert not either.exists() and not either.frozen()
        with pytest.raises(FileNotFoundError):
            either.stats()
        either.thaw()


def test_a_frozen_parent_freezes_those_below(either: Cgroup) -> None:
    counter, parent = Counter(), Cgroup(os.path.dirname(either.path), either.tree)
    with running(either, counter):
        until(lambda: counter.value > 100, "it counts")
        parent.freeze()
        at = counter.value
        time.sleep(0.1)
        assert counter.value == at and either.frozen()
        parent.thaw()
        until(lambda: counter.value > at, "it goes on")


def test_groups_below_are_killed_and_removed_too(either: Cgroup) -> None:
    below = Cgroup(f"{either.path}/below", either.tree)
    below.create()
    with running(below, spin) as process:
        assert either.processes() == below.processes() == [process.pid]
        either.signal(signal.SIGSTOP)
        assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
        either.remove()
        assert not below.exists()
        assert process.end() == -signal.SIGKILL


# -- the other controllers --------------------------------------------------------------------------------------------


def block_device() -> dict[str, int]:
    for name in sorted(os.listdir("/sys/block"), key=lambda name: name.startswith("loop")):
        major, minor = Path("/sys/block", name, "dev").read_text().strip().split(":")
        return {"major": int(major), "minor": int(minor)}
    pytest.skip("this host has no block device")


def test_input_and_output(group: Cgroup) -> None:
    device = block_device()
    name, rates = f"{device['major']}:{device['minor']}", {"throttleReadBpsDevice": [{**device, "rate": 5 * MIB}]}
    group.limit({"blockIO": rates | {"throttleWriteIOPSDevice": [{**device, "rate": 50}]}})

    def in_force() -> str:
        files = ("blkio.throttle.read_bps_device", "blkio.throttle.write_iops_device") if V1 else ("io.max",)
        return " ".join(content(group, "blkio", file) for file in files)

    wanted = f"{name} {5 * MIB} {name} 50" if V1 else f"{name} rbps={5 * MIB} wbps=max riops=max wiops=50"
    assert in_force() == wanted
    with pytest.raises(OSError, match=r"linux\.resources\.pids\.limit"):
        group.update({"blockIO": {"throttleReadBpsDevice": [{**device, "rate": MIB}]}, "pids": {"limit": 1 << 62}})
    if not V1:  # where pids come first
        assert in_force() == wanted
    with pytest.raises(OSError, match=r"linux\.resources\.blockIO\.throttleReadBpsDevice"):
        group.update({"blockIO": {"throttleReadBpsDevice": [{"major": 0, "minor": 4095, "rate": 1}]}})
    group.update(
        {"blockIO": {key: [{**device, "rate": 0}] for key in ("throttleReadBpsDevice", "throttleWriteIOPSDevice")}}
    )
    assert in_force().strip() == ""


@pytest.mark.skipif("v2 beside v1" not in TREES and V1, reason="huge pages take a version 2 tree here")
def test_huge_pages(run_: Run) -> None:
    tree = TREES.get("v2 beside v1") or hierarchy()
    sizes = [name.split("-")[1].removesuffix("kB") for name in os.listdir("/sys/kernel/mm/hugepages")]
    if "2048" not in sizes:
        pytest.skip("this processor has no huge pages of 2 MB")
    with groups.made(run_.name, tree) as group:
        group.limit({"hugepageLimits": [{"pageSize": "2MB", "limit": 4 * MIB}]})
        assert group.stats()["hugetlb"]["2MB"]["limit"] == 4 * MIB
        assert content(group, "hugetlb", "hugetlb.2MB.rsvd.max") == str(4 * MIB)


def test_a_missing_controller_is_named(group: Cgroup) -> None:
    for resources, field in (
        ({"rdma": {"nothing": {"hcaHandles": 1}}}, r"rdma\.nothing"),
        ({"unified": {"no.such": "1"}}, r"unified"),
        ({"blockIO": {"leafWeight": 10}}, r"blockIO\.leafWeight"),
        ({"hugepageLimits": [{"pageSize": "3MB", "limit": 1}]}, "hugepageLimits"),
    ):
        with pytest.raises(OSError, match=rf"linux\.resources\.{field}"):
            group.limit(resources)


def test_a_change_that_fails_half_way_is_taken_back(group: Cgroup) -> None:
    group.limit({"memory": {"limit": 64 * MIB, "swap": 96 * MIB}, "cpu": {"shares": 512}, "pids": {"limit": 20}})
    before = group.values()
    with pytest.raises(OSError, match=r"linux\.resources\.pids\.limit"):
        group.update(
            {"memory": {"limit": 200 * MIB, "swap": 300 * MIB}, "cpu": {"shares": 99}, "pids": {"limit": 1 << 62}}
        )
    assert group.values() == before
    group.update({"memory": {"limit": 200 * MIB, "swap": 300 * MIB}, "cpu": {"shares": 99}, "pids": {"limit": 30}})
    assert group.values() != before


# -- statistics -------------------------------------------------------------------------------------------------------


def test_statistics(group: Cgroup) -> None:
    group.limit({"memory": {"limit": 64 * MIB, "swap": 64 * MIB}, "pids": {"limit": 9}})
    before = group.stats()
    with running(group, spin):
        until(lambda: group.stats()["cpu"]["usage"] > before["cpu"]["usage"] + 30_000_000, "its time is counted")
        found = group.stats()
        assert found["pids"] == {"current": 1, "limit": 9}
    inside(group, lambda: len(touch(16 * MIB)))
    memory = group.stats()["memory"]
    assert memory["limit"] == 64 * MIB and memory["swap_limit"] == 0 and memory["oom_kills"] == 0
    assert memory.get("peak", 16 * MIB) >= 16 * MIB
    assert 0 <= memory["working_set"] <= memory["usage"] < 16 * MIB
    assert "inactive_file" in memory["stat"]


def test_pressure_of_a_group(either: Cgroup) -> None:
    found = either.stats().get("pressure")
    if either.tree.unified and os.path.exists(f"{either.directory('')}/cpu.pressure"):
        assert found and 0 <= found["cpu"]["some"]["avg10"] <= 100
    else:
        assert found is None


def test_a_group_that_never_existed() -> None:
    missing = Cgroup("insula-nobody/here", Hierarchy(hierarchy().unified, hierarchy().controllers))
    assert not missing.exists() and not missing.frozen() and missing.processes() == []
    missing.thaw()
    missing.remove()
    with pytest.raises(FileNotFoundError):
        missing.stats()
    assert errno_of(lambda: missing.limit({"pids": {"limit": 5}})) == errno.ENOENT
    assert forked(lambda: errno_of(missing.open)) == errno.ENOENT


# -- buffers of sockets -----------------------------------------------------------------------------------------------

AS_MUCH_AS_WANTED = 96 * MIB


def fill_sockets(kind: int) -> int:
    """Fill buffers of TCP or UDP sockets that are not read, on the loopback of a network namespace of its own."""
    syscalls.unshare(syscalls.CLONE_NEWNET)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    held, taken, refused = [], 0, 0
    while taken < AS_MUCH_AS_WANTED and refused < 20:
        before = taken
        with socket.socket(socket.AF_INET, kind) as target:
            target.bind(("127.0.0.1", 0))
            if kind == socket.SOCK_STREAM:
                target.listen()
            sender = socket.create_connection(target.getsockname()) if kind == socket.SOCK_STREAM else None
            receiver = target.accept()[0] if sender else target.dup()
            held += [sender, receiver]
            sock = sender or socket.socket(socket.AF_INET, kind)
            sock.setblocking(False)
            with contextlib.suppress(OSError):
                if sender:
                    while True:
                        taken += sender.send(b"x" * 65536)
                size = 0
                while size < 200 * 1024:  # net.core.rmem_default
                    size += sock.sendto(b"x" * 32768, receiver.getsockname())
            if not sender:
                taken += unread(receiver)
        refused += taken - before < 65536
    return taken


def unread(sock: socket.socket) -> int:
    """What there is to read, datagrams being looked at and put into another's buffer no more."""
    info = bytearray(4 * 9)  # SO_MEMINFO, sock_diag(7): SK_MEMINFO_RMEM_ALLOC comes first
    info[:] = sock.getsockopt(socket.SOL_SOCKET, 55, len(info))
    return int.from_bytes(info[:4], sys.byteorder)


@only_v1
@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM], ids=["TCP", "UDP"])
def test_a_memory_limit_counts_the_buffers_of_sockets(group: Cgroup, kind: int) -> None:
    """Version 1 doesn't by itself."""
    assert inside(group, lambda: fill_sockets(kind)) >= AS_MUCH_AS_WANTED, "the control"
    assert content(group, "memory", "memory.kmem.tcp.max_usage_in_bytes") == "0", "nothing was counted"
    for limit in (24 * MIB, 48 * MIB):
        group.update({"memory": {"limit": limit, "swap": limit}})
        assert inside(group, lambda: fill_sockets(kind)) < 2 * limit
        assert limit / 2 < int(content(group, "memory", "memory.kmem.tcp.max_usage_in_bytes")) < 1.5 * limit
    group.update({"memory": {"limit": -1}})
    assert inside(group, lambda: fill_sockets(kind)) >= AS_MUCH_AS_WANTED


@only_v1
def test_a_limit_above_counts_the_buffers_of_sockets(group: Cgroup) -> None:
    """A tenant's limit holds for the sockets of an instance without one of its own, because that counts them too."""
    Cgroup(os.path.dirname(group.path)).limit({"memory": {"limit": 24 * MIB}})
    assert inside(group, lambda: fill_sockets(socket.SOCK_STREAM)) >= AS_MUCH_AS_WANTED, "the control"
    group.limit(spec.resources(Resources()))
    assert inside(group, lambda: fill_sockets(socket.SOCK_STREAM)) < 48 * MIB


# -- seccomp filters --------------------------------------------------------------------------------------------------


def test_seccomp_filters_are_charged(group: Cgroup) -> None:
    """Their machine code has a bound of the whole host (net.core.bpf_jit_limit). The filters are charged, more than it
    is: whoever fills it needs the memory."""
    instructions, each = 4000, 7  # together less than the 32768 that a process may have
    program = struct.pack("HBBI", 0x20, 0, 0, 0) * (instructions - 1) + struct.pack("HBBI", 0x06, 0, 0, 0x7FFF0000)
    file = "memory.usage_in_bytes" if V1 else "memory.current"

    def used() -> int:
        return int(content(group, "memory", file))

    def grown(filters: int) -> int:
        """How much more the group uses when each of eight children has loaded so many filters."""
        children = []
        (ready, tell), (wait, go) = os.pipe(), os.pipe()
        for _ in range(8):
            if (child := os.fork()) == 0:
                syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
                os.write(tell, b"born")
                os.read(wait, 1)
                for _ in range(filters):
                    load(program)
                os.write(tell, b"done")
                signal.pause()
            children.append(child)
        os.close(tell)
        for _ in children:
            assert os.read(ready, 4) == b"born"
        before = used()
        os.write(go, bytes(len(children)))
        for _ in children:
            assert os.read(ready, 4) == b"done"
        after = used()
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        return after - before

    without, with_ = inside(group, lambda: (grown(0), grown(each)))
    assert with_ - without > 8 * each * len(program), (without, with_)
