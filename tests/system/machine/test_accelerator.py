"""KVM or TCG: what the trial finds is compared with QEMU alone on the same host. Nothing here needs KVM to work."""

from __future__ import annotations

import socket
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest

from insula.control.instances.drivers.machine import jail
from insula.machine.qemu import accelerator, root
from insula.machine.qemu.command_line import MachineConfig, arguments
from tests.support.guests import Guests
from tests.support.wait import patiently


class Alone(NamedTuple):
    """What became of QEMU alone, with KVM and the guests' kernel: after how many seconds its agent said something, None
    if it never did, and what QEMU said."""

    seconds: float | None
    said: str

    @property
    def error(self) -> str:
        return next((line for line in reversed(self.said.splitlines()) if "error" in line), "")


@pytest.fixture(scope="module")
def alone(guests: Guests, tmp_path_factory: pytest.TempPathFactory) -> Alone:
    said = tmp_path_factory.mktemp("alone") / "said"
    kernel, initramfs = (f"{guests.root}{path}" for path in (root.KERNEL, root.INITRAMFS))
    with ExitStack() as stack:
        (agent, of_agent), (qmp, of_qmp) = socket.socketpair(), socket.socketpair()
        for each in (agent, of_agent, qmp, of_qmp):
            stack.enter_context(each)
        given = (of_agent.fileno(), of_qmp.fileno())
        config = MachineConfig(kernel, initramfs, 128, agent=given[0], qmp=given[1], accelerator="kvm")
        errors = stack.enter_context(said.open("wb"))
        began = time.monotonic()
        words = arguments(config, root.QEMU)
        with subprocess.Popen(words, stdin=subprocess.DEVNULL, stderr=errors, pass_fds=given) as qemu:
            of_agent.close()
            agent.settimeout(patiently(3))
            try:
                heard = agent.recv(1) != b""
            except (TimeoutError, ConnectionError):
                heard = False
            seconds = time.monotonic() - began
            qemu.kill()
    return Alone(seconds if heard else None, said.read_text(errors="replace"))


def test_kvm_is_used_where_a_machine_starts_with_it(guests: Guests, tmp_path: Path, alone: Alone) -> None:
    record = tmp_path / "accelerator"
    image = (f"{guests.root}{root.KERNEL}", f"{guests.root}{root.INITRAMFS}")
    found = accelerator.choose(*image, record)
    if alone.seconds is None:
        assert found.name == "tcg", found
        assert alone.error in found.reason, "the reason is QEMU's own"
    elif alone.seconds < accelerator.PATIENCE / 4:
        assert found.name == "kvm", found
    assert accelerator.known(record) == found
    assert accelerator.choose("/nothing", "/nothing", record) == found, "it is not tried again"
    record.write_text(record.read_text().replace('"processor":"', '"processor":"another '))
    assert accelerator.known(record) is None, "on another processor it is"


def test_the_device_is_all_that_the_container_needs(guests: Guests, alone: Alone) -> None:
    """With it, QEMU gets in its container as far as QEMU alone does; without it not even there."""
    if not Path(accelerator.DEVICE).exists():
        pytest.skip(f"there is no {accelerator.DEVICE}")
    for devices in ((), (jail.KVM,)):
        with guests.start("echo", "it runs", cold=True, accelerator="kvm", devices=devices) as guest:
            works = bool(devices) and alone.seconds is not None
            try:
                out, err = guest.process.communicate(timeout=patiently(120 if works else 3))
            except subprocess.TimeoutExpired as hung:
                assert devices and not works, "a guest hangs only where it hangs in QEMU alone"
                out, err = (each.decode() if each else "" for each in (hung.stdout, hung.stderr))
                guest.process.kill()
            assert out == ("it runs\n" if works else "")
            assert works == (guest.process.returncode == 0)
            assert (alone.error if devices else "Could not access KVM kernel module") in err
