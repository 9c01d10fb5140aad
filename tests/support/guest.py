"""A virtual machine of Debian 12 with systemd and cgroup v2, driven through a virtio-serial port.

QEMU emulates the processor (TCG), because a usable KVM is not to be had everywhere, and there is no network device.
The disk is a copy of scripts/guest's. The checkout is a second disk, whose content is a tar archive.
tests/modern/agent.py runs inside and does what it is told.
"""

from __future__ import annotations

import json
import select
import shlex
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.cli import REPOSITORY

CHECKOUT = "/root/insula"
PATIENCE = 8  # every time limit of this file times this: the host may have other work
_SHARED = ("scripts", "packaging", "src", "tests", "pyproject.toml", "README.md")


@dataclass(frozen=True)
class Done:
    """A command that ran inside: exit status, output with standard error, seconds as the guest counts them."""

    command: str
    status: int
    out: str
    seconds: float


KERNEL_OPTIONS = (
    "console=ttyS0 panic=-1 quiet net.ifnames=0 tsc=reliable mitigations=off init_on_alloc=0"
    " transparent_hugepage=madvise norandmaps softlockup_panic=1 watchdog_thresh=30"
)
"""With a processor that hangs for a minute the kernel says `LOCKUP` and panics, and QEMU ends. Memory is cleared once,
when a program gets it, and by the page: to clear is slow. Programs are always at the same addresses: what is translated
of one serves its next process."""
LOCKUP = "soft lockup"
"""Two emulated processors have been seen to hang for minutes: then tests/stages.py runs its stage once more."""


class Guest:
    """The machine; `directory` holds the disk and the kernel, `scratch` what belongs to this run of it."""

    def __init__(self, directory: Path, scratch: Path) -> None:
        self.console, self._disk, self._checkout = scratch / "console", scratch / "disk", scratch / "checkout.tar"
        self._directory = directory
        subprocess.run(["cp", "--sparse=always", directory / "disk", self._disk], check=True, timeout=60 * PATIENCE)
        shared = [name for name in _SHARED if (REPOSITORY / name).exists()]
        # with __pycache__: compiling is what an emulated processor is slow at
        compileall = [sys.executable, "-m", "compileall", "-q", "src", "tests"]
        subprocess.run(compileall, cwd=REPOSITORY, check=True, timeout=60 * PATIENCE)
        pack: list[str | Path] = ["tar", "-c", "-f", self._checkout, "-C", REPOSITORY, "--exclude=*.pyc.*", *shared]
        packed = subprocess.run(pack, check=False, timeout=60 * PATIENCE)
        assert packed.returncode in (0, 1), "1: a file changed, as other tests compile what they import"
        self._start()

    def _options(self, agent: int) -> str:
        # tsc=reliable: Linux takes an emulated processor's counter for unsteady, and to ask the hpet is slow;
        # -la57: page tables of four levels are faster to walk than of five; -erms, -fsrm: with them Linux and the C
        # library copy byte by byte where they could copy words. One processor: it does the same work in two thirds of
        # the time of two, whose atomic operations are slow, and which wait for each other while the host is busy
        return f"""
            -nodefaults -no-user-config -machine q35 -accel tcg -cpu max,-la57,-erms,-fsrm -smp 1
            -m 1536M -no-reboot
            -kernel {self._directory}/kernel -initrd {self._directory}/initrd
            -append {shlex.quote(KERNEL_OPTIONS)}
            {self._devices(agent)}
        """

    def _devices(self, agent: int) -> str:
        return f"""
            -drive file={self._disk},format=raw,if=virtio,cache=unsafe
            -drive file={self._checkout},format=raw,if=virtio,readonly=on
            -device virtio-serial-pci -device virtserialport,chardev=agent,name=agent
            -chardev socket,id=agent,fd={agent}
            -chardev file,id=console,path={self.console},append=on -serial chardev:console
            -device virtio-rng-pci -nic none -monitor none -display none
        """

    def _start(self) -> None:
        self._agent, theirs = socket.socketpair()
        self._received = b""
        options = self._options(theirs.fileno())
        # it must not go on without us
        command = ["setpriv", "--pdeathsig", "KILL", "qemu-system-x86_64", *shlex.split(options)]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
        theirs.close()

    def wait_until_booted(self, timeout: float = 120.0) -> str:
        """The boot ID (random(4)) of the kernel that has come up."""
        boot: str = self._receive(timeout * PATIENCE)["boot"]
        return boot

    def run(self, command: str, timeout: float = 60.0) -> Done:
        """Run a shell command inside, whatever comes of it."""
        timeout *= PATIENCE
        self._agent.sendall(json.dumps({"command": command, "timeout": timeout}).encode() + b"\n")
        return Done(command, **self._receive(timeout + 30))

    def ok(self, command: str, timeout: float = 60.0) -> str:
        """The output of a command that must succeed."""
        done = self.run(command, timeout)
        assert done.status == 0, f"{done.command}: exit status {done.status}\n{done.out}"
        return done.out.rstrip("\n")

    def insula(self, *arguments: str, timeout: float = 60.0) -> Any:
        """The decoded answer of `insula --json`."""
        return json.loads(self.ok(shlex.join(["insula", "--json", *arguments]), timeout))

    def reboot(self, timeout: float = 60.0) -> str:
        """`systemctl reboot`, which must end within `timeout` seconds, and the new boot ID.

        QEMU is started anew: it emulates a processor that was only reset at a third of the speed.
        """
        self.ok("sleep 1 && systemctl reboot &")  # or the answer might get lost
        try:
            self._process.wait(timeout * PATIENCE)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the guest does not go down in {timeout} s:\n{self.last_lines()}") from None
        self._agent.close()
        self._start()
        return self.wait_until_booted()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._agent.close()
        self._disk.unlink()

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
        """The end of what the kernel and systemd wrote to the console; before it, that the kernel hung, if it did."""
        lines = self.console.read_text(errors="replace").splitlines()
        return "\n".join([*(line for line in lines[:-count] if LOCKUP in line), *lines[-count:]])
