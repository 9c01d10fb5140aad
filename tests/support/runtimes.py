"""OCI runtimes side by side: insula-oci, runc and crun make containers from the same bundle, and a test compares.

They run in a `Host` of tests.support.peers, where Debian's runc and crun find their libraries. States and control
groups are each runtime's own, so that none of them sees another's container.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

from insula.kernel.cgroups import Cgroup
from insula.oci.verbs.spec import default
from tests.support.cli import Result
from tests.support.peers import Host, launcher, root_file_system
from tests.support.wait import patiently

NAMES = ("insula-oci", "runc", "crun")
NAME = "box"
# crun refuses a host with controllers in both versions, although it needs those of one only
HOST = "umount -l /sys/fs/cgroup/unified 2>/dev/null || :"
ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}


class Runtime:
    """One runtime with a bundle of its own, whose `config` a test changes. Nothing confines it but what that says."""

    def __init__(self, name: str, program: str, host: Host, path: Path, group: str) -> None:
        self.name, self.program, self.host, self.path, self.group = name, program, host, path, group
        self.rootfs = root_file_system(path / "rootfs")
        self.environment = dict(ENVIRONMENT)
        self.refresh()

    def refresh(self) -> None:
        """Begin with a fresh config."""
        self.config = self.fresh()
        self.process: dict[str, Any] = self.config["process"]
        self.linux: dict[str, Any] = self.config["linux"]

    def fresh(self) -> dict[str, Any]:
        """The config of `insula-oci spec` without a terminal, on a root file system that can be written."""
        config = default()
        config["ociVersion"] = "1.0.2"
        config["process"] |= {"terminal": False, "noNewPrivileges": False}
        config["root"]["readonly"] = False
        config["linux"]["cgroupsPath"] = f"/{self.group}"
        return config

    def command(self, *words: object) -> list[str]:
        return self.host.command(self.program, f"--root={self.path}/state", *map(str, words))

    def do(self, *words: object, stdin: str = "") -> Result:
        """Output goes through files: a container that is created keeps the streams, and a pipe would not end."""
        with (self.path / "out").open("w+") as out, (self.path / "err").open("w+") as err:
            done = subprocess.run(
                self.command(*words),
                input=stdin,
                stdout=out,
                stderr=err,
                env=self.environment,
                text=True,
                timeout=patiently(60),
            )
            out.seek(0)
            err.seek(0)
            return Result(" ".join([self.name, *map(str, words)]), done.returncode, out.read(), err.read())

    def write(self, script: str | list[str]) -> None:
        """config.json, with a shell script or a command as its program."""
        self.process["args"] = ["/bin/sh", "-c", script] if isinstance(script, str) else script
        (self.path / "config.json").write_text(json.dumps(self.config))

    def run(self, script: str | list[str], *options: object) -> Result:
        self.write(script)
        return self.do("run", "--bundle", self.path, *options, NAME)

    def out(self, script: str | list[str], *options: object) -> str:
        """The output of the program, which must succeed."""
        return self.run(script, *options).ok()

    def start(self, script: str | list[str] = "exec sleep 600", *options: object) -> None:
        """Create and start a container."""
        self.write(script)
        self.do("create", "--bundle", self.path, *options, NAME).ok()
        self.do("start", NAME).ok()

    def host_mounts(self, path: Path) -> None:
        """Mount a tmpfs on a directory of the host on which the runtime is; it is shared, as under systemd."""
        script = f"mkdir -p {path} && mount -t tmpfs test {path} && mount --make-shared {path}"
        subprocess.run(self.host.command("sh", "-c", script), check=True)

    def host_unmounts(self, path: Path) -> None:
        subprocess.run(self.host.command("umount", path), check=True)

    def clear(self) -> None:
        """Remove the container, whatever state it is in, and begin with a fresh config and an empty /tmp."""
        self.do("delete", "--force", NAME)
        self.refresh()
        self.environment = dict(ENVIRONMENT)
        shutil.rmtree(self.rootfs / "tmp")
        (self.rootfs / "tmp").mkdir()
        for directory in set(Cgroup(self.group).directories().values()):
            assert not Path(directory).exists(), directory

    def close(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def runtimes(path: Path, host: Host, group: str) -> dict[str, Runtime]:
    """All of `NAMES`, each in a directory and a control group of its own."""
    programs = {name: f"/usr/sbin/{name}" if name == "runc" else f"/usr/bin/{name}" for name in NAMES}
    (path / "bin").mkdir()
    programs["insula-oci"] = str(launcher(path / "bin"))
    made = {}
    for name in NAMES:
        (path / name).mkdir()
        made[name] = Runtime(name, programs[name], host, path / name, f"{group}/{name}")
    return made
