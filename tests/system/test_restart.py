"""Restart policies across ends of the daemon and the host: counts, delays, and what does not count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.cli import Cli
from tests.support.daemon import Daemon
from tests.support.wait import until
from tests.system.test_reboot import Rebooting, host, states

__all__ = ["host"]
SLEEP = ("--stop-timeout", "0", "busybox", "sleep", "600")


def status(cli: Cli, name: str) -> dict[str, Any]:
    [found] = [view["status"] for view in cli.json("ps", "-a") if view["instance"]["name"] == name]
    return dict(found)


def test_the_number_of_restarts_outlives_the_daemon(fresh: Daemon) -> None:
    """`on-failure:3` is three restarts in all, however long each run was, and whichever insulad made them."""
    cli = fresh.cli
    script = "while ! [ -e /end ]; do sleep 0.05; done; rm /end; exit 3"
    cli.ok("run", "-d", "--name", "job", "--restart", "on-failure:3", "busybox", "sh", "-c", script)
    for restarts in (1, 2, 3):
        cli.run("exec", "job", "touch", "/end")  # PID 1 may take it along when it ends
        until(lambda n=restarts: (s := status(cli, "job"))["state"] == "running" and s["restarts"] == n, "again")  # type: ignore[misc]
        fresh.kill("insulad")
        fresh.start()
        assert status(cli, "job")["restarts"] == status(cli, "job")["backoff"] == restarts
    cli.run("exec", "job", "touch", "/end")  # PID 1 may take it along when it ends
    until(lambda: status(cli, "job")["state"] == "exited", "it is given up")
    fresh.kill("insulad")
    fresh.start()
    assert status(cli, "job")["state"] == "exited", "and stays so"
    cli.ok("start", "job")
    assert status(cli, "job")["restarts"] == 0, "a start by the user begins anew"


def test_a_failed_start_counts_as_restart(fresh: Daemon) -> None:
    """The program is gone at the second start: that is tried again, and given up in the end."""
    cli = fresh.cli
    cli.ok("run", "-d", "--name", "gone", "--restart", "on-failure:2", "busybox", "sh", "-c", "rm /bin/sh; exit 1")

    def given_up() -> bool:
        found = status(cli, "gone")
        return (found["state"], found["restarts"], restarting(cli, "gone")) == ("failed", 2, False)

    until(given_up, "it is given up", timeout=20)
    until(lambda: fresh.log.read_text().count("instance default/gone does not start again") == 2, "each was tried")
    reason = cli.fails("start", "gone")
    assert status(cli, "gone")["error"] == reason
    assert reason == "cannot execute sh: no such file in the PATH"
    assert status(cli, "gone")["restarts"] == 0, "a start by the user begins anew"


def test_a_successful_start_resets_the_count(fresh: Daemon) -> None:
    """The control: the program comes back during the pause, and it runs."""
    cli = fresh.cli
    script = "if [ -e /again ]; then exec sleep 600; fi; touch /again; mv /bin/sh /bin/hidden; exit 1"
    options = ("--restart", "on-failure:10", "busybox", "sh", "-c", script)
    cli.ok("run", "-d", "--name", "back", *options)
    until(lambda: status(cli, "back")["state"] == "failed", "it fails to start")
    shell = fresh.path / "shell"
    shell.write_bytes(Path("/bin/busybox").read_bytes())
    shell.chmod(0o755)
    cli.ok("cp", shell, "back:/bin/sh")
    until(lambda: status(cli, "back")["state"] == "running", "it runs", timeout=30)
    assert 2 <= status(cli, "back")["restarts"] <= 10


def restarting(cli: Cli, name: str) -> bool:
    """Whether it waits for another start."""
    [found] = [view["restarting"] for view in cli.json("ps", "-a") if view["instance"]["name"] == name]
    return bool(found)


@pytest.mark.parametrize("end", ["reboot", "down"])
def test_a_shutdown_of_the_host_is_no_failure(host: Rebooting, end: str) -> None:
    cli = host.cli
    for policy in ("always", "unless-stopped", "on-failure", "no"):
        cli.ok("run", "-d", "--name", policy, "--restart", policy, *SLEEP)
        cli.ok("run", "-d", "--name", f"{policy}-ended", "--restart", policy, *SLEEP)
        cli.ok("stop", "-t", "0", f"{policy}-ended")
    if end == "reboot":
        host.reboot()
    else:
        host.down()
        host.start()
    running = {"always", "always-ended", "unless-stopped"}
    wanted = {name: "running" if name in running else "exited" for name in states(host)}
    until(lambda: states(host) == wanted, "the policies are carried out")
    assert len(wanted) == 8
