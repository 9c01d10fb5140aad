"""insula-oci checkpoint and restore: memory and attributes of a process are restored."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from insula.kernel import criu
from insula.model.errors import Unavailable
from tests.support import machine, peers
from tests.support.wait import patiently, until

COUNT = "i=0; while :; do i=$((i+1)); echo $i > /tmp/count; sleep 0.02; done"
"""Its memory is `i`: began it anew, it would write 1 again."""
NAME = "counter"


def _why_not() -> str | None:
    try:
        criu.find(shutil.which("criu"))
    except Unavailable as error:
        return error.message
    return None


pytestmark = pytest.mark.skipif(_why_not() is not None, reason=f"no working criu: {_why_not()}")


class Box:
    """A bundle with busybox, and insula-oci."""

    def __init__(self, path: Path, prefix: str) -> None:
        self.path = path
        self.program = peers.launcher(path)
        self.bundle = path / "bundle"
        root = peers.root_file_system(self.bundle / "rootfs")
        (path / "told").write_text("from the host\n")
        mounts = [("/proc", "proc"), ("/dev", "tmpfs"), ("/tmp", "tmpfs"), ("/sys", "sysfs")]
        bind = {"destination": "/etc/told", "type": "bind", "source": str(path / "told"), "options": ["rbind", "ro"]}
        self.config: dict[str, Any] = {
            "ociVersion": "1.0.2",
            "process": {
                "args": ["/bin/sh", "-c", COUNT],
                "env": ["PATH=/bin"],
                "cwd": "/",
                "user": {"uid": 0, "gid": 0},
                "noNewPrivileges": True,
            },
            "root": {"path": str(root)},
            "mounts": [{"destination": where, "type": kind, "source": kind} for where, kind in mounts] + [bind],
            "linux": {
                "namespaces": [{"type": kind} for kind in ("pid", "network", "ipc", "uts", "mount")],
                "cgroupsPath": f"/{prefix}/{NAME}",
                "resources": {"pids": {"limit": 50}},
                "maskedPaths": ["/proc/keys", "/sys/firmware"],
                "readonlyPaths": ["/proc/sys"],
            },
        }
        (self.bundle / "config.json").write_text(json.dumps(self.config))

    def run(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """insula-oci; a container that it leaves behind holds no pipe of ours."""
        said = self.path / "said"
        with said.open("w") as file:
            command = [str(word) for word in (self.program, "--root", self.path / "state", *arguments)]
            done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=file)
        return subprocess.CompletedProcess(command, done.returncode, "", said.read_text())

    def start(self, *arguments: str | Path) -> subprocess.Popen[str]:
        """insula-oci beside the test, with pipes."""
        command = [str(word) for word in (self.program, "--root", self.path / "state", *arguments)]
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def ok(self, *arguments: str | Path) -> None:
        done = self.run(*arguments)
        assert done.returncode == 0, done

    def state(self) -> dict[str, Any] | None:
        command = [str(word) for word in (self.program, "--root", self.path / "state", "state", NAME)]
        done = subprocess.run(command, capture_output=True, text=True)
        state: dict[str, Any] | None = json.loads(done.stdout) if done.returncode == 0 else None
        return state

    def look(self) -> dict[str, Any]:
        """The state of the container, which runs; `inside` and `count` look into it from now on."""
        state = self.state()
        assert state is not None
        assert state["status"] == "running"
        self._root = Path(f"/proc/{state['pid']}/root")
        return state

    def inside(self, path: str) -> str:
        return (self._root / path).read_text().strip()

    def count(self) -> int:
        return int(self.inside("tmp/count") or 0)

    def checkpoint(self, *options: str | Path) -> None:
        self.ok("--criu", str(shutil.which("criu")), "checkpoint", f"--image-path={self.path}/images", *options, NAME)

    def restore(self, *options: str | Path) -> None:
        options = ("-d", f"--bundle={self.bundle}", f"--image-path={self.path}/images", *options)
        self.ok("--criu", str(shutil.which("criu")), "restore", *options, NAME)
        self.look()


@pytest.fixture
def box() -> Iterator[Box]:
    run = machine.Run()
    box = Box(run.path, run.name)
    box.ok("run", "-d", f"--bundle={box.bundle}", NAME)
    box.look()
    until(lambda: box.count() > 3, "it counts")
    yield box
    box.run("delete", "--force", NAME)
    run.close()


def test_a_restored_container_goes_on_where_it_was(box: Box) -> None:
    before = box.count()
    box.checkpoint()
    assert box.state() is None
    box.restore()
    assert box.count() >= before
    until(lambda: box.count() > before + 5, "it counts on")
    assert box.inside("etc/told") == "from the host"
    assert box.inside("proc/keys") == ""
    assert box.config["linux"]["cgroupsPath"] in Path(f"/proc/{box.look()['pid']}/cgroup").read_text()
    box.ok("kill", NAME, "KILL")
    until(lambda: (box.state() or {})["status"] == "stopped", "it is stopped")
    box.ok("delete", NAME)


def test_a_checkpoint_may_leave_it_running(box: Box) -> None:
    box.checkpoint("--leave-running")
    box.look()
    now = box.count()
    until(lambda: box.count() > now, "it counts on")


def test_output_goes_to_the_restoring_caller(box: Box) -> None:
    """And so does its end: without --detach, restore waits for it."""
    box.ok("delete", "--force", NAME)
    box.config["process"]["args"][2] = "echo begin; until [ -e /tmp/go ]; do sleep 0.02; done; echo end; exit 7"
    (box.bundle / "config.json").write_text(json.dumps(box.config))
    first = box.start("run", f"--bundle={box.bundle}", NAME)
    assert first.stdout is not None
    assert first.stdout.readline() == "begin\n"
    box.checkpoint()
    first.communicate(timeout=patiently(20))
    assert first.returncode == 137
    program = ("--criu", str(shutil.which("criu")))
    second = box.start(*program, "restore", f"--bundle={box.bundle}", f"--image-path={box.path}/images", NAME)

    def runs() -> bool:
        assert second.poll() is None, second.communicate()
        return (box.state() or {}).get("status") == "running"

    until(runs, "it runs")
    Path(f"/proc/{(box.state() or {})['pid']}/root/tmp/go").touch()
    out, _ = second.communicate(timeout=patiently(20))
    assert (out, second.returncode) == ("end\n", 7)
    assert box.state() is None


def test_a_pre_dump_saves_memory_first(box: Box) -> None:
    program = str(shutil.which("criu"))
    if subprocess.run([program, "check", "--feature", "mem_dirty_track"], capture_output=True).returncode:
        pytest.skip("this kernel does not tell which pages were written (CONFIG_MEM_SOFT_DIRTY)")
    box.ok("--criu", str(shutil.which("criu")), "checkpoint", "--pre-dump", f"--image-path={box.path}/memory", NAME)
    assert box.state() is not None
    box.checkpoint(f"--parent-path={box.path}/memory")
    box.restore()
    now = box.count()
    until(lambda: box.count() > now, "it counts on")


def test_the_same_name_twice(box: Box) -> None:
    box.checkpoint("--leave-running")
    program = ("--criu", str(shutil.which("criu")))
    done = box.run(*program, "restore", "-d", f"--bundle={box.bundle}", f"--image-path={box.path}/images", NAME)
    assert done.returncode == 1
    assert "already exists" in done.stderr


def test_without_criu(box: Box) -> None:
    done = box.run("--criu", "/nothing/there", "checkpoint", f"--image-path={box.path}/images", NAME)
    assert done.returncode == 1
    assert done.stderr == (
        "error: /nothing/there is not installed; hint: install a criu that fits the kernel, or name one with --criu\n"
    )


def test_no_checkpoint_to_restore(box: Box, tmp_path: Path) -> None:
    box.ok("delete", "--force", NAME)
    done = box.run(
        "--criu", str(shutil.which("criu")), "restore", f"--bundle={box.bundle}", f"--image-path={tmp_path}", NAME
    )
    assert done.returncode == 1
    assert "is no checkpoint" in done.stderr
    assert box.state() is None
