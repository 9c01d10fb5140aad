"""Guests made from an image: programs run in a virtual machine as in a container. Kernel, QEMU and agent are real.

Without KVM each boot takes seconds of a processor; so one cold boot makes the template, and the rest are copies of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from insula.kernel import process
from insula.machine.guest import initramfs
from insula.machine.qemu import root, template
from insula.machine.shim.qmp import QmpError
from tests.support.guests import MEMORY, TRIES, Guests
from tests.support.wait import until


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


def test_a_program_with_another_container_than_most(guests: Guests, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that waits in a template for a usual program can't become it."""
    usual = guests.config

    def smaller(*command: str) -> dict[str, Any]:
        return json.loads(json.dumps(usual(*command)).replace("size=67108864", "size=1048576"))  # type: ignore[no-any-return]

    for config, size in ((usual, "65536k"), (smaller, "1024k")):
        monkeypatch.setattr(guests, "config", config)
        status, out, _ = guests.run("sh", "-c", "echo $$; cat /proc/self/cgroup; grep /dev/shm /proc/mounts")
        assert status == 0 and out.startswith("1\n0::/\n") and f"size={size}" in out


def test_a_program_that_is_not_there(guests: Guests) -> None:
    status, _, err = guests.run("/bin/nothing")
    assert status == 127 and "no such file" in err.lower()
    with guests.start("sleep", "600") as guest:
        until(lambda: guest.execute("/bin/sh", "-c", "exit 5")[0] == 5, "a program runs in it")
        assert guest.execute("/bin/nothing")[0] == 127, "neither is another"


def test_a_program_ends_with_the_client_that_stands_for_it(guests: Guests) -> None:
    """And nothing else does: the answers to others arrive."""
    with guests.start("sh", "-c", "echo ready; cat") as guest:
        assert guest.line() == "ready\n"
        what = json.dumps(guests.process("sleep", "7531"))
        client = subprocess.Popen(guests.oci.command("exec", guest.name, root.SHIM, "exec", what))
        until(lambda: "sleep 7531" in guest.execute("ps")[1], "it runs")
        first = guests.oci.json("state", guest.name)["pid"]
        [stand_in] = [each for each in children_of_containers(first) if b"7531" in command_line(each)]
        os.kill(stand_in, signal.SIGKILL)
        assert client.wait(60) == 137
        until(lambda: "sleep 7531" not in guest.execute("ps")[1], "it has ended")
        assert guest.execute("sh", "-c", "cat; exit 5", given="given\n")[:2] == (5, "given\n")
        out, _ = guest.process.communicate("first\n", timeout=300)
        assert out == "first\n"


def children_of_containers(first: int) -> list[int]:
    """The processes in the PID namespace of a container's first process."""
    own = os.readlink(f"/proc/{first}/ns/pid")
    found = []
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if name.isdigit() and os.readlink(f"/proc/{name}/ns/pid") == own:
                found.append(int(name))
    return found


def command_line(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def test_signals_reach_the_program(guests: Guests) -> None:
    with guests.start("sh", "-c", "trap 'echo ended; exit 4' TERM; echo ready; while :; do sleep 0.1; done") as guest:
        assert guest.line() == "ready\n"
        guests.oci.ok("kill", guest.name, "TERM")
        assert guest.line() == "ended\n"
        assert guest.process.wait(300) == 4


SECRETS = "cat /proc/sys/kernel/random/uuid /proc/sys/kernel/random/boot_id /etc/machine-id; hostname"
ANSWER = "while read -r _; do adjtimex | grep tv_; done"
UNSEEDED = """\
import os
from insula.agent import early, identity, root
from insula.container.create import spawn
drawn = []
open_port, mount = early.open_port, root.mount
early.open_port = lambda: (os.getrandom(16), open_port())[1]
identity.reseed = lambda seed: drawn.append(os.getrandom(16).hex())
root.mount = lambda machine, **options: mount(drawn[0], **options)
del spawn.spawn
main()
"""
"""Instead of mixing in random numbers from the host, the agent draws one, which the program finds as /etc/machine-id.
The kernel mixes in the time whenever the last time is five seconds ago, so it has just done that in the template. No
process can be made for the program: one waits for it in the template."""


def secrets(guests: Guests, name: str) -> list[str]:
    """Random numbers and names of one more copy."""
    with guests.start("sh", "-c", f"{SECRETS}; sleep 600", hostname=name) as guest:
        return [guest.line() for _ in range(4)]


def test_copies_of_a_template_differ(guests: Guests) -> None:
    found = [secrets(guests, name) for name in ("first", "second")]
    assert [lines[3] for lines in found] == ["first\n", "second\n"]
    assert len({line for lines in found for line in lines}) == 8, "not even the ID in the image is shared"
    assert "0" * 32 + "\n" not in found[0] + found[1]


def test_copies_without_fresh_random_numbers_are_equal(guests: Guests, tmp_path: Path) -> None:
    """What the test above would see if the agent did not mix in what the host gives. It is tried again: the kernel of a
    guest that takes long mixes in something by itself."""
    init = initramfs.INIT.replace("\nmain()\n", f"\n{UNSEEDED}")
    assert init != initramfs.INIT
    unseeded = Guests(tmp_path, guests.kernel, init)
    try:
        tried = ([secrets(unseeded, "same")[2] for _ in range(2)] for _ in range(TRIES))
        assert any(one == other for one, other in tried)
    finally:
        unseeded.close()


def test_a_copy_knows_the_time(guests: Guests) -> None:
    """To a tenth of a second: its clock is between two moments of ours."""
    with guests.start("sh", "-c", ANSWER) as guest:
        assert guest.process.stdin is not None
        before = time.time()
        guest.process.stdin.write("\n")
        guest.process.stdin.flush()
        seconds, micros = (int(guest.line().split()[1]) for _ in range(2))
        assert before - 0.1 <= seconds + micros / 1e6 <= time.time() + 0.1


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


def test_a_template_that_is_not_made_says_why(
    guests: Guests, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """QEMU's own words are in the error, and not between the lines of insulad's log."""
    (tmp_path / "kernel").write_text("no kernel\n")
    with pytest.raises(QmpError, match="kernel") as failed:
        template.make(str(tmp_path / "kernel"), f"{guests.root}{root.INITRAMFS}", MEMORY)
    assert "qemu" in str(failed.value) and "\n" not in str(failed.value)
    assert capfd.readouterr().err == ""
