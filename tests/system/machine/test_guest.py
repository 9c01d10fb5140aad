"""Guests made from an image: programs run in a virtual machine as in a container. Kernel, QEMU and agent are real.

Without KVM each boot takes seconds of a processor; so one cold boot makes the template, and the rest are copies of it.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator

import pytest

from insula.kernel import process
from tests.support.guests import Guests, kernel
from tests.support.wait import until


@pytest.fixture(scope="module")
def guests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guests]:
    found = kernel()
    if found is None:
        pytest.skip("the kernel of guests is not there: scripts/kernel fetches it")
    made = Guests(tmp_path_factory.mktemp("guests"), found)
    yield made
    made.close()


def test_a_program_has_its_streams_and_its_status(guests: Guests) -> None:
    with guests.start("sh", "-c", "echo out; cat; echo err >&2; exit 7") as guest:
        out, err = guest.process.communicate("given\n", timeout=300)
        assert (guest.process.returncode, out) == (7, "out\ngiven\n")
        assert "err" in err.splitlines()


def test_a_boot_without_a_template_does_the_same(guests: Guests) -> None:
    status, out, _ = guests.run("sh", "-c", "echo booted; exit 3", cold=True)
    assert (status, out) == (3, "booted\n")


def test_what_a_program_has_written_is_on_the_disk_when_it_has_ended(guests: Guests) -> None:
    with guests.start("sh", "-c", "echo kept > /kept") as guest:
        assert guest.process.wait(300) == 0
        command = ["debugfs", "-R", "cat /upper/kept", str(guest.disk)]
        assert subprocess.run(command, capture_output=True, text=True, timeout=60).stdout == "kept\n"


def test_it_is_process_1_of_its_own_and_on_a_kernel_of_its_own(guests: Guests) -> None:
    with guests.start("sh", "-c", "echo $$; cat /proc/sys/kernel/osrelease; hostname; id -u; sleep 600") as guest:
        assert guest.line() == "1\n"
        release = guest.line().strip()
        assert release in guests.kernel.name and release != os.uname().release
        assert guest.line() == "guest\n" and guest.line() == "0\n"
        status, out, _ = guest.execute("sh", "-c", "ps; cat; exit 9", given="given\n")
        assert status == 9 and out.endswith("given\n")
        assert out.splitlines()[1].split()[0] == "1" and "init" not in out, "nothing of the agent"


def test_a_program_that_is_not_there(guests: Guests) -> None:
    status, _, err = guests.run("/bin/nothing")
    assert status == 127 and "no such file" in err.lower()
    with guests.start("sleep", "600") as guest:
        until(lambda: guest.execute("/bin/sh", "-c", "exit 5")[0] == 5, "a program runs in it")
        assert guest.execute("/bin/nothing")[0] == 127, "neither is another"


def test_signals_reach_the_program(guests: Guests) -> None:
    with guests.start("sh", "-c", "trap 'echo ended; exit 4' TERM; echo ready; while :; do sleep 0.1; done") as guest:
        assert guest.line() == "ready\n"
        guests.oci.ok("kill", guest.name, "TERM")
        assert guest.line() == "ended\n"
        assert guest.process.wait(300) == 4


def test_copies_of_a_template_differ_and_know_the_time(guests: Guests) -> None:
    """Without an identity of their own they would share random numbers, which also name a boot, and the time."""
    command = ("sh", "-c", "cat /proc/sys/kernel/random/uuid; cat /proc/sys/kernel/random/boot_id; date +%s; sleep 600")
    with guests.start(*command, hostname="first") as one, guests.start(*command, hostname="second") as other:
        found = [[each.line() for _ in range(3)] for each in (one, other)]
        now = time.time()
    assert len({line for lines in found for line in lines[:2]}) == 4
    assert all(abs(int(lines[2]) - now) < 300 for lines in found)


def test_a_slow_reader_stops_the_program_and_loses_nothing(guests: Guests) -> None:
    size = 3 << 20
    with guests.start("sh", "-c", f"dd if=/dev/zero bs=65536 count={size >> 16} 2>/dev/null; echo end") as guest:
        assert guest.process.stdout is not None
        time.sleep(1)  # nobody reads: windows and pipes fill
        out, _ = guest.process.communicate(timeout=300)
        assert len(out) == size + len("end\n") and out.endswith("end\n")


def test_nothing_is_writable_and_nothing_is_left(guests: Guests) -> None:
    with guests.start("sh", "-c", "echo ready; sleep 600") as guest:
        assert guest.line() == "ready\n"
        first = guests.oci.json("state", guest.name)["pid"]
        with open(f"/proc/{first}/mountinfo") as file:
            writable = {line.split()[4] for line in file if line.split()[5].startswith("rw")}
        assert writable == {"/proc", "/dev"}
        with open(f"/proc/{first}/status") as file:
            status = dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)
        assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
        started = process.start_time(first)
    assert not process.is_alive(first, started)


def test_the_template_can_not_be_written(guests: Guests) -> None:
    with pytest.raises(PermissionError):
        os.pwrite(guests.memory, b"x", 0)
    with pytest.raises(PermissionError):
        os.ftruncate(guests.memory, 0)
