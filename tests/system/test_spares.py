"""Warm containers: they equal ordinary ones in everything, and leave nothing."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from insula.container.service.client import Launch, Runtime
from insula.kernel.cgroups import Cgroup
from insula.model.errors import Failed
from tests.support.daemon import Daemon
from tests.support.host import Host, started, with_runtime
from tests.support.snapshot import assert_unchanged
from tests.support.wait import eventually, until

LOOK = """
id; umask; pwd; tty; cat /proc/1/cgroup /proc/self/mountinfo /proc/sys/kernel/hostname
grep -E '^(Cap|NoNewPrivs|Seccomp|Groups|Sig|Umask)' /proc/self/status; cat /proc/self/oom_score_adj /proc/net/dev
ls -la /proc/self/fd /dev /sys/fs/cgroup; cat /proc/keys
echo uid_map $(cat /proc/self/uid_map) gid_map $(cat /proc/self/gid_map)
"""


RIGHTS = ("uid=", "uid_map", "Cap", "NoNewPrivs", "Seccomp", "Groups", "Sig", "Umask")
"""How lines begin that must be equal to the last digit."""


def without_numbers(line: str) -> str:
    """A mount without the fields that differ for each file system."""
    words = line.split(" - ")[0].split()[3 if " - " in line else 0 :]  # its ID, its parent's, and its device
    return " ".join(word for word in words if not any(c.isdigit() for c in word) or len(word) < 3)


def grep(directory: Path, word: str) -> list[str]:
    """The files of a directory that have a word in them; others may vanish meanwhile."""
    return subprocess.run(["grep", "-lrs", word, directory], capture_output=True, text=True).stdout.split()


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    host = Host(tmp_path)
    yield host
    host.close()


async def offered(runtime: Runtime, host: Host) -> str:
    """The id of a spare, which there is once something was launched."""
    await started(runtime, warm := host.launch("true"))
    await runtime.wait(warm.id)
    await runtime.delete(warm.id)
    await eventually(lambda: runtime._warm_ids.get(host.cgroup), "a spare is offered")
    chosen = runtime.choose_id(host.cgroup)
    assert (host.run / "spares" / chosen).exists()
    return chosen


def first_process(host: Host, launch: Launch) -> int:
    """The first process of the group, whatever program it is by now."""
    (pid,) = Cgroup(launch.cgroup).processes()
    return pid


def test_a_spare_becomes_the_container(host: Host) -> None:
    async def body(runtime: Runtime) -> None:
        launch = host.launch("sleep", "60", name=await offered(runtime, host))
        before = first_process(host, launch)
        state = await runtime.create(launch)
        assert state.pid == before
        assert not (host.run / "spares" / launch.id).exists()
        await runtime.start(launch.id)
        until(lambda: Path(f"/proc/{before}/cmdline").read_bytes() == b"sleep\x0060\x00", "it runs its program")
        await runtime.delete(launch.id)
        assert not Cgroup(launch.cgroup).exists()

    with_runtime(host, body)


def test_a_spare_container_equals_an_ordinary_one(host: Host) -> None:
    """A program's view of itself and its surroundings, line by line, without lines that always differ."""

    async def look(runtime: Runtime, name: str) -> list[str]:
        launch = host.launch("sh", "-c", LOOK, name=name)
        launch.config["hostname"] = "here"
        launch.config["process"]["capabilities"] = {"bounding": ["CAP_CHOWN"], "effective": ["CAP_CHOWN"]}
        await started(runtime, launch)
        await runtime.wait(launch.id)
        # numbers of devices, mounts and pipes, sizes and times differ from one to the next
        lines = host.output(launch).splitlines()
        await runtime.delete(launch.id)
        return sorted(line if line.startswith(RIGHTS) else without_numbers(line) for line in lines)

    async def body(runtime: Runtime) -> None:
        usual = await look(runtime, "")
        ahead = await look(runtime, await offered(runtime, host))
        assert len(usual) > 50
        assert "CapBnd:\t0000000000000001" in usual
        assert "uid_map 0 1342177280 65536 gid_map 0 1342177280 65536" in usual
        assert ahead == usual

    with_runtime(host, body)


def test_a_spare_that_does_not_match_is_not_used(host: Host) -> None:
    async def body(runtime: Runtime) -> None:
        launch = host.launch("cat", "/proc/version", name=await offered(runtime, host))
        launch.config["linux"]["maskedPaths"].append("/proc/version")
        spare = first_process(host, launch)
        state = await runtime.create(launch)
        assert state.pid != spare
        assert not os.path.exists(f"/proc/{spare}")
        await runtime.start(launch.id)
        await runtime.wait(launch.id)
        assert host.output(launch) == ""  # masked all the same
        await runtime.delete(launch.id)

    with_runtime(host, body)


