"""The tests' own tools: a leak that they can't see would make later tests worthless."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import machine
from tests.support.machine import Namespaces, Run
from tests.support.snapshot import Snapshot, assert_unchanged
from tests.support.wait import until

PREFIX_OF_LEAKS = "leak"
Leak = Callable[[Namespaces, Path], list[str]]


@pytest.fixture(scope="module")
def namespaces() -> Iterator[Namespaces]:
    namespaces = Namespaces()
    yield namespaces
    namespaces.close()


def leak_process(_: Namespaces, __: Path) -> list[str]:
    return ["sleep", "60"]


def leak_namespace(_: Namespaces, __: Path) -> list[str]:
    return ["unshare", "--uts", "--", "sleep", "60"]


def leak_device(namespaces: Namespaces, _: Path) -> list[str]:
    namespaces.ip(namespaces.host, "link add leak0 type bridge")
    return namespaces.wrap(namespaces.host, "ip", "link", "delete", "leak0")


def leak_rule(namespaces: Namespaces, _: Path) -> list[str]:
    subprocess.run(namespaces.wrap(namespaces.host, "nft", "add", "table", "inet", "leak"), check=True)
    return namespaces.wrap(namespaces.host, "nft", "delete", "table", "inet", "leak")


def leak_mount(_: Namespaces, path: Path) -> list[str]:
    subprocess.run(["mount", "-t", "tmpfs", "none", str(path)], check=True)
    return ["umount", str(path)]


def leak_file(_: Namespaces, path: Path) -> list[str]:
    (path / "leak").touch()
    return ["rm", str(path / "leak")]


@pytest.mark.parametrize(
    ("leak", "kind"),
    [
        (leak_process, "processes"),
        (leak_namespace, "namespaces"),
        (leak_device, "devices"),
        (leak_rule, "rules"),
        (leak_mount, "mounts"),
        (leak_file, "files"),
    ],
)
def test_a_leak_of_each_kind_is_seen(leak: Leak, kind: str, namespaces: Namespaces, tmp_path: Path) -> None:
    def take() -> Snapshot:
        return Snapshot.take(PREFIX_OF_LEAKS, namespaces.host, tmp_path)

    def seen() -> bool:
        return any(line.startswith(f"{kind}: appeared") for line in before.difference(take()))

    before = take()
    cleanup = leak(namespaces, tmp_path)
    if cleanup[0] in ("sleep", "unshare"):
        with subprocess.Popen(cleanup) as process:
            until(seen, f"the leak shows among the {kind}", timeout=5)
            with pytest.raises(AssertionError, match=kind):
                assert_unchanged(before, take, timeout=0.3)
            process.kill()
    else:
        assert seen()
        subprocess.run(cleanup, check=True)
    assert_unchanged(before, take, timeout=5)


def test_a_leaked_control_group_is_seen(run_: Run, namespaces: Namespaces) -> None:
    before = Snapshot.take(run_.name, namespaces.host)
    group = next(path for path in machine.CGROUPS.glob("*") if (path / "cgroup.procs").exists()) / run_.name
    group.mkdir()
    try:
        seen = before.difference(Snapshot.take(run_.name, namespaces.host))
        # of other daemons' processes some may come and go meanwhile
        assert [line for line in seen if line.startswith("cgroups")] == [f"cgroups: appeared: {group}"]
    finally:
        group.rmdir()


def test_the_machine_is_closed() -> None:
    """No device but the loopback: no packet can leave; and PID 1 is an init of our own."""
    assert machine.inside()
    devices = subprocess.run(["ip", "-brief", "link"], capture_output=True, text=True, check=True).stdout
    assert [line.split()[0] for line in devices.splitlines()] == ["lo"]
    assert Path("/proc/1/comm").read_text() == "tini\n"


def test_the_private_host_reaches_its_outside_only(namespaces: Namespaces) -> None:
    def pings(address: str, seconds: int) -> bool:
        command = namespaces.wrap(namespaces.host, "busybox", "ping", "-c1", f"-W{seconds}", address)
        return subprocess.run(command, capture_output=True).returncode == 0

    assert pings(Namespaces.OUTSIDE, 20) and pings(Namespaces.OUTSIDE6, 20)
    assert not pings("203.0.113.1", 1)
