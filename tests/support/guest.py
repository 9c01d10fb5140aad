"""A virtual machine of Debian 12 with systemd and cgroup v2, driven through a virtio-serial port.

QEMU emulates the processor (TCG), because a usable KVM is not to be had everywhere, and there is no network device.
The disk is scripts/guest's; what the machine writes goes to a temporary file that is gone with QEMU. The checkout is
a second disk, whose content is a tar archive. tests/modern/agent.py runs inside and does what it is told.
"""

from __future__ import annotations

import json
import select
import shlex
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.cli import REPOSITORY

CHECKOUT = "/root/insula"
_SHARED = ("scripts", "packaging", "src", "pyproject.toml", "README.md")


@dataclass(frozen=True)
class Done:
    """A command that ran inside: exit status, output with standard error, seconds as the guest counts them."""

    command: str
    status: int
    out: str
    seconds: float


class Guest:
    """The machine; `directory` holds the disk and the kernel, `scratch` what belongs to this run of it."""

    def __init__(self, directory: Path, scratch: Path, memory: str = "1536M") -> None:
        self.console = scratch / "console"
        self._received = b""
        checkout = scratch / "checkout.tar"
        shared = [name for name in _SHARED if (REPOSITORY / name).exists()]
        subprocess.run(
            ["tar", "-c", "-f", checkout, "--exclude=__pycache__", "-C", REPOSITORY, *shared], check=True, timeout=60
        )
        ours, theirs = socket.socketpair()
        arguments = {
            "machine": "q35",
            "accel": "tcg,thread=multi",
            "cpu": "max",
            "smp": "2",
            "m": memory,
            "kernel": directory / "kernel",
            "initrd": directory / "initrd",
            "append": "console=ttyS0 panic=-1 quiet net.ifnames=0",
            "serial": f"file:{self.console}",
            "nic": "none",
            "monitor": "none",
            "display": "none",
        }
        devices = [
            ("drive", f"file={directory}/disk,format=raw,if=virtio,snapshot=on,cache=unsafe"),
            ("drive", f"file={checkout},format=raw,if=virtio,readonly=on"),
            ("device", "virtio-serial-pci"),
            ("chardev", f"socket,id=agent,fd={theirs.fileno()}"),
            ("device", "virtserialport,chardev=agent,name=agent"),
            ("device", "virtio-rng-pci"),
        ]
        command = ["qemu-system-x86_64", "-nodefaults", "-no-user-config"]
        for name, value in [*arguments.items(), *devices]:
            command += [f"-{name}", str(value)]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
        theirs.close()
        self._agent = ours

    def wait_until_booted(self, timeout: float = 120.0) -> str:
        """The boot ID (random(4)) of the kernel that has come up."""
        boot: str = self._receive(timeout)["boot"]
        return boot

    def run(self, command: str, timeout: float = 60.0) -> Done:
        """Run a shell command inside, whatever comes of it."""
        self._agent.sendall(json.dumps({"command": command, "timeout": timeout}).encode() + b"\n")
        return Done(command, **self._receive(timeout + 30))

    def ok(self, command: str, timeout: float = 60.0) -> str:
        """The output of a command that must succeed."""
        done = self.run(command, timeout)
        assert done.status == 0, f"{done.command}: exit status {done.status}\n{done.out}"
        return done.out.rstrip("\n")

    def insula(self, *arguments: str, timeout: float = 60.0) -> Any:
        """What `insula --json` answers, decoded."""
        return json.loads(self.ok(shlex.join(["insula", "--json", *arguments]), timeout))

    def reboot(self, timeout: float = 120.0) -> str:
        """`systemctl reboot`, and the new boot ID."""
        self.ok("systemctl reboot --no-block")
        return self.wait_until_booted(timeout)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._agent.close()

    def _receive(self, timeout: float) -> dict[str, Any]:
        deadline = time.monotonic() + timeout
        while b"\n" not in self._received:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._agent], [], [], left)[0]:
                raise AssertionError(f"the guest is silent for {timeout} s; its console:\n{self.last_lines()}")
            chunk = self._agent.recv(65536)
            assert chunk, f"QEMU ended with {self._process.wait(10)}; the guest's console:\n{self.last_lines()}"
            self._received += chunk
        line, self._received = self._received.split(b"\n", 1)
        message: dict[str, Any] = json.loads(line)
        return message

    def last_lines(self, count: int = 25) -> str:
        """The end of what the kernel and systemd wrote to the console."""
        return "\n".join(self.console.read_text(errors="replace").splitlines()[-count:])
