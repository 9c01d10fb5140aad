"""Virtual machines for tests: guests of the busybox image, each with its shim and QEMU in a container of `insula-oci`.

The kernel is the one that `scripts/kernel` has fetched. What all guests share is made once: the initramfs, the
root of the container, an erofs of busybox, and a template.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import shutil
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from insula.control.instances.drivers.container import seccomp_default, spec
from insula.control.instances.drivers.container.users import User
from insula.control.instances.drivers.machine import jail, stored
from insula.control.instances.drivers.machine.moment import stand_still
from insula.control.tasks import together
from insula.control.workers import in_thread
from insula.kernel import process
from insula.machine.blank import BlankDisks
from insula.machine.guest import initramfs
from insula.machine.qemu import root, stream, template
from insula.machine.qemu.command_line import AcceleratorName, GuestDisk, MachineConfig
from insula.machine.shim.plan import command
from insula.model.errors import NotFound
from insula.model.objects import ImageConfig, InstanceSpec
from tests.support.oci import Oci
from tests.support.wait import patiently

CHECKOUT = Path(__file__).parents[2]
MEMORY = 160
DISK = 4 << 30
TRIES = 4
"""How often it is tried to have two copies draw the same random numbers."""
FIRST = 4  # the number of the first descriptor behind the plan
APPLETS = (
    "sh",
    "cat",
    "echo",
    "id",
    "ps",
    "sleep",
    "ip",
    "hostname",
    "date",
    "dd",
    "env",
    "touch",
    "mount",
    "stty",
    "adjtimex",
    "grep",
    "nc",
)
ID_BASE = 700000


def kernel() -> Path | None:
    """The directory of the guests' kernel; None if it was not fetched."""
    done = subprocess.run([CHECKOUT / "scripts/kernel", "--known"], capture_output=True, text=True, timeout=60)
    return Path(done.stdout.strip()) if done.returncode == 0 else None


def systems() -> Path | None:
    """The directory of guests that `scripts/systems` has made; None if it has not."""
    done = subprocess.run([CHECKOUT / "scripts/systems", "--known"], capture_output=True, text=True, timeout=60)
    return Path(done.stdout.strip()) if done.returncode == 0 else None


