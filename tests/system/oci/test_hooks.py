"""Hooks: order, namespaces, input, and the effect of failures, at six points of a container's life."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.support.wait import until
from tests.system.oci.conftest import NAME, Box

BEFORE = ("prestart", "createRuntime", "createContainer", "startContainer")
AFTER = ("poststart", "poststop")


def hook(box: Box, kind: str, script: str, **more: Any) -> None:
    """A script of the host's, or for startContainer of the container's shell."""
    shell = "/bin/sh"
    entry = {"path": shell, "args": ["sh", "-c", script], "env": ["PATH=/usr/bin:/bin"], **more}
    box.config.setdefault("hooks", {}).setdefault(kind, []).append(entry)


def log_everything(box: Box) -> Path:
    """Every hook appends its name and its state to a file that is seen from host and container alike."""
    shared = box.path / "shared"
    shared.mkdir()
    (shared / "log").touch()
    box.bind(shared, "/shared")
    for kind in (*BEFORE, *AFTER):
        # among the host's paths until pivot_root(2)
        place = "/shared" if kind == "startContainer" else str(shared)
        for number in (1, 2):
            hook(box, kind, f"echo {kind} {number} $(cat) >> {place}/log")
    return shared / "log"


def entries(log: Path) -> list[tuple[str, str, dict[str, Any]]]:
    found = []
    for line in log.read_text().splitlines():
        name, rest = line.split(" ", 1)
        number, state = rest.split(" ", 1) if " " in rest else (rest, "{}")
        found.append((name, number, json.loads(state)))
    return found


def test_order_and_state(box: Box) -> None:
    log = log_everything(box)
    box.config["annotations"] = {"org.example": "x"}
    box.create("echo program 0 >> /shared/log; exec sleep 600")
    made = [(kind, number) for kind, number, _ in entries(log)]
    assert made == [(kind, number) for kind in BEFORE[:3] for number in ("1", "2")]

    box.oci.ok("start", NAME)
    until(lambda: len(entries(log)) == 11, "all of start is done")
    later = [name for name, _, _ in entries(log)[6:]]
    assert later[:2] == ["startContainer"] * 2
    assert sorted(later[2:]) == ["poststart", "poststart", "program"]

    pid = box.oci.json("state", NAME)["pid"]
    box.oci.ok("delete", "--force", NAME)
    assert [name for name, _, _ in entries(log)[11:]] == ["poststop"] * 2

    states = {name: state for name, _, state in entries(log)}
    status = {name: states[name]["status"] for name in (*BEFORE, *AFTER)}
    assert status == {
        "prestart": "creating",
        "createRuntime": "creating",
        "createContainer": "creating",
        "startContainer": "created",
        "poststart": "running",
        "poststop": "stopped",
    }
    for name, state in states.items():
        if name != "program":
            assert (state["id"], state["bundle"], state["ociVersion"]) == (NAME, str(box.path), "1.3.0")
            assert state["annotations"] == {"org.example": "x"}
    assert {name: states[name]["pid"] for name in ("prestart", "createRuntime", "poststart")} == {
        "prestart": pid,
        "createRuntime": pid,
        "poststart": pid,
    }
    assert (states["createContainer"]["pid"], states["startContainer"]["pid"]) == (1, 1)


def test_run_has_all_of_them(box: Box) -> None:
    log = log_everything(box)
    assert box.out("true") == ""
    assert [name for name, _, _ in entries(log)] == [kind for kind in (*BEFORE, *AFTER) for _ in range(2)]


def test_where_they_run(box: Box) -> None:
    log = log_everything(box)
    log.unlink()
    box.config["hooks"] = {}
    for kind in (*BEFORE, *AFTER):
        place = "/shared" if kind == "startContainer" else log.parent
        hook(box, kind, f"readlink /proc/self/ns/uts > {place}/{kind}; readlink /proc/self/ns/net >> {place}/{kind}")
    inside = box.out("readlink /proc/self/ns/uts; readlink /proc/self/ns/net").split()
    outside = [os.readlink("/proc/self/ns/uts"), os.readlink("/proc/self/ns/net")]
    assert inside[0] != outside[0] and inside[1] != outside[1]
    for kind in (*BEFORE, *AFTER):
        found = (log.parent / kind).read_text().split()
        assert found == (inside if kind in ("createContainer", "startContainer") else outside), kind


def test_before_the_root_changes_and_after(box: Box) -> None:
    """prestart, createRuntime and createContainer hooks find the host's files, and the mounts of the container made."""
    (box.rootfs / "mark").touch()
    hook(box, "createContainer", f"test -e {box.path}/config.json && test -e mark && test -d proc/1")
    hook(box, "startContainer", f"test -e /mark && test ! -e {box.path}/config.json")
    assert box.out("echo ran") == "ran\n"