def test_a_failed_spare_leaves_nothing(host: Host) -> None:
    async def body(runtime: Runtime) -> None:
        launch = host.launch("true", name=await offered(runtime, host))
        spare = first_process(host, launch)
        assert os.path.exists(f"/proc/{spare}")
        with pytest.raises(Failed) as caught:
            await runtime.create(launch._replace(upper="/nowhere"))
        assert caught.value.message == "cannot prepare: mount overlay: fsconfig: No such file or directory upperdir"
        assert not os.path.exists(f"/proc/{spare}")
        assert not Cgroup(launch.cgroup).exists()
        assert launch.id not in runtime.ids()
        assert not (host.run / "spares" / launch.id).exists()
        other = host.launch("true", name=await offered(runtime, host))  # the control: the next one is taken
        spare = first_process(host, other)
        assert other.id != launch.id and (await runtime.create(other)).pid == spare
        await runtime.delete(other.id)

    with_runtime(host, body)


def test_spares_die_with_the_zygote_and_the_next_one_cleans_up(host: Host) -> None:
    async def body(runtime: Runtime) -> None:
        chosen = await offered(runtime, host)
        group = Cgroup(f"{host.cgroup}/{chosen}")
        (spare,) = group.processes()
        host.kill("zygote")
        await eventually(lambda: not os.path.exists(f"/proc/{spare}"), "the spare is dead")
        await eventually(lambda: not group.exists(), "its group is gone")
        await eventually(lambda: not (host.run / "spares" / chosen).exists(), "and then its record")
        launch = host.launch("true", name=chosen)  # the id is still good
        await started(runtime, launch)
        assert (await runtime.wait(launch.id)).exit_status == 0
        await runtime.delete(launch.id)

    with_runtime(host, body)


def test_spares_go_with_the_client_that_was_offered_them(host: Host) -> None:
    """It may have connected some of them to a network."""
    processes: list[int] = []

    async def body(runtime: Runtime) -> None:
        chosen = await offered(runtime, host)
        await eventually(lambda: runtime._warm_ids.get(host.cgroup), "another spare is offered")
        other = runtime.choose_id(host.cgroup)
        for name in (chosen, other):
            warm = runtime.warm(name)
            assert warm and Cgroup(f"{host.cgroup}/{name}").processes() == [warm.pid]
            processes.append(warm.pid)

    async def next_one(runtime: Runtime) -> None:
        await eventually(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in processes), "they are dead")
        await eventually(lambda: runtime._warm_ids.get(host.cgroup), "there are new ones")  # the control
        warm = runtime.warm(chosen := runtime.choose_id(host.cgroup))
        assert warm and warm.pid not in processes
        assert runtime.warm("0" * 32) is None
        launch = host.launch("true", name=chosen)
        assert await runtime.create(launch) == warm
        assert runtime.warm(chosen) is None
        await runtime.delete(launch.id)

    with_runtime(host, body)
    with_runtime(host, next_one)


@contextlib.contextmanager
def connected_early(daemon: Daemon, name: str) -> Iterator[int]:
    """The process of a spare that `insula run` has chosen and connected to the network, while the zygote is stopped:
    it has made nothing of the spare yet."""
    zygote = daemon.pid("zygote")
    assert zygote

    def spares() -> list[int]:
        groups = [Cgroup(f"{daemon.prefix}/default/{path.name}") for path in (daemon.run / "spares").glob("*")]
        return [pid for group in groups if group.exists() for pid in group.processes()]

    started: list[subprocess.Popen[str]] = []

    def attempt() -> int:
        ahead = spares()
        os.kill(zygote, signal.SIGSTOP)
        started.append(daemon.cli.start("run", "-d", "--name", name, "busybox", "sleep", "600"))
        for _ in range(40):
            for pid in ahead:
                with contextlib.suppress(FileNotFoundError):
                    if "eth0" in Path(f"/proc/{pid}/net/dev").read_text():
                        return pid
            time.sleep(0.05)
        os.kill(zygote, signal.SIGCONT)  # no spare was offered yet
        started[-1].communicate(timeout=60)
        daemon.cli.ok("rm", "-f", name)
        return 0

    try:
        yield until(attempt, "a spare is connected")
    finally:
        os.kill(zygote, signal.SIGCONT)
        started[-1].communicate(timeout=60)


