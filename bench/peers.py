"""The peers, each started by hand where it disturbs nothing: its own network, mounts, directories and control group."""

from __future__ import annotations

import json
import os
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

from bench.lib import PEERS, Agent, Bench, Missing, program
from tests.support.wait import until

PRIVATE = ("unshare", "--mount", "--net", "--propagation", "private")
LIBRARIES = PEERS / "usr/lib/x86_64-linux-gnu"


def environment() -> dict[str, str]:
    """The host's, with the unpacked programs and libraries in front."""
    path = f"{PEERS}/usr/sbin:{PEERS}/usr/bin:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "LD_LIBRARY_PATH": str(LIBRARIES)}


def root_file_system(bench: Bench) -> Path:
    """Insula's busybox image, unpacked: the same files for everybody."""
    target = bench.scratch / "rootfs"
    if not target.exists():
        name = "rootfs-source"
        bench.cli.ok("run", "-d", "--name", name, "busybox", "sleep", "600")
        target.mkdir()
        archive = bench.cli.raw("cp", f"{name}:/bin", "-")
        subprocess.run(["tar", "-x", "-C", str(target)], input=archive.stdout, check=True)
        archive = bench.cli.raw("cp", f"{name}:/etc", "-")
        subprocess.run(["tar", "-x", "-C", str(target)], input=archive.stdout, check=True)
        for directory in ("proc", "sys", "dev", "tmp", "root"):
            (target / directory).mkdir(exist_ok=True)
        bench.cli.ok("rm", "-f", name)
    return target


class Crun:
    """`crun run` as a process, with a config like Docker's: namespaces, limits, masked paths, capabilities, seccomp."""

    def __init__(self, bench: Bench, config: dict[str, Any]) -> None:
        self.path = program("crun")
        hide = 'mount -t tmpfs none /sys/fs/cgroup/unified 2>/dev/null; exec "$@"'  # crun refuses a hybrid layout
        self.agent = Agent("unshare", "--mount", "--propagation", "private", "sh", "-c", hide, "sh")
        self.bundle = bench.scratch / "crun"
        self.state = bench.scratch / "crun-state"
        self.bundle.mkdir(exist_ok=True)
        (self.bundle / "config.json").write_text(json.dumps(config))
        self.number = 0

    def launch(self) -> float:
        self.number += 1
        return self.agent.seconds(
            self.path, "--root", self.state, "run", "--bundle", self.bundle, f"bench{self.number}"
        )

    def close(self) -> None:
        self.agent.close()


class Docker:
    """dockerd with containerd, in a network of its own; its bridge and its rules are there and nowhere else."""

    def __init__(self, bench: Bench) -> None:
        self.docker, daemon = program("docker"), program("dockerd")
        self.path = bench.scratch / "docker"
        self.path.mkdir()
        self.socket = f"unix://{self.path}/docker.sock"
        self.env = {**environment(), "DOCKER_CONFIG": str(self.path), "DOCKER_HOST": self.socket}
        loopback = 'ip link set lo up; mount -t tmpfs none /run; exec "$@"'
        self.agent = Agent(*PRIVATE, "sh", "-c", loopback, "sh")
        self.agent.run("true")
        inside = ("nsenter", f"--target={self.agent.process.pid}", "--mount", "--net")
        self.log = (self.path / "log").open("wb")
        options = [f"--data-root={self.path}/data", f"--exec-root={self.path}/exec", f"--host={self.socket}",
                   f"--pidfile={self.path}/pid", f"--cgroup-parent=/{bench.daemon.prefix}-docker"]  # fmt: skip
        self.process = subprocess.Popen(
            [*inside, str(daemon), *options], env=self.env, stdout=self.log, stderr=self.log, start_new_session=True
        )
        try:
            until(lambda: self.agent.run(self.docker, "ps", env=self.env)["status"] == 0, "dockerd answers", 30)
        except AssertionError:
            self.close()
            raise Missing(f"dockerd does not start: {self._last_line()}") from None
        archive = bench.scratch / "rootfs.tar"
        subprocess.run(["tar", "-c", "-C", str(root_file_system(bench)), "-f", str(archive), "."], check=True)
        self.agent.seconds(self.docker, "import", archive, "bench", env=self.env)

    def _last_line(self) -> str:
        lines = (self.path / "log").read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"

    def seconds(self, *arguments: str) -> float:
        return self.agent.seconds(self.docker, *arguments, env=self.env)

    def close(self) -> None:
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(15)
        self.process.kill()
        self.process.wait()
        self.agent.close()
        self.log.close()


class Podman:
    """podman without a daemon; `run -d` and `wait`, for `run` in the foreground hangs on some hosts."""

    def __init__(self, bench: Bench) -> None:
        self.podman = program("podman")
        self.path = bench.scratch / "podman"
        self.path.mkdir()
        hide = 'ip link set lo up; mount -t tmpfs none /run; mount -t tmpfs none /sys/fs/cgroup/unified; exec "$@"'
        self.agent = Agent(*PRIVATE, "sh", "-c", hide, "sh")
        policy = self.path / "policy.json"
        policy.write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
        conf = self.path / "containers.conf"
        conf.write_text(
            f'[engine]\ncgroup_manager = "cgroupfs"\nevents_logger = "none"\n'
            f'conmon_path = ["{PEERS}/usr/bin/conmon"]\nruntime = "crun"\n'
        )
        self.env = {**environment(), "CONTAINERS_CONF": str(conf), "HOME": str(self.path)}
        self.options = (f"--root={self.path}/data", f"--runroot={self.path}/run", f"--tmpdir={self.path}/tmp")
        self.parent = f"--cgroup-parent=/{bench.daemon.prefix}-podman"
        archive = bench.scratch / "rootfs.tar"
        subprocess.run(["tar", "-c", "-C", str(root_file_system(bench)), "-f", str(archive), "."], check=True)
        self.seconds("import", f"--signature-policy={policy}", str(archive), "bench")

    def seconds(self, *arguments: str) -> float:
        return self.agent.seconds(self.podman, *self.options, *arguments, env=self.env)

    def launch(self, *options: str) -> float:
        return self.seconds("run", "-d", "--rm", self.parent, *options, "localhost/bench", "true")

    def close(self) -> None:
        self.agent.run(self.podman, *self.options, "rm", "-fa", env=self.env)
        self.agent.close()
