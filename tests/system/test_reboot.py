"""A simulated reboot: every process ends, memory is lost, and the kernel has a new boot ID."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.daemon import Daemon
from tests.support.machine import Run
from tests.support.wait import until

BOOT_ID = "/proc/sys/kernel/random/boot_id"
SLEEP = ("busybox", "sleep", "600")


class Rebooting(Daemon):
    """A daemon that sees a boot_id of our making, in a mount namespace of its own."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.boot_id = self.path / "boot_id"
        self._new_boot()
        script = f'mount --bind {self.boot_id} {BOOT_ID} && exec "$@"'
        self.wrapper = ("unshare", "--mount", "--propagation", "slave", "sh", "-c", script, "sh")

    def _new_boot(self) -> None:
        self.boot_id.write_text(f"{uuid.uuid4()}\n")

    def reboot(self) -> None:
        for name in ("insulad", "monitor", "zygote"):
            self.kill(name)
        for pid in self._pids_in_cgroups():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        until(lambda: not self._pids_in_cgroups(), "every instance is dead")
        for line in reversed(Path("/proc/self/mountinfo").read_text().splitlines()):
            if (target := line.split()[4]).startswith((f"{self.path}/", f"/run/netns/{self.prefix}-")):
                subprocess.run(["umount", "--lazy", target], check=False, capture_output=True)
        shutil.rmtree(self.run)
        self._new_boot()
        self.start()


@pytest.fixture
def host(run_: Run) -> Iterator[Rebooting]:
    daemon = Rebooting(run_)
    try:
        daemon.start()
        yield daemon
    finally:
        daemon.remove()


def states(daemon: Daemon) -> dict[str, str]:
    return {view["instance"]["name"]: view["status"]["state"] for view in daemon.cli.json("ps", "-a")}


def test_a_reboot_starts_instances_by_their_policies(host: Rebooting) -> None:
    cli = host.cli
    cli.ok("run", "-d", "--name", "always", "--restart", "always", *SLEEP)
    cli.ok("run", "-d", "--name", "unless", "--restart", "unless-stopped", *SLEEP)
    cli.ok("run", "-d", "--name", "stopped", "--restart", "unless-stopped", *SLEEP)
    cli.ok("stop", "-t", "0", "stopped")
    cli.ok("run", "-d", "--name", "never", *SLEEP)
    cli.ok("run", "-d", "--rm", "--name", "fleeting", *SLEEP)
    cli.ok("exec", "always", "sh", "-c", "echo kept > /note")
    host.reboot()
    wanted = {"always": "running", "unless": "running", "stopped": "exited", "never": "exited"}
    until(lambda: states(host) == wanted, "the policies are carried out")
    assert cli.ok("exec", "always", "cat", "/note") == "kept"
    assert cli.run("exec", "always", "ping", "-c", "1", "-W", "20", "unless").status == 0
    cli.ok("start", "never")
    assert states(host)["never"] == "running"


def test_a_restart_of_the_daemon_is_no_reboot(host: Rebooting) -> None:
    """The control: with the same boot_id and running instances, none is started again."""
    cli = host.cli
    cli.ok("run", "-d", "--name", "always", "--restart", "always", *SLEEP)
    pid = cli.json("ps")[0]["status"]["pid"]
    host.kill("insulad")
    host.start()
    assert cli.json("ps")[0]["status"]["pid"] == pid


def test_a_pause_before_a_restart_outlives_the_daemon(host: Rebooting) -> None:
    """An instance that waited for its restart when insulad was killed is started by the next one, and counted on."""
    cli = host.cli
    options = ("--restart", "on-failure:5")
    cli.ok("run", "-d", "--name", "failing", *options, "busybox", "sh", "-c", "echo run; exit 3")
    until(lambda: "restarting (3)" in cli.ok("ps"), "it waits", timeout=20)
    host.kill("insulad")
    begun = count_runs(host)
    assert begun < 6
    host.start()
    until(lambda: count_runs(host) == 6, "the first run and five retries", timeout=30)
    until(lambda: "failing" not in cli.ok("ps"), "then it is given up")
    [view] = cli.json("ps", "-a")
    assert (view["status"]["state"], view["status"]["restarts"]) == ("exited", 5)


def count_runs(daemon: Daemon) -> int:
    """How often it has printed, from its log: also while there is no daemon."""
    [log] = daemon.root.glob("instances/*/log")
    return sum(path.read_bytes().count(b"run") for path in log.iterdir())
