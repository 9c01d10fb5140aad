"""Delegation of a cgroup v2 group to a user: what the user can and can't change."""

from __future__ import annotations

import os
import secrets
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from insula.kernel import cgroups
from insula.kernel.cgroups import Cgroup, Hierarchy, delegation

USER = 4242424


def unified() -> str | None:
    """The mount of version 2, on a hybrid host one without controllers."""
    lines = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    return next((target for _, target, kind, *_ in lines if kind == "cgroup2"), None)


@pytest.fixture
def group() -> Iterator[Cgroup]:
    mount = unified()
    if mount is None:
        pytest.skip("no cgroup2 file system is mounted here")
    group = Cgroup(f"it{secrets.token_hex(3)}", Hierarchy(mount, {}))
    group.create()
    yield group
    group.remove()


def attempt(group: Cgroup, script: str) -> subprocess.CompletedProcess[str]:
    """A shell script of that user, in the group and its directory."""
    command = ["setpriv", f"--reuid={USER}", "--clear-groups", "sh", "-c", script]
    directory = str(group.directory(""))

    def join() -> None:
        cgroups.join(group.open())

    return subprocess.run(command, cwd=directory, preexec_fn=join, capture_output=True, text=True)


def test_a_user_divides_a_delegated_group(group: Cgroup) -> None:
    script = "mkdir child && echo $$ > child/cgroup.procs && cut -d: -f3 /proc/self/cgroup"
    assert attempt(group, script).returncode != 0, "the control: before"
    group.delegate(USER)
    done = attempt(group, script)
    assert done.stdout.strip().endswith(f"{group.path}/child"), done
    for refused in (
        "echo 5 > cgroup.max.depth",
        "echo 1 > ../cgroup.max.depth",
        "echo 0 > ../cgroup.procs",
        "mkdir ../x",
    ):
        assert attempt(group, refused).returncode != 0, refused


def test_only_the_groups_own_files_are_delegated(group: Cgroup) -> None:
    group.delegate(USER)
    directory = Path(str(group.directory("")))
    given = {path.name for path in directory.iterdir() if path.stat().st_uid == USER}
    listed = set(Path("/sys/kernel/cgroup/delegate").read_text().split())
    assert given == {path.name for path in directory.iterdir()} & listed >= {"cgroup.procs", "cgroup.subtree_control"}


def test_exec_joins_the_group_of_the_first_process(group: Cgroup) -> None:
    group.delegate(USER)
    below = Cgroup(f"{group.path}/init", group.tree)
    below.create()
    with subprocess.Popen(["sleep", "60"], preexec_fn=lambda: cgroups.join(below.open())) as first:
        try:
            if cgroups.hierarchy().unified:
                assert group.group_to_join(first.pid).path == below.path
            assert group.group_to_join(os.getpid()).path == group.path
        finally:
            first.kill()


@pytest.mark.parametrize(
    ("options", "namespaced", "asked"),
    [(["rw"], True, True), ([], True, True), (["ro"], True, False), (["rw"], False, False)],
)
def test_delegation_is_on_request_only(options: list[str], namespaced: bool, asked: bool) -> None:
    mount = {"destination": "/sys/fs/cgroup", "type": "cgroup", "options": options}
    assert delegation.is_requested({"mounts": [{"type": "proc"}, mount]}, namespaced) is asked
    assert delegation.is_requested({"mounts": [{"type": "proc"}]}, namespaced) is False
