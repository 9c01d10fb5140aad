"""kill -9 of the runtime at any point: `delete --force` removes everything that is left."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from tests.support.wait import until
from tests.system.oci.conftest import NAME, Box

POINTS = 16


def of_ours(box: Box) -> list[str]:
    """Processes whose command line names the test's directory: the runtime's, and those that have not yet executed."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(box.path).encode() in path.read_bytes():
                found.append(path.parent.name)
        except OSError:
            continue
    return found


def prepare(box: Box, user: bool) -> None:
    if user:
        box.map_ids((0, 0x50000000, 65536))
    (box.path / "volume").mkdir()
    box.bind(box.path / "volume", "/mnt")
    hook = {"path": "/bin/true"}
    box.config["hooks"] = {kind: [hook] for kind in ("createRuntime", "createContainer", "startContainer", "poststop")}
    box.config["hooks"]["startContainer"] = [{"path": "/bin/true"}]
    box.script("exec sleep 600")


@pytest.mark.parametrize("user", [False, True])
@pytest.mark.parametrize("verb", ["create", "run"])
def test_killed_at_any_point(box: Box, verb: str, user: bool) -> None:
    prepare(box, user)
    command = box.oci.command(verb, "--bundle", box.path, NAME)
    begun = time.monotonic()
    box.oci.ok("create", "--bundle", box.path, NAME)
    whole = time.monotonic() - begun
    box.oci.ok("delete", "--force", NAME)
    states, points = set[str](), iter(range(20 * POINTS))
    # so much later that something was made, also where it takes longer than the first time
    while (point := next(points)) < POINTS or states == {"none"}:
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
            time.sleep(whole * 1.2 * point / POINTS)
            process.kill()
            process.wait()
        found = box.oci.run("state", NAME)
        states.add(found.out.split('"status":"')[1].split('"')[0] if found.status == 0 else "none")
        box.oci.ok("delete", "--force", NAME)
        assert box.left() == []
        until(lambda: of_ours(box) == [], "the child has heard of it")
    assert "none" in states, "some were killed before anything was made"
    assert len(states) > 1, "and some later"


def test_killed_while_a_hook_runs(box: Box) -> None:
    """The hook ends by itself; the container is not, and its process is gone."""
    told = box.path / "told"
    script = f"touch {told}; while [ -e {told} ]; do sleep 0.05; done"
    box.config["hooks"] = {"createContainer": [{"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin"]}]}
    box.script("touch /tmp/ran")
    with subprocess.Popen(box.oci.command("run", "--bundle", box.path, NAME)) as process:
        until(told.exists, "the hook runs")
        assert box.oci.status(NAME) == "creating"
        process.kill()
        process.wait()
    told.unlink()
    box.oci.ok("delete", "--force", NAME)
    assert box.left() == []
    until(lambda: of_ours(box) == [], "the child has heard of it")
    assert not (box.rootfs / "tmp/ran").exists()


def test_a_killed_start_can_be_repeated(box: Box) -> None:
    box.create("echo x >> /tmp/ran; exec sleep 600")
    command = box.oci.command("start", NAME)
    for point in range(6):
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            time.sleep(0.02 * point)
            process.kill()
            process.wait()
    assert box.oci.run("start", NAME).status in (0, 1)
    until(lambda: (box.rootfs / "tmp/ran").read_text() == "x\n", "it runs")
    until(lambda: box.oci.status(NAME) == "running", "it is known to run")
    assert (box.rootfs / "tmp/ran").read_text() == "x\n", "only once"


def test_killing_run_leaves_a_container_that_runs(box: Box) -> None:
    box.script("echo ready; exec sleep 600")
    process = box.oci.start("run", "--bundle", box.path, NAME)
    assert process.stdout and process.stdout.readline() == "ready\n"
    process.kill()
    process.wait()
    process.stdout.close()
    assert box.oci.status(NAME) == "running"
    box.oci.ok("delete", "--force", NAME)
    assert box.left() == []
