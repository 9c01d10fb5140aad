"""Cells of `insula-oci`: containers of the runtime alone, with any config, without a daemon and without a user
namespace.

That is how Podman, Docker and containerd use a runtime by default: root inside is the host's root, and only what the
config takes away keeps it in. The attacks are the same as for tenants.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from insula.kernel import capabilities
from tests.support.oci import Bundle
from tests.system.escape.cell import COMMAND, Attack, End, files, request

ALL = capabilities.to_names(capabilities.ALL)
DOCKERS = capabilities.to_names(capabilities.DEFAULT)
APPLETS = ["sleep", "true", "cat", "ls", "stat", "sh", "readlink", "mkdir", "ln", "rm"]


class OciCell:
    """A bundle with the attacks in its root, and a container of it that runs; each `exec` brings an attack inside."""

    def __init__(self, path: Path, group: str) -> None:
        self.bundle = Bundle(path, group)
        self.oci, self.root = self.bundle.oci, path / "rootfs"
        for name, data in files().items():
            target = self.root / name.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
            target.chmod(0o755)
        for name in APPLETS:
            if not (self.root / "bin" / name).exists():
                (self.root / "bin" / name).symlink_to("busybox")
        (self.root / "tmp").mkdir(exist_ok=True)
        (self.root / "tmp").chmod(0o1777)
        self.config = self.bundle.config
        self.config["root"]["readonly"] = False
        self.config["process"] |= {"args": ["/bin/sleep", "600"], "env": ["PATH=/bin"], "cwd": "/"}
        self.config["linux"]["resources"]["pids"] = {"limit": 200}
        self.config["linux"]["resources"]["memory"] = {"limit": 256 << 20}

    def grant(self, names: list[str]) -> None:
        """Give these capabilities, without the other barriers."""
        sets = dict.fromkeys(("bounding", "effective", "permitted"), names)
        self.config["process"]["capabilities"] = sets
        self.config["process"]["noNewPrivileges"] = False
        self.config["linux"].pop("seccomp", None)

    @contextmanager
    def running(self) -> Iterator[OciCell]:
        """`run --detach`, and in the end `delete --force`."""
        self.bundle.write(self.config)
        try:
            self.oci.ok("run", "--detach", "--bundle", self.bundle.path, "cell")
            yield self
        finally:
            self.oci.run("delete", "--force", "cell")

    def once(self, *attack: Any, options: tuple[str, ...] = (), **process: Any) -> End | str:
        """`run`, with options, an attack as the program: how it ended, or the error of the runtime."""
        config = copy.deepcopy(self.config)
        config["process"] |= {"args": list(COMMAND)} | process
        self.bundle.write(config)
        try:
            result = self.oci.run("run", *options, "--bundle", self.bundle.path, "once", input=request([attack]))
        finally:
            self.oci.run("delete", "--force", "once")
        if result.err.startswith("error: "):
            assert result.err.count("\n") == 1, result
            return result.err
        [said] = json.loads(result.ok())
        return End.of(said)

    def try_(self, attack: Attack, *arguments: Any) -> End:
        """How an attack ends that joins the running container."""
        [said] = json.loads(self.oci.ok("exec", "cell", *COMMAND, input=request([(attack, *arguments)])))
        return End.of(said)

    def gets(self, attack: Attack, *arguments: Any) -> Any:
        end = self.try_(attack, *arguments)
        assert not end.refused, end
        return end.value

    def start(self, attack: Attack, *arguments: Any) -> Any:
        """Runs it inside, beside the test; `Cell.finish` waits for its end."""
        program = f"printf '%s' '{request([(attack, *arguments)])}' | exec {' '.join(COMMAND)}"
        return self.oci.start("exec", "cell", "/bin/busybox", "sh", "-c", program)


def host_file(path: str) -> list[int]:
    """Device and inode of a file of the host."""
    status = os.stat(path)
    return [status.st_dev, status.st_ino]
