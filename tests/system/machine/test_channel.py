"""The shim and the agent talk over a console, as they do with a guest of Xen: a pty(7) of the host, a tty of the guest.

QEMU stands for Xen here: it has the console, and the container of the shim has none of it. tests/xen has the real one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from insula.machine.guest import initramfs
from insula.machine.qemu import root
from insula.machine.qemu.command_line import arguments, descriptors
from tests.support.guests import FIRST, Guest, Guests, container_config
from tests.support.wait import patiently, until

MAIN = "from insula.agent.main import main"
INIT = initramfs.INIT.replace(MAIN, f"early.open_channel = lambda: early.open_console('/dev/hvc0')\n{MAIN}")
ON_CONSOLE = {
    "socket,id=agent,fd=-1": "pty,id=agent",
    "virtserialport,chardev=agent,name=insula.agent": "virtconsole,chardev=agent",
    "socket,id=qmp,fd=-1": "null,id=qmp",
    "console=ttyS0 quiet": "console=hvc0 quiet loglevel=0",
}
"""What differs on the command line. The kernel takes ^O from its console for itself, as that of a guest of Xen does."""
_PTY = re.compile(rb"char device redirected to (/dev/pts/\d+) ")


class GuestOnConsole(Guest):
    """A guest in a QEMU outside of the container of its shim."""

    def __init__(self, guests: Guests, config: dict[str, Any]) -> None:
        self._name(guests)
        with guests.given() as (self.disk, [image, disk]):
            machine = guests.machine(True, [image, disk, -1, -1])._replace(
                kernel=str(guests.kernel / "vmlinux"), initramfs=str(guests.path / "initramfs")
            )
            words = arguments(machine)
            for there, here in ON_CONSOLE.items():
                words = [word.replace(there, here) for word in words]
            self.errors = guests.path / f"{self.name}.errors"
            with self.errors.open("wb") as errors:
                self.qemu = subprocess.Popen(
                    words, pass_fds=descriptors(machine), stdin=subprocess.DEVNULL, stdout=errors, stderr=errors
                )
        try:
            until(lambda: _PTY.search(self.errors.read_bytes()), "QEMU tells its pty")
            found = _PTY.search(self.errors.read_bytes())
            assert found
            channel = os.open(found[1], os.O_RDWR | os.O_NOCTTY)
            try:
                self._run({"channel": FIRST, "inserted": []}, config, {}, [channel])
            finally:
                os.close(channel)
        except BaseException:
            self.qemu.kill()
            raise

    def execute_on(self, data: bytes, *command: str) -> tuple[int, str]:
        """The exit status of another program in the guest, which is given `data`, and the SHA-256 of its output."""
        process = json.dumps(self.guests.process(*command))
        words = self.guests.oci.command("exec", self.name, root.SHIM, "exec", process)
        done = subprocess.run(words, input=data, stdout=subprocess.PIPE, timeout=patiently(120))
        return done.returncode, hashlib.sha256(done.stdout).hexdigest()

    def remove(self) -> None:
        super().remove()
        self.qemu.kill()
        self.qemu.wait()


@pytest.fixture(scope="module")
def guests(tmp_path_factory: pytest.TempPathFactory, guests_kernel: Path) -> Iterator[Guests]:
    made = Guests(tmp_path_factory.mktemp("guests"), guests_kernel, INIT, copies=False)
    yield made
    made.close()


@contextmanager
def started(guests: Guests, *command: str) -> Iterator[GuestOnConsole]:
    (guests.path / "bundle/config.json").write_text(json.dumps(container_config()))
    guest = GuestOnConsole(guests, guests.config(*command))
    try:
        yield guest
    finally:
        guest.remove()


def test_every_byte_arrives_both_ways_and_the_shim_ends_with_its_guest(guests: Guests) -> None:
    data = bytes(range(256)) * 8  # few: unlike Xen's, a console of QEMU loses what its reader is too slow for
    with started(guests, "sh", "-c", "echo ready; cat") as guest:
        assert guest.line() == "ready\n"
        assert guest.execute_on(data, "sh", "-c", "cat; exit 5") == (5, hashlib.sha256(data).hexdigest())
        guest.qemu.kill()
        assert guest.process.wait(patiently(30)) == 125
