"""Virtual machines for tests: guests of the busybox image, each with its shim and QEMU in a container of `insula-oci`.

The kernel is the one that `scripts/kernel` has fetched. What all guests share is made once: the initramfs, the
root of the container, an erofs of busybox, and a template.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from insula.control.instances.drivers.container import seccomp_default, spec
from insula.control.instances.drivers.container.users import User
from insula.machine.guest import initramfs
from insula.machine.qemu import root, template
from insula.model.objects import ImageConfig, InstanceSpec
from tests.support.oci import Oci
from tests.support.wait import patiently

CHECKOUT = Path(__file__).parents[2]
MEMORY = 160
DISK = 1 << 30
APPLETS = ("sh", "cat", "echo", "id", "ps", "sleep", "ip", "hostname", "date", "dd", "env", "touch", "mount")
ID_BASE = 700000


def kernel() -> Path | None:
    """The directory of the guests' kernel; None if it was not fetched."""
    done = subprocess.run([CHECKOUT / "scripts/kernel", "--known"], capture_output=True, text=True, timeout=60)
    return Path(done.stdout.strip()) if done.returncode == 0 else None


class Guests:
    """What guests share, below the directory `path`."""

    def __init__(self, path: Path, kernel: Path) -> None:
        self.path = path
        self.kernel = kernel
        self.oci = Oci(path / "state")
        modules = next((kernel / "modules").parent.glob("modules"))
        (path / "initramfs").write_bytes(initramfs.build(modules))
        (path / "bundle/rootfs").mkdir(parents=True)
        root.build(path / "bundle/rootfs", (kernel / "vmlinux").read_bytes(), (path / "initramfs").read_bytes())
        self.image = self._image()
        self.memory, self.state = template.make(str(kernel / "vmlinux"), str(path / "initramfs"), MEMORY)

    def _image(self) -> Path:
        files = self.path / "image"
        for name in ("bin", "etc", "proc", "sys", "dev", "tmp", "root"):
            (files / name).mkdir(parents=True)
        shutil.copy("/bin/busybox", files / "bin/busybox")
        for name in APPLETS:
            (files / "bin" / name).symlink_to("busybox")
        (files / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
        made = self.path / "image.erofs"
        subprocess.run(["mkfs.erofs", "--all-root", "-Enoinline_data", made, files], check=True, capture_output=True)
        return made

    def process(self, *command: str, **others: Any) -> dict[str, Any]:
        """`process` of an OCI config, as an instance has it."""
        return {**self.config(*command)["process"], **others}

    def config(self, *command: str) -> dict[str, Any]:
        """The OCI config of a guest's program: that of a container, in the guest's own namespaces."""
        made = spec.config(
            InstanceSpec(image="busybox", command=list(command)),
            ImageConfig(),
            user=User(),
            id_base=ID_BASE,
            hostname="guest",
            cgroup="program",
        )
        for name in ("uidMappings", "gidMappings", "seccomp", "resources"):
            del made["linux"][name]
        made["linux"]["sysctl"] = {}
        made["linux"]["namespaces"] = [{"type": kind} for kind in ("pid", "mount", "ipc", "uts", "cgroup")]
        return made

    @contextmanager
    def start(self, *command: str, cold: bool = False, **identity: Any) -> Iterator[Guest]:
        """A guest whose first program is `command`."""
        guest = Guest(self, self.config(*command), cold, identity)
        try:
            yield guest
        finally:
            guest.remove()

    def run(self, *command: str, cold: bool = False) -> tuple[int, str, str]:
        """The exit status and the output of a guest's program, which gets no input."""
        with self.start(*command, cold=cold) as guest:
            out, err = guest.process.communicate(timeout=patiently(120))
            return guest.process.returncode, out, err

    def close(self) -> None:
        os.close(self.memory)
        os.close(self.state)


class Guest:
    """A guest that runs. `process` is `insula-oci run`, with the streams of the guest's first program."""

    def __init__(self, guests: Guests, config: dict[str, Any], cold: bool, identity: dict[str, Any]) -> None:
        self.guests = guests
        self.name = f"guest-{uuid.uuid4().hex[:8]}"
        self.disk = guests.path / f"{self.name}.ext4"
        with self.disk.open("wb") as file:
            file.truncate(DISK)
        options = ["-q", "-E", "lazy_itable_init=1,nodiscard"]
        subprocess.run(["mkfs.ext4", *options, self.disk], check=True, capture_output=True)
        opened = [os.open(guests.image, os.O_RDONLY), os.open(self.disk, os.O_RDWR)]
        state = os.open(f"/proc/self/fd/{guests.state}", os.O_RDONLY)
        machine: dict[str, Any] = {
            "kernel": root.KERNEL,
            "initramfs": root.INITRAMFS,
            "memory": MEMORY,
            "disks": [["image", 4, True], ["disk", 5]],
            "interfaces": [template.INTERFACES[0]],
        }
        if not cold:
            machine |= {"memory_fd": 6, "state": 7}
        plan = {
            "machine": machine,
            "qemu": root.QEMU,
            "disk": DISK,
            "identity": {"hostname": "guest", **identity},
            "network": {"interfaces": [], "routes": []},
            "program": {"config": config, "read_only": False, "files": {}},
        }
        given = os.memfd_create("plan")
        os.write(given, json.dumps(plan).encode())
        os.lseek(given, 0, os.SEEK_SET)
        try:
            self.process = self._start([given, *opened, guests.memory, state])
        finally:
            for fd in (given, *opened, state):
                os.close(fd)

    def _start(self, descriptors: Sequence[int]) -> subprocess.Popen[str]:
        bundle = self.guests.path / "bundle"
        (bundle / "config.json").write_text(json.dumps(container_config()))
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 100) for fd in descriptors]

        def renumber() -> None:
            for number, fd in enumerate(high):
                os.dup2(fd, 3 + number, inheritable=True)

        command = self.guests.oci.command("run", "--preserve-fds", len(high), "--bundle", bundle, self.name)
        pipe = subprocess.PIPE
        try:
            return subprocess.Popen(
                command, preexec_fn=renumber, close_fds=False, stdin=pipe, stdout=pipe, stderr=pipe, text=True
            )
        finally:
            for fd in high:
                os.close(fd)

    def execute(self, *command: str, given: str = "") -> tuple[int, str, str]:
        """The exit status and the output of another program in the guest."""
        process = json.dumps(self.guests.process(*command))
        done = self.guests.oci.run("exec", self.name, root.SHIM, "exec", process, input=given)
        return done.status, done.out, done.err

    def line(self) -> str:
        """The next line of its output."""
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def remove(self) -> None:
        self.guests.oci.run("delete", "--force", self.name)
        self.process.communicate(timeout=patiently(30))
        self.disk.unlink()


def container_config() -> dict[str, Any]:
    """The container of the shim and QEMU: an ordinary user in namespaces of its own, without a capability."""
    ids = [{"containerID": 0, "hostID": ID_BASE, "size": 65536}]
    sets = ("bounding", "effective", "permitted", "inheritable", "ambient")
    return {
        "ociVersion": "1.2.0",
        "hostname": "machine",
        "root": {"path": "rootfs", "readonly": True},
        "process": {
            "user": {"uid": 1, "gid": 1},
            "args": [root.SHIM],
            "cwd": "/",
            "capabilities": {each: [] for each in sets},
            "noNewPrivileges": True,
        },
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "size=64k"]},
        ],
        "linux": {
            "namespaces": [{"type": kind} for kind in spec_namespaces()],
            "uidMappings": ids,
            "gidMappings": ids,
            "resources": {"devices": [{"allow": False, "access": "rwm"}], "pids": {"limit": 64}},
            "seccomp": seccomp_default.profile([]),
        },
    }


def spec_namespaces() -> tuple[str, ...]:
    return ("user", "pid", "mount", "network", "ipc", "uts", "cgroup")