class Guests:
    """What guests share, below the directory `path`."""

    def __init__(self, path: Path, kernel: Path, init: str = initramfs.INIT, *, copies: bool = True) -> None:
        """`init` is what is executed as /init in guests, by Python. Without `copies` there is no template."""
        self.path = path
        self.kernel = kernel
        self.oci = Oci(path / "state")
        modules = next((kernel / "modules").parent.glob("modules"))
        (path / "initramfs").write_bytes(initramfs.build(modules, init))
        (path / "bundle/rootfs").mkdir(parents=True)
        root.build(path / "bundle/rootfs", (kernel / "vmlinux").read_bytes(), (path / "initramfs").read_bytes())
        self.root = path / "bundle/rootfs"
        self.image = self._image()
        self._blank = BlankDisks(path / "blank")
        self.memory = self.state = -1
        if copies:
            self.memory, self.state = template.make(
                str(kernel / "vmlinux"), str(path / "initramfs"), MEMORY, program=self.config("sh")
            )

    def _image(self) -> Path:
        files = self.path / "image"
        for name in ("bin", "etc", "proc", "sys", "dev", "tmp", "root"):
            (files / name).mkdir(parents=True)
        shutil.copy("/bin/busybox", files / "bin/busybox")
        for name in APPLETS:
            (files / "bin" / name).symlink_to("busybox")
        (files / "etc/machine-id").write_text(f"{0:032x}\n")  # of the image: no machine may have it
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
    def start(
        self,
        *command: str,
        cold: bool = False,
        moment: Moment | None = None,
        accelerator: AcceleratorName = "tcg",
        devices: Sequence[dict[str, Any]] = (),
        arriving: str = "",
        tap: int = -1,
        network: dict[str, Any] | None = None,
        **identity: Any,
    ) -> Iterator[Guest]:
        """A guest whose first program is `command`, or goes on from a moment; its container has `devices`. One that is
        `arriving` waits to be sent from another host, as a machine of that type. `tap` is the descriptor of its network
        device, which is configured as the agent's request `network` tells."""
        config = self.config(*(command or ("sh",)))
        config["hostname"] = identity.get("hostname", config["hostname"])
        (self.path / "bundle/config.json").write_text(json.dumps(container_config(devices)))
        guest = Guest(self, config, cold, accelerator, identity, moment, arriving, tap, network)
        try:
            yield guest
        finally:
            guest.remove()

    def run(self, *command: str, cold: bool = False) -> tuple[int, str, str]:
        """The exit status and the output of a guest's program, which gets no input."""
        with self.start(*command, cold=cold) as guest:
            out, err = guest.process.communicate(timeout=patiently(120))
            return guest.process.returncode, out, err

    @contextmanager
    def given(self, moment: Moment | None = None) -> Iterator[tuple[Path, list[int]]]:
        """A new disk, and what a guest gets as descriptors, which are closed afterwards: those of `machine`. Disk,
        memory and state are those of a moment if it goes on from one."""
        disk = self.path / f"{uuid.uuid4().hex}.ext4"
        if moment:
            stored.copy(moment.disk, disk)
        else:
            self._blank.make(disk, DISK)
        opened = [os.open(self.image, os.O_RDONLY), os.open(disk, os.O_RDWR)]
        memory, state = (moment.memory, moment.state) if moment else (self.memory, self.state)
        if state >= 0:
            opened += [os.dup(memory), os.open(f"/proc/self/fd/{state}", os.O_RDONLY)]
        try:
            yield disk, opened
        finally:
            for fd in opened:
                os.close(fd)

    def machine(self, cold: bool, descriptors: Sequence[int]) -> MachineConfig:
        """A machine with these descriptors: of the image, the disk, the template's memory and its state."""
        image, disk, memory, state = descriptors
        return MachineConfig(
            kernel=root.KERNEL,
            initramfs=root.INITRAMFS,
            memory=MEMORY,
            agent=-1,
            qmp=-1,
            disks=[GuestDisk("image", image, read_only=True), GuestDisk("disk", disk)],
            interfaces=template.INTERFACES[:1],
            memory_fd=-1 if cold else memory,
            state=-1 if cold else state,
        )

    def close(self) -> None:
        for fd in {self.memory, self.state} - {-1}:
            os.close(fd)


class Moment(NamedTuple):
    """What a guest had at one moment: descriptors of its memory, sealed, and its state, a file with its disk, its type
    of machine, and for how many seconds it stood still."""

    memory: int
    state: int
    disk: Path
    machine: str
    seconds: float


