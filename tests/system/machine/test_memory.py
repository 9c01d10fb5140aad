"""The memory of a machine: its guest may use all of it, and what ends then is a program in the guest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from insula.kernel.cgroups import Cgroup
from insula.kernel.cgroups.hierarchy import of_process
from tests.support.cli import Cli

LONG = 300.0
GUEST = 512 << 20
FILL = "dd if=/dev/zero of=/dev/null bs=60M count=1 & " * 12 + "wait; cat /proc/vmstat"


@pytest.mark.parametrize("options", [(), ("--cold",)])
def test_a_guest_that_fills_its_memory_meets_its_own_oom_killer(cli: Cli, options: tuple[str, ...]) -> None:
    """Of a template, a copy is charged for what it is the first to write to, so that its container needs more than
    that of a machine that was booted."""
    run = ("run", "-d", "--vm", *options, "--name", "vm", "-m", "512m", "--network", "none")
    cli.ok(*run, "busybox", "sleep", "1000", timeout=LONG)

    def status() -> dict[str, Any]:
        [found] = cli.json("ps", "-a")
        return dict(found["status"])

    pid = status()["pid"]
    rights, name = mapped(pid, GUEST)
    if options:
        assert (rights, name) == ("rw-p", ""), "it is nobody else's"
    else:
        assert rights == "rw-p" and name.startswith("/memfd:"), "it sees the template, and writes to pages of its own"
    killed = cli.run("exec", "vm", "sh", "-c", FILL, timeout=LONG)
    counts = dict(line.split() for line in killed.out.splitlines() if " " in line)
    assert int(counts["oom_kill"]) > 0, killed
    group = Cgroup(of_process(pid) or "")
    most = peak(group)
    assert most > GUEST, "all of its memory was filled"
    assert status()["pid"] == pid and status()["state"] == "running", "QEMU was not killed"
    assert cli.ok("exec", "vm", "echo", "it goes on") == "it goes on"
    assert most < limit(group), "nor was it near that"
    cli.ok("rm", "-f", "vm")


def mapped(shim: int, size: int) -> tuple[str, str]:
    """The rights and the name of QEMU's mapping of this size (proc_pid_maps(5)), which is the memory of the guest."""
    [qemu] = Path(f"/proc/{shim}/task/{shim}/children").read_text().split()
    for line in Path(f"/proc/{qemu}/maps").read_text().splitlines():
        addresses, rights, *_, name = line.split(maxsplit=5) if line.count("/") else [*line.split(), ""]
        begin, end = (int(each, 16) for each in addresses.split("-"))
        if end - begin == size:
            return rights, name
    raise AssertionError(f"no mapping has {size} bytes")


def peak(group: Cgroup) -> int:
    return number(group, "memory.peak", "memory.max_usage_in_bytes")


def limit(group: Cgroup) -> int:
    return number(group, "memory.max", "memory.limit_in_bytes")


def number(group: Cgroup, *names: str) -> int:
    """The contents of the first of these files that there is: version 2 of control groups, or 1."""
    for directory in group.directories().values():
        for name in names:
            if (path := Path(directory, name)).exists():
                return int(path.read_text())
    raise FileNotFoundError(names)