@pytest.mark.parametrize("options", [(), ("--no-pivot",)])
@pytest.mark.parametrize("user", [False, True])
def test_the_containers_mounts_are_at_the_roots_path(box: Box, user: bool, options: tuple[str, ...]) -> None:
    """Until pivot_root(2), for hooks in the container's mount namespace and for those that enter it from outside."""
    data = box.path / "data"
    data.mkdir()
    (data / "file").write_text("of the host\n")
    (box.rootfs / "lib").mkdir()
    (box.rootfs / "lib/x.so").touch()
    (box.rootfs / "seen").touch(0o666)
    if user:
        box.map_ids((0, 0, 65536))
    box.bind(data, "/data")
    pid = "$(sed 's/.*\"pid\": *\\([0-9]*\\).*/\\1/')"
    mount = f"mount --bind {data}/file {box.rootfs}/lib/x.so"
    hook(box, "createRuntime", f"test ! -e {box.rootfs}/data/file && nsenter --mount --target {pid} {mount}")
    hook(box, "createContainer", f"cat {box.rootfs}/data/file {box.rootfs}/lib/x.so > {box.rootfs}/seen")
    assert box.out("cat /seen /lib/x.so", *options) == "of the host\n" * 3
    assert (box.rootfs / "lib/x.so").read_text() == ""


def test_environment_and_descriptors_are_its_own(box: Box) -> None:
    told = box.path / "told"
    hook(box, "createRuntime", f"/usr/bin/env > {told}; ls /proc/self/fd | wc -w >> {told}; echo $0 >> {told}")
    box.config["hooks"]["createRuntime"][0] |= {
        "env": ["A=b c"],
        "args": [
            "my-name",
            "-c",
            f"""
        PATH=/usr/bin:/bin; env | grep -v -e ^_= -e ^PWD= -e ^SHLVL= -e ^PATH= -e ^OLDPWD= > {told}
        ls /proc/self/fd | wc -w >> {told}; echo $0 >> {told}""",
        ],
    }
    box.out("true")
    assert told.read_text().splitlines() == ["A=b c", "4", "my-name"]


@pytest.mark.parametrize("kind", BEFORE)
def test_a_failure_before_the_program_is_the_containers(box: Box, kind: str) -> None:
    """It is not to be: nothing is left of it, and its poststop hooks have run."""
    told = box.path / "told"
    hook(box, kind, "echo 'what went wrong' >&2; exit 3")
    hook(box, kind, f"touch {box.path}/second")
    hook(box, "poststop", f"cat > {told}")
    box.script("touch /tmp/ran")
    line = box.oci.fails("run", "--bundle", box.path, NAME)
    where = f"hooks.{kind}[0]: error running {kind} hook #0: /bin/sh"
    assert f"{where}: {kind} hook failed with exit code 3: what went wrong" in line
    assert box.left() == []
    assert not (box.rootfs / "tmp/ran").exists()
    assert not (box.path / "second").exists()
    assert json.loads(told.read_text())["status"] == "stopped"


@pytest.mark.parametrize("kind", BEFORE[:3])
def test_create_fails_with_its_hooks(box: Box, kind: str) -> None:
    hook(box, kind, "exit 1")
    box.script("true")
    assert f"hooks.{kind}[0]" in box.oci.fails("create", "--bundle", box.path, NAME)
    assert box.left() == []


def test_start_fails_with_its_hook(box: Box) -> None:
    hook(box, "startContainer", "exit 1")
    box.create("touch /tmp/ran")
    assert "hooks.startContainer[0]" in box.oci.fails("start", NAME)
    until(lambda: box.oci.status(NAME) == "stopped", "it is over")
    assert not (box.rootfs / "tmp/ran").exists()


def test_a_failure_after_the_end_is_a_warning(box: Box) -> None:
    told = box.path / "told"
    hook(box, "poststop", "exit 3")
    hook(box, "poststop", f"touch {told}")
    result = box.run("exit 5")
    assert result.status == 5
    told_of = "hooks.poststop[0]: error running poststop hook #0: /bin/sh: poststop hook failed with exit code 3"
    assert result.err.startswith(f"warning: {told_of}")
    assert told.exists()


@pytest.mark.parametrize("verb", ["run", "start"])
def test_a_failed_poststart_hook_is_the_containers_end(box: Box, verb: str) -> None:
    """runtime.md, lifecycle, 9: an error, the container is stopped and destroyed, and its poststop hooks run."""
    told = box.path / "told"
    hook(box, "poststart", "exit 3")
    hook(box, "poststart", f"touch {box.path}/second")
    hook(box, "poststop", f"cat > {told}")
    if verb == "run":
        box.script("exec sleep 600")
        line = box.oci.fails("run", "--bundle", box.path, NAME)
    else:
        box.create("exec sleep 600")
        line = box.oci.fails("start", NAME)
    where = "hooks.poststart[0]: error running poststart hook #0: /bin/sh"
    assert f"{where}: poststart hook failed with exit code 3" in line
    assert box.left() == []
    assert json.loads(told.read_text())["status"] == "stopped"
    assert not (box.path / "second").exists()


def test_a_hook_that_takes_too_long(box: Box) -> None:
    hook(box, "createRuntime", "sleep 600", timeout=1)
    line = box.refused()
    assert "hooks.createRuntime[0]: error running createRuntime hook #0: /bin/sh: it took longer than 1 seconds" in line


def test_a_missing_hook(box: Box) -> None:
    hook(box, "prestart", "", path="/nowhere")
    assert "hooks.prestart[0]: error running prestart hook #0: /nowhere" in box.refused()


def test_a_hook_may_ask_for_the_state(box: Box) -> None:
    told = box.path / "told"
    command = " ".join(map(str, box.oci.command("state", NAME)))
    hook(box, "createRuntime", f"{command} > {told}")
    box.out("true")
    assert json.loads(told.read_text())["status"] == "creating"
