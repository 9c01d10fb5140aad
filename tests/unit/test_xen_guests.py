"""What the driver of Xen takes from the hypervisor: consoles and names. tests/xen has the guests themselves."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import pytest

from insula.control.instances.drivers.xen.guests import Guests, open_console
from insula.control.instances.drivers.xen.keepers import Keepers
from insula.machine.hypervisor import DiskConfig, Hypervisor
from insula.machine.installation import GuestSize
from insula.machine.kept import GuestFiles
from insula.machine.libvirt import elements, xen
from insula.model.errors import Failed, Unavailable

FILES = GuestFiles(Path("/boot/vmlinux"), Path("/boot/initramfs"), Path("/boot/vif"))


def test_a_console_passes_every_byte_on() -> None:
    master, slave = os.openpty()
    console = open_console(Path(os.ttyname(slave)))
    every = bytes(range(256))
    try:
        os.write(master, every)
        found = b""
        while len(found) < len(every):
            found += os.read(console, 256)
        assert found == every
        os.write(console, every)
        found = b""
        while len(found) < len(every):
            found += os.read(master, 256)
        assert found == every
    finally:
        for fd in (master, slave, console):
            os.close(fd)


@pytest.mark.parametrize("path", ["/etc/passwd", "/dev/null", "/dev/pts/../null", "/dev/pts/ptmx", "/dev/pts/x", "tty"])
def test_what_is_no_terminal_of_the_host_is_not_opened(path: str) -> None:
    with pytest.raises(Failed, match="is no terminal"):
        open_console(Path(path))


def test_a_console_that_is_gone_is_one_line() -> None:
    with pytest.raises(Failed, match=r"the console /dev/pts/999999 can't be opened: No such file"):
        open_console(Path("/dev/pts/999999"))


def test_a_guest_has_no_path_but_those_of_insula_and_no_emulator() -> None:
    def nobody() -> Hypervisor:
        raise Unavailable("nobody is asked")

    guests = Guests(Keepers(nobody), "insula")
    instance = uuid.uuid4().hex
    disks = [DiskConfig("/image", read_only=True), DiskConfig("/disk")]
    config = guests.config(instance, GuestSize(256, 2), FILES, disks, ["02:00:00:00:00:01"])
    made = xen.domain(config)
    assert made.findtext("name") == f"insula-{instance}" and made.findtext("vcpu") == "2"
    assert made.findtext("on_reboot") == "destroy", "a guest whose kernel panics is off"
    assert made.find("./devices/emulator") is None and made.find("./devices/graphics") is None
    [interface] = elements.devices(elements.text(made), "interface")
    assert interface.get("type") == "ethernet"
    assert [each.get("path") for each in interface.iter("script")] == ["/boot/vif"]
    assert "loglevel=0" in (made.findtext("./os/cmdline") or "")