@pytest.mark.parametrize("victim", ["", "spare", "insulad"])
def test_a_spare_is_connected_before_it_becomes_the_container(fresh: Daemon, victim: str) -> None:
    """And should it or the daemon die before it does, the instance is connected all the same, and no spare is."""
    cli = fresh.cli
    cli.ok("run", "--rm", "busybox", "true")
    before = fresh.snapshot()
    with connected_early(fresh, "early") as spare:
        if victim == "spare":
            os.kill(spare, signal.SIGKILL)
            until(lambda: Path(f"/proc/{spare}/stat").read_text().rpartition(")")[2].split()[0] == "Z", "it is dead")
        elif victim:
            assert fresh.kill(victim)
    if victim == "insulad":
        fresh.launch()
        fresh.wait_until_it_answers()
    (view,) = until(lambda: [v for v in cli.json("inspect", "early") if v["status"]["pid"]], "it runs")
    assert (view["status"]["pid"] == spare) == (victim == "")
    assert view["instance"]["ports"][0]["address"] in cli.ok("exec", "early", "ip", "address", "show", "eth0")
    (gateway,) = [view["network"]["gateway"] for view in cli.json("network", "ls")]
    cli.ok("exec", "early", "ping", "-c", "1", "-W", "10", gateway)
    for path in (fresh.run / "spares").glob("*"):
        for pid in Cgroup(f"{fresh.prefix}/default/{path.name}").processes():
            assert "eth0" not in Path(f"/proc/{pid}/net/dev").read_text()
    cli.ok("rm", "-f", "early")
    if victim != "insulad":
        assert_unchanged(before, fresh.snapshot)


def test_an_instance_of_a_spare_is_guarded_like_any_other(fresh: Daemon) -> None:
    """Through the daemon: the filter, the rights and the limits that an instance has if nothing was made ahead."""
    cli, look = fresh.cli, "grep -E '^(Cap|NoNewPrivs|Seccomp:|Groups)' /proc/self/status; exec sleep 600"
    names = (f"i{number}" for number in itertools.count())

    def launched() -> tuple[str, bool]:
        """An instance's name, and whether it was made of a spare."""
        name, spares = next(names), {path.name for path in (fresh.run / "spares").glob("*")}
        cli.ok("run", "-d", "--memory", "64m", "--pids", "50", "--name", name, "busybox", "sh", "-c", look)
        return name, cli.json("inspect", name)[0]["instance"]["id"] in spares

    def seen(name: str) -> str:
        until(lambda: cli.ok("logs", name).count("Cap") == 5, f"{name} has looked")
        return cli.ok("logs", name)

    def limits(name: str) -> dict[str, str]:
        group = Cgroup(f"{fresh.prefix}/default/{cli.json('inspect', name)[0]['instance']['id']}")
        return {k: v for k, v in group.values().items() if "current" not in k and "usage" not in k}

    usual, of_a_spare = launched()
    assert not of_a_spare, "there is none yet"
    ahead = until(lambda: next((name for name, spare in [launched()] if spare), ""), "one is made of a spare")
    assert seen(ahead) == seen(usual)
    assert "Seccomp:\t2" in seen(ahead) and "NoNewPrivs:\t1" in seen(ahead)
    assert limits(ahead) == limits(usual) and str(64 << 20) in limits(ahead).values()


def test_spares_go_with_their_tenant(fresh: Daemon) -> None:
    cli = fresh.cli
    cli.ok("run", "--rm", "busybox", "true")  # the default tenant has some of its own
    before = fresh.snapshot()
    cli.ok("tenant", "create", "acme")
    cli.ok("-T", "acme", "network", "create", "default", "--subnet", "10.0.0.0/24")
    cli.ok("-T", "acme", "run", "--rm", "busybox", "true")
    group = Cgroup(f"{fresh.prefix}/acme")

    def warm() -> list[int]:
        """Without the tenant's resolver, which is in the same group."""
        return [pid for pid in group.processes() if Path(f"/proc/{pid}/comm").read_text() == "insula-warm\n"]

    until(lambda: len(warm()) == 2, "two spares of acme")
    for name in [view["network"]["name"] for view in cli.json("-T", "acme", "network", "ls")]:
        cli.ok("-T", "acme", "network", "rm", name)
    cli.ok("tenant", "rm", "acme")
    assert not group.exists()
    # the record of a spare goes after its group
    until(lambda: not grep(fresh.run / "spares", "acme"), "no spare of acme is recorded")
    assert_unchanged(before, fresh.snapshot)
