"""`box`: a bundle with all of busybox, whose containers are made by the command line. Each test must leave nothing."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.cli import Result
from tests.support.machine import Run
from tests.support.oci import Bundle
from tests.support.wait import patiently

NAME = "box"


class Box(Bundle):
    """`run` writes the config, with a shell script as its program, and runs a container of it."""

    def __init__(self, path: Path, group: str) -> None:
        super().__init__(path, group)
        self.rootfs = path / "rootfs"
        for applet in subprocess.check_output(["/bin/busybox", "--list"], text=True).split():
            if applet != "sh":
                (self.rootfs / "bin" / applet).symlink_to("sh")
        (self.rootfs / "tmp").mkdir()
        self.config["root"]["readonly"] = False
        self.linux: dict[str, Any] = self.config["linux"]
        self.mounts: list[dict[str, Any]] = self.config["mounts"]
        self.process: dict[str, Any] = self.config["process"]

    def script(self, text: str) -> None:
        self.process["args"] = ["/bin/sh", "-c", text]
        self.write(self.config)

    def run(self, text: str, *options: object) -> Result:
        self.script(text)
        return self.oci.run("run", "--bundle", self.path, *options, NAME)

    def out(self, text: str, *options: object) -> str:
        """The output of the script, which must succeed without messages."""
        result = self.run(text, *options)
        assert (result.status, result.err) == (0, ""), result
        return result.out

    def refused(self, *options: object) -> str:
        """The one line of a `run` that must fail; nothing is left of it."""
        self.script("true")
        line = self.oci.fails("run", "--bundle", self.path, *options, NAME)
        assert self.left() == []
        return line

    def create(self, text: str = "exec sleep 600", *options: object) -> None:
        """Create it without a pipe of the test: waiting for the end of the pipe would be waiting for the container."""
        self.script(text)
        command = self.oci.command("create", "--bundle", self.path, *options, NAME)
        with (self.path / "output").open("w") as output:
            subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, timeout=patiently(30), check=True
            )

    def start(self, text: str = "exec sleep 600", *options: object) -> int:
        """Create and start; the process's PID."""
        self.create(text, *options)
        self.oci.ok("start", NAME)
        pid: int = self.oci.json("state", NAME)["pid"]
        return pid

    @property
    def output(self) -> str:
        return (self.path / "output").read_text()

    def bind(self, source: Path, destination: str, *options: str, **more: Any) -> None:
        entry = {"destination": destination, "type": "bind", "source": str(source), "options": ["bind", *options]}
        self.mounts.append({**entry, **more})

    def namespace(self, kind: str, **more: str) -> None:
        """Make the container have this namespace, of its own or by path."""
        self.without(kind)
        self.linux["namespaces"].append({"type": kind, **more})

    def without(self, kind: str) -> None:
        self.linux["namespaces"] = [entry for entry in self.linux["namespaces"] if entry["type"] != kind]

    def map_ids(self, *lines: tuple[int, int, int]) -> None:
        """A user namespace with these lines in both maps; the root file system belongs to its root."""
        self.namespace("user")
        entries = [{"containerID": inside, "hostID": outside, "size": size} for inside, outside, size in lines]
        self.linux["uidMappings"] = self.linux["gidMappings"] = entries
        for path, _, files in os.walk(self.rootfs):
            for name in (path, *(f"{path}/{file}" for file in files)):
                os.chown(name, lines[0][1], lines[0][1], follow_symlinks=False)


@pytest.fixture
def box(run_: Run) -> Iterator[Box]:
    path = run_.path / "oci"
    box = Box(path, f"{run_.name}oci/{NAME}")
    try:
        yield box
        box.oci.ok("delete", "--force", NAME)
        assert box.left() == []
    finally:
        box.oci.run("delete", "--force", NAME)
        shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def holder() -> Iterator[int]:
    """The PID of a process in namespaces of its own, of all types but user and mount; it holds them."""
    command = ["unshare", "--net", "--ipc", "--uts", "--cgroup", "--time", "--pid", "--fork", "sleep", "600"]
    process = subprocess.Popen(command)
    try:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while not (found := children.read_text().split()):
            continue
        yield int(found[0])
        subprocess.run(["kill", "-9", *found], check=True)
    finally:
        process.kill()
        process.wait()


class ConsoleSocket:
    """The listener at --console-socket, as conmon is."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen()
        self._listener.settimeout(patiently(20))

    def receive(self) -> int:
        """The terminal's other end."""
        connection, _ = self._listener.accept()
        with connection:
            _, [master], _, _ = socket.recv_fds(connection, 4096, 1)
        return master

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def console(tmp_path: Path) -> Iterator[ConsoleSocket]:
    listener = ConsoleSocket(tmp_path / "console.sock")
    yield listener
    listener.close()
