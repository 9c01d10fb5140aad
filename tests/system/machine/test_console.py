"""The screen of a machine by VNC: `insula console`, and what a viewer of the API gets."""

from __future__ import annotations

import os
import signal
import stat
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from insula.model import rules
from tests.support.cli import Cli
from tests.support.daemon import Daemon
from tests.support.rfb import VERSION, RfbViewer
from tests.support.small_systems import bios_disk
from tests.support.wait import until
from tests.system.conftest import TenantFactory
from tests.system.machine.test_disk_images import LONG, imported, started


@contextmanager
def console(cli: Cli, *words: str | Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`insula console` beside the test, and where it listens."""
    running = cli.start("console", *words)
    assert running.stdout
    try:
        yield running.stdout.readline().strip(), running
    finally:
        with suppress(ProcessLookupError):
            running.kill()
        running.communicate()


def test_a_viewer_sees_the_screen_and_types(tenants: TenantFactory, tmp_path: Path, daemon: Daemon) -> None:
    cli = tenants()
    imported(cli, tmp_path, bios_disk(), "small")
    started(cli, "vm", "small", "--network", "none")
    with console(cli, "vm") as (path, running):
        mode = os.stat(path)
        assert stat.S_ISSOCK(mode.st_mode) and stat.S_IMODE(mode.st_mode) == 0o600, "for nobody else"
        assert stat.S_IMODE(os.stat(os.path.dirname(path)).st_mode) == 0o700
        viewer, other = RfbViewer(Path(path)), RfbViewer(Path(path))
        assert viewer.version == VERSION and viewer.security == [1]
        before = viewer.picture()
        assert (viewer.width, viewer.height) == (720, 400) and len(set(before)) > 1, "text is there"
        again = viewer.picture()
        assert sum(a != b for a, b in zip(before, again, strict=True)) < 720 * 16 * 4, "the control: at most a cursor"
        for letter in "wxyz" * 20:
            viewer.key(ord(letter))
        viewer.point(10, 10)
        until(lambda: "wxyzwxyz" in cli.ok("logs", "vm"), "the guest has read the keys", LONG)
        until(lambda: changed(before, other) > changed(before, again), "the other viewer sees what was typed", LONG)
        viewer.close()
        assert len(other.picture()) == 720 * 400 * 4, "one that goes takes nobody along"

        assert listening(cli, "vm") == ["@insula-shim"], "nothing listens but for insulad"
        others = [RfbViewer(Path(path)) for _ in range(rules.MAX_VIEWERS - 1)]
        with pytest.raises(OSError):
            RfbViewer(Path(path))
        for number in range(1000):  # it asks, and reads nothing
            with suppress(BlockingIOError):
                others[0].socket.setblocking(False)
                others[0].socket.send(struct.pack(">BBHHHH", 3, 0, 0, 0, 720, 400) * 100)
            if number % 100 == 0:
                assert len(other.picture()) == 720 * 400 * 4, "others see the screen all the same"
        for each in others:
            each.close()

        daemon.kill("insulad")
        assert other.closed(), "the connection was by insulad"
        daemon.start()
        third = RfbViewer(Path(path))
        assert len(set(third.picture())) > 1, "the machine went on, and so does the console"

        assert "vm" in tenants().fails("console", "vm"), "that of another tenant"
        cli.ok("kill", "vm")
        assert third.closed(), "the machine has ended"
        with pytest.raises(OSError):
            RfbViewer(Path(path))
        running.send_signal(signal.SIGINT)
        assert running.wait(LONG) == 0
        assert not os.path.exists(path) and not os.path.exists(os.path.dirname(path))
        told = running.stderr.read() if running.stderr else ""
        assert "8 viewers" in told and "not run" in told, "viewers that were refused are told of"
    cli.ok("rm", "-f", "vm")


def listening(cli: Cli, name: str) -> list[str]:
    """What listens in the network namespace of a machine."""
    [machine] = [each["pid"] for each in cli.json("top", name) if "qemu" in each["command"]]
    found = []
    for line in Path(f"/proc/{machine}/net/unix").read_text().splitlines()[1:]:
        number, _, _, flags, _, _, _, *path = line.split()
        if int(flags, 16) & 1 << 16:  # __SO_ACCEPTCON
            found += path or [number]
    for kind in ("tcp", "tcp6"):
        rows = Path(f"/proc/{machine}/net/{kind}").read_text().splitlines()[1:]
        found += [row.split()[1] for row in rows if row.split()[3] == "0A"]
    return found


def test_where_a_console_listens(cli: Cli, tmp_path: Path) -> None:
    imported(cli, tmp_path, bios_disk(), "small")
    started(cli, "vm", "small", "--network", "none", "--devices", "full")
    path = tmp_path / "screen"
    path.write_text("mine")
    assert "can't be made" in cli.fails("console", "--listen", path, "vm")
    assert path.read_text() == "mine"
    path.unlink()
    with console(cli, "--listen", path, "vm") as (shown, _):
        assert shown == str(path)
        viewer = RfbViewer(path)
        assert len(set(viewer.picture())) > 1
        viewer.key(ord("k"))
        until(lambda: cli.ok("logs", "vm").endswith("k"), "an old keyboard works as well", LONG)
    with console(cli, "--port", "0", "vm") as (shown, running):
        host, _, port = shown.rpartition(":")
        assert host == "127.0.0.1" and len(set(RfbViewer((host, int(port))).picture())) > 1
        running.send_signal(signal.SIGTERM)
        assert running.wait(LONG) == 0
        assert running.stderr and "every user" in running.stderr.read()
    cli.ok("pause", "vm")
    assert "paused" in cli.fails("console", "vm")
    cli.ok("rm", "-f", "vm")
    cli.ok("run", "-d", "--name", "container", "busybox", "sleep", "1000")
    assert "no screen" in cli.fails("console", "container")
    cli.ok("rm", "-f", "container")


def changed(before: bytes, seen: RfbViewer | bytes) -> int:
    """The bytes that differ."""
    now = seen.picture() if isinstance(seen, RfbViewer) else seen
    return sum(a != b for a, b in zip(before, now, strict=True))
