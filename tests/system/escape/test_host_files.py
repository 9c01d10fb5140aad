"""Files of the host that are bind-mounted into instances can't be changed from inside.

A mount that is attached in the container's own mount namespace is not locked (mount_namespaces(7)): with CAP_SYS_ADMIN
"ro" can be taken off. Then only the file's owner stands between the container and the host's inode; so what is bound is
on a file system that is read-only itself.
"""

from __future__ import annotations

import os
import re
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from insula.kernel import mounts, sealed, syscalls
from tests.support.cli import Cli
from tests.support.wait import patiently, until
from tests.system.escape.attacks import files
from tests.system.escape.cell import Cell
from tests.system.escape.conftest import CellFactory

ITS_OWN = {"proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2"}
"""File systems that are made anew for each container."""


@pytest.fixture(scope="module", params=["--nesting", "--cap-add=SYS_ADMIN"])
def mounting(cells: CellFactory, tenant: Cli, request: pytest.FixtureRequest) -> Cell:
    """A container with an init, which may mount."""
    return cells(tenant, "--init", request.param)


def mounted(pid: int) -> dict[str, tuple[str, str, str]]:
    """By mount point: the file system's type, what of it is mounted, and its options (proc_pid_mountinfo(5))."""
    found = {}
    for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines():
        before, after = line.split(" - ")
        fields, (kind, _, options) = before.split(), after.split(" ", 2)
        found[fields[4]] = (kind, fields[3], options)
    return found


def test_the_list_of_host_files_is_complete(mounting: Cell) -> None:
    others = {path: what for path, what in mounted(mounting.pid).items() if what[0] not in ITS_OWN}
    root, init = others.pop("/"), others.pop("/dev/init")
    assert root[0] == "overlay" and "upperdir=" in root[2]
    assert init[0] == "overlay" and "upperdir=" not in init[2] and init[2].split(",")[0] == "ro"
    assert set(others) == {"/etc/hostname", "/etc/hosts", "/etc/resolv.conf"}
    for path, (_, source, _) in others.items():
        assert re.search(rf"/instances/[0-9a-f]{{32}}{path}$", source), "the instance's own"


def test_the_init_program_cannot_be_changed(mounting: Cell) -> None:
    ends = mounting.gets(files.spoil, "/dev/init")
    assert ends.pop("remount") == "done", "the mount itself is writable then"
    assert set(ends.values()) == {"EROFS"}


@pytest.mark.parametrize("child", [False, True])
def test_the_init_program_cannot_be_changed_by_its_owner(mounting: Cell, tmp_path: Path, child: bool) -> None:
    """What if the host's file came to belong to the tenant: a sealed one stays as it is, an ordinary one doesn't.

    `child`: as it is done before Linux 6.15.
    """
    program = tmp_path / "program"
    program.write_text("the host's")
    program.chmod(0o755)
    os.chown(program, mounting.owner, mounting.owner)
    before = (program.read_text(), program.stat().st_mode)
    way, bind = ("child" if child else "direct"), sealed._bind_in_child
    mounting.show(
        **{
            f"sealed-{way}": lambda: bind(str(tmp_path), "program") if child else sealed.bind(str(program)),
            f"plain-{way}": lambda: mounts.bind(str(program), attributes=syscalls.MOUNT_ATTR_RDONLY),
        }
    )
    ends = mounting.gets(files.spoil, f"/seen/sealed-{way}")
    assert ends.pop("remount") == "done" and set(ends.values()) == {"EROFS"}
    assert (program.read_text(), program.stat().st_mode) == before
    ends = mounting.gets(files.spoil, f"/seen/plain-{way}")
    assert (ends["remount"], ends["write"], ends["chmod"]) == ("done", "done", "done"), "the control"
    assert (program.read_text(), program.stat().st_mode) != before


def test_the_program_that_sleeps_while_files_of_a_stopped_instance_are_copied(cli: Cli) -> None:
    cli.ok("run", "--name", "web", "busybox", "true")
    with subprocess.Popen(
        cli.command("cp", "-", "web:/"), env=cli.environment(), stdin=subprocess.PIPE, stderr=subprocess.PIPE
    ) as copying:

        def sleeper() -> int:
            for found in Path("/proc").glob("[0-9]*"):
                with suppress(OSError):  # it has ended
                    sleeps = (found / "cmdline").read_bytes().startswith(b"/dev/sleep\0")
                    if sleeps and f"/{cli.tenant}/" in (found / "cgroup").read_text():
                        return int(found.name)
            return 0

        until(lambda: sleeper() > 0, "it sleeps")
        kind, _, options = mounted(sleeper())["/dev/sleep"]
        assert copying.stdin
        copying.stdin.close()
        assert copying.wait(patiently(30)) == 1, "an empty archive"
    assert kind == "overlay" and "upperdir=" not in options and options.split(",")[0] == "ro"
