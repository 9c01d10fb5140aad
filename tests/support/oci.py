"""`insula-oci` as a command; bundles for it, and containers that were made without it.

What state, kill, pause, update and the others do, they do to any process in a control group of whose existence the
state's directory tells. `Resident` is one: nothing isolates it, and nothing of the launch has to work for it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

from insula.kernel import process
from insula.kernel.cgroups import Cgroup, join
from insula.oci.state import Container
from insula.oci.verbs.spec import default
from tests.support.cli import Result
from tests.support.wait import patiently

if TYPE_CHECKING:
    from insula.oci.state import StateRecord


class Oci:
    """The command with a --root of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.program = [sys.executable, "-m", "insula.oci.main"]

    def command(self, *words: object) -> list[str]:
        return [*self.program, "--root", str(self.root), *map(str, words)]

    def run(self, *words: object, input: str = "") -> Result:  # noqa: A002
        """Output goes through files: a container that is created keeps the streams, and a pipe would not end."""
        with TemporaryFile("w+") as stdin, TemporaryFile("w+") as out, TemporaryFile("w+") as err:
            stdin.write(input)
            stdin.seek(0)
            command, patience = self.command(*words), patiently(30)
            done = subprocess.run(command, stdin=stdin, stdout=out, stderr=err, timeout=patience, check=False)
            for file in (out, err):
                file.seek(0)
            return Result(" ".join(map(str, words)), done.returncode, out.read(), err.read())

    def ok(self, *words: object, input: str = "") -> str:  # noqa: A002
        return self.run(*words, input=input).ok()

    def json(self, *words: object) -> Any:
        return json.loads(self.ok(*words))

    def fails(self, *words: object, input: str = "") -> str:  # noqa: A002
        """The one line of a command that must fail; `exec` tells by its status that it isn't the process's."""
        result = self.run(*words, input=input)
        assert result.status == (255 if words[0] == "exec" else 1) and result.out == "", result
        assert result.err.startswith("error: ") and result.err.count("\n") == 1, result
        return result.err.removeprefix("error: ").rstrip("\n")

    def status(self, name: str) -> str:
        found: str = self.json("state", name)["status"]
        return found

    def start(self, *words: object) -> subprocess.Popen[str]:
        """Runs beside the test, but not for ever; the caller waits for it."""
        process = subprocess.Popen(self.command(*words), stdout=subprocess.PIPE, text=True)
        end = threading.Timer(patiently(120), process.kill)  # who waits for a line that doesn't come gets an empty one
        end.daemon = True
        end.start()
        return process


class Resident:
    """A process in a control group, told of in the state's directory as `create` does it."""

    def __init__(self, oci: Oci, name: str, cgroup: str, args: Sequence[str], config: dict[str, Any]) -> None:
        self.name = name
        self.group = Cgroup(cgroup)
        self.group.create()
        self.group.limit(config["linux"].get("resources", {}))
        self.output = oci.root.parent / f"{name}.out"
        self.output.touch()
        self.process = self._start(args)
        self.container = Container(str(oci.root), name)
        self.container.make()
        self.container.save_config(config)
        started = process.start_time(self.process.pid)
        assert started is not None
        self.record: StateRecord = {
            "id": name,
            "bundle": "/bundle",
            "rootfs": "/bundle/rootfs",
            "pid": self.process.pid,
            "start_time": started,
            "created": 1_700_000_000.25,
            "owner": 0,
            "cgroup": cgroup,
            "scope": None,
            "annotations": {"org.example.key": "value"},
        }
        self.container.save(self.record)
        self.container.unlock()

    def _start(self, args: Sequence[str]) -> subprocess.Popen[bytes]:
        descriptors = self.group.open()
        try:
            with self.output.open("wb") as output:
                return subprocess.Popen(args, stdout=output, preexec_fn=lambda: join(descriptors))
        finally:
            for fd in descriptors:
                os.close(fd)

    def grows(self) -> bool:
        """Whether the output becomes longer in a time that is enough for many lines."""
        before = self.output.stat().st_size
        time.sleep(0.1)
        return self.output.stat().st_size > before

    def value(self, file: str) -> str:
        """The content of a file of the control group, in whichever hierarchy it is."""
        [path] = {Path(d) / file for d in self.group.directories().values() if (Path(d) / file).exists()}
        return path.read_text().strip()

    def close(self) -> None:
        self.group.kill()
        self.process.wait(patiently(10))
        self.group.remove()
        shutil.rmtree(self.container.path, ignore_errors=True)


class Bundle:
    """A directory with a root file system of busybox, and what a create could leave."""

    def __init__(self, path: Path, group: str) -> None:
        self.path = path
        self.group = Cgroup(group)
        binaries = path / "rootfs" / "bin"
        binaries.mkdir(parents=True)
        shutil.copy("/bin/busybox", binaries / "sh")
        self.oci = Oci(path / "root")
        self.config = default()
        self.config["process"] |= {"terminal": False, "args": ["/bin/sh", "-c", "exit 7"]}
        self.config["linux"]["cgroupsPath"] = f"/{group}"
        self.config["linux"]["resources"] |= {
            "memory": {"limit": 64 << 20},
            "pids": {"limit": 20},
            "cpu": {"shares": 512},
        }

    def write(self, config: dict[str, Any]) -> None:
        (self.path / "config.json").write_text(json.dumps(config))

    def left(self) -> list[str]:
        """The remains of containers: directories, control groups, mounts, processes of the group."""
        root = self.oci.root
        found = [str(path) for path in root.iterdir()] if root.exists() else []
        found += [self.group.path] if self.group.exists() else []
        found += [line for line in Path("/proc/self/mounts").read_text().splitlines() if str(self.path) in line]
        return found
