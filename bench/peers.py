"""The peers, isolated from the host (tests/support/peers.py), timed from inside of their namespaces."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from bench.lib import Agent, Bench
from insula.container.service.run_directory import Launch
from insula.control.instances.drivers.container import seccomp_default
from tests.support import peers
from tests.support.peers import IMAGE, Engine, Host

CRUN, RUNC = "/usr/bin/crun", "/usr/sbin/runc"
HIDE_UNIFIED = "mount -t tmpfs none /sys/fs/cgroup/unified 2>/dev/null || true"
"""crun refuses the hybrid layout of control groups."""


def root_file_system(bench: Bench) -> Path:
    """Busybox, unpacked: the same files for everybody."""
    target = bench.scratch / "rootfs"
    return target if target.exists() else peers.root_file_system(target)


def bundle_config(launch: Launch, root: Path) -> dict[str, Any]:
    """The same config.json, for a runtime that gets everything from it: the root, the user namespace, the group."""
    config: dict[str, Any] = json.loads(json.dumps(launch.config))
    config["ociVersion"] = "1.0.2"
    config["root"] = {"path": str(root), "readonly": True}
    linux = config["linux"]
    if not any(namespace["type"] == "user" for namespace in linux["namespaces"]):
        linux["namespaces"].append({"type": "user"})
    # the engine's requests name a compiled filter instead
    linux["seccomp"] = seccomp_default.profile(config["process"]["capabilities"]["bounding"])
    linux["uidMappings"] = linux["gidMappings"] = [{"containerID": 0, "hostID": launch.id_base, "size": 65536}]
    linux["cgroupsPath"] = f"/{launch.cgroup.split('/')[0]}-crun/bench"
    return config


class Runtime:
    """`RUNTIME run` of one bundle, as a process."""

    def __init__(self, bench: Bench, program: str | Path, config: dict[str, Any], name: str) -> None:
        self.program = program
        self.path = bench.scratch / f"{name}-{Path(program).name}"
        self.state = bench.scratch / "run" / self.path.name
        self.path.mkdir()
        (self.path / "config.json").write_text(json.dumps(config))
        self.host = Host(HIDE_UNIFIED)
        self.agent = Agent(*self.host.command())
        mount = "from insula.kernel import sealed; sealed.mount_sealed()"  # as insulad does
        self.agent.run(sys.executable, "-c", mount)
        self.number = 0

    def launch(self) -> float:
        self.number += 1
        run = ("run", "--bundle", self.path, f"bench{self.number}")
        return self.agent.seconds(self.program, "--root", self.state, *run, env={"PATH": "/usr/sbin:/usr/bin"})

    def close(self) -> None:
        self.agent.close()
        self.host.close()


class Client:
    """An engine's command line: `seconds` times it."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.agent = Agent(*engine.host.command())

    def seconds(self, *arguments: str) -> float:
        return self.agent.seconds(*self.engine.argv(*arguments), env=self.engine.environment)

    def launch(self, *options: str) -> float:
        return self.seconds("run", "--rm", *options, IMAGE, "true")

    def close(self) -> None:
        self.agent.close()
        self.engine.clear()
        self.engine.close()


def docker(bench: Bench) -> Client:
    """dockerd with containerd and runc, as Debian has them."""
    return Client(peers.Docker(bench.scratch / "docker", f"{bench.daemon.prefix}-docker", RUNC, _archive(bench)))


def podman(bench: Bench) -> Client:
    """podman with conmon and crun, as Debian has them."""
    path, parent = bench.scratch / "podman", f"{bench.daemon.prefix}-podman"
    return Client(peers.Podman(path, parent, CRUN, _archive(bench), HIDE_UNIFIED))


def _archive(bench: Bench) -> Path:
    return peers.archive_of(root_file_system(bench), bench.scratch / "rootfs.tar")