class Guest:
    """A guest that runs. `process` is `insula-oci run`, which was started at `began` (time.monotonic), with the streams
    of the guest's first program."""

    def __init__(
        self,
        guests: Guests,
        config: dict[str, Any],
        cold: bool,
        accelerator: AcceleratorName,
        identity: dict[str, Any],
        moment: Moment | None = None,
        arriving: str = "",
        tap: int = -1,
        network: dict[str, Any] | None = None,
    ) -> None:
        self._name(guests)
        with guests.given(moment) as (self.disk, descriptors):
            machine = guests.machine(cold, range(FIRST, FIRST + len(descriptors)))
            if tap >= 0:
                interface = template.INTERFACES[0]._replace(fd=FIRST + len(descriptors))
                machine, descriptors = machine._replace(interfaces=[interface]), [*descriptors, tap]
            if moment:
                machine = machine._replace(machine=moment.machine)
            if arriving:
                os.truncate(self.disk, 0)  # nothing of it is there yet
                os.truncate(self.disk, DISK)
                machine = machine._replace(memory_fd=-1, state=-1, machine=arriving, arriving=True)
            plan = {
                "arriving": bool(arriving),
                "resumed": moment is not None,
                **command(machine._replace(accelerator=accelerator), root.QEMU),
                "disk": DISK,
                "slots": [(1, None)],
                "inserted": [],
                "disks": [],
                "memory": MEMORY,
                "modules": [],
                "cpus": 1,
                "plugged": 0,
            }
            self._run(plan, config, identity, descriptors, network)

    def _name(self, guests: Guests) -> None:
        self.guests = guests
        self.name = f"guest-{uuid.uuid4().hex[:8]}"

    def _run(
        self,
        plan: dict[str, Any],
        config: dict[str, Any],
        identity: dict[str, Any],
        descriptors: Sequence[int],
        network: dict[str, Any] | None = None,
    ) -> None:
        """Start the shim, with what `plan` says of the machine."""
        plan |= {
            "identity": {"hostname": "guest", "generation": os.urandom(16).hex(), **identity},
            "network": network or {"interfaces": [], "routes": [], "tables": []},
            "program": {"config": config, "machine": uuid.uuid4().hex, "grows": False, "files": {}},
        }
        given = os.memfd_create("plan")
        os.write(given, json.dumps(plan).encode())
        os.lseek(given, 0, os.SEEK_SET)
        try:
            self.process = self._start([given, *descriptors])
        finally:
            os.close(given)

    def _start(self, descriptors: Sequence[int]) -> subprocess.Popen[str]:
        bundle = self.guests.path / "bundle"
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 100) for fd in descriptors]

        def renumber() -> None:
            for number, fd in enumerate(high):
                os.dup2(fd, 3 + number, inheritable=True)

        command = self.guests.oci.command("run", "--preserve-fds", len(high), "--bundle", bundle, self.name)
        pipe = subprocess.PIPE
        self.began = time.monotonic()
        try:
            return subprocess.Popen(
                command, preexec_fn=renumber, close_fds=False, stdin=pipe, stdout=pipe, stderr=pipe, text=True
            )
        finally:
            for fd in high:
                os.close(fd)

    def moment(self) -> Moment:
        """Hold it still, and keep what it has. It goes on."""
        netns = self.netns()
        disk = self.guests.path / f"{uuid.uuid4().hex[:8]}.disk"
        memory, state = (os.memfd_create(name, os.MFD_ALLOW_SEALING) for name in ("moment", "state"))
        read, write = os.pipe()
        size = MEMORY << 20

        async def work() -> None:
            receiving = partial(stream.split, read, memory, state, size, 2 * size, threading.Event())
            await together(in_thread(None, receiving), in_thread(None, partial(stored.copy, self.disk, disk)))

        try:
            stood = asyncio.run(stand_still(netns, write, work))
        finally:
            os.close(read)
        template.seal(memory)
        return Moment(memory, state, disk, stood.machine, stood.seconds)

    def netns(self) -> int:
        """A descriptor of the network namespace of its container. NotFound if it has ended."""
        try:
            return process.open_namespace(self.pid, process.start_time(self.pid) or 0, "net")
        except (ProcessLookupError, FileNotFoundError):
            raise NotFound("the guest has ended") from None

    @property
    def pid(self) -> int:
        """The PID of the shim."""
        return int(self.guests.oci.json("state", self.name)["pid"])

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


def container_config(devices: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """The container of the shim and QEMU: an ordinary user in namespaces of its own, without a capability."""
    allowed = [jail.allowed(each) for each in devices]
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
            "devices": [{**each, "fileMode": 0o666} for each in devices],
            "resources": {"devices": [{"allow": False, "access": "rwm"}, *allowed], "pids": {"limit": 64}},
            "seccomp": seccomp_default.profile([]),
        },
    }


def spec_namespaces() -> tuple[str, ...]:
    return ("user", "pid", "mount", "network", "ipc", "uts", "cgroup")
