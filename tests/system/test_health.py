"""Health checks: results, checks that hang, and a new insulad that continues them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.cli import Cli
from tests.support.daemon import Daemon
from tests.support.images import Layout, member, tar
from tests.support.wait import until

SLEEP = ("busybox", "sleep", "600")
EVERY = ("--health-interval", "1s")


def health(cli: Cli, name: str) -> Any:
    [view] = [view for view in cli.json("ps", "-a") if view["instance"]["name"] == name]
    return view["health"]


def becomes(cli: Cli, name: str, status: str) -> Any:
    def reached() -> Any:
        found = health(cli, name)
        return found if found and found["status"] == status else None

    return until(reached, f"{name} is {status}", timeout=30)


@contextmanager
def events(cli: Cli) -> Iterator[list[dict[str, Any]]]:
    """A list to which the events of the body are added at its end, also those just before."""
    revision = cli.json("status")["revision"]
    found: list[dict[str, Any]] = []
    yield found
    last = f"last-{len(found)}-{revision}"
    with cli.start("--json", "events", "--from-revision", str(revision)) as watching:
        cli.ok("run", "--rm", "--network", "none", "--name", last, "busybox", "true")
        assert watching.stdout
        for line in watching.stdout:
            event = json.loads(line)
            if event["name"] == last:
                break
            if event["tenant"] == cli.tenant:
                found.append(event)
        watching.kill()


def actions(found: list[dict[str, Any]], name: str) -> list[str]:
    return [event["action"] for event in found if event["name"] == name]


def test_healthy_and_unhealthy_and_healthy_again(cli: Cli) -> None:
    with events(cli) as found:
        command = "until test -e /begin; do sleep 0.1; done; echo looked; test ! -e /sick"
        options = ("--health-cmd", command, *EVERY, "--health-retries", "2", "--restart", "always")
        cli.ok("run", "-d", "--name", "web", *options, *SLEEP)
        assert health(cli, "web")["status"] == "starting"
        cli.ok("exec", "web", "touch", "/begin")
        becomes(cli, "web", "healthy")
        assert "running (healthy)" in cli.ok("ps")
        cli.ok("exec", "web", "touch", "/sick")
        sick = becomes(cli, "web", "unhealthy")
        assert sick["failures"] >= 2
        assert (sick["log"][-1]["exit_status"], sick["log"][-1]["output"]) == (1, "looked")
        assert len(sick["log"]) <= 5
        cli.ok("exec", "web", "rm", "/sick")
        assert becomes(cli, "web", "healthy")["failures"] == 0
        [view] = cli.json("ps")
        assert view["status"]["restarts"] == 0, "unhealthy instances are told about, not restarted"
    assert actions(found, "web") == ["created", "running", "healthy", "unhealthy", "healthy"]
    [unhealthy] = [event for event in found if event["action"] == "unhealthy"]
    assert (unhealthy["failures"], unhealthy["exit_status"]) == (2, 1)


def test_a_check_that_hangs_is_killed_with_what_it_started(cli: Cli) -> None:
    command = "echo before; sleep 611"
    options = ("--health-cmd", command, *EVERY, "--health-timeout", "1s", "--health-retries", "2")
    cli.ok("run", "-d", "--name", "slow", *options, *SLEEP)
    found = becomes(cli, "slow", "unhealthy")
    assert found["log"][-1]["exit_status"] is None
    assert found["log"][-1]["output"] == "before\n\nkilled after 1 s"
    sleeps = [p for p in cli.json("top", "slow") if "611" in p["command"] and not p["command"].startswith("/bin/sh")]
    assert len(sleeps) <= 1, "at most the one that runs now"


def test_output_is_bounded(cli: Cli) -> None:
    cli.ok("run", "-d", "--name", "loud", "--health-cmd", "yes | head -c 300000", *EVERY, *SLEEP)
    found = becomes(cli, "loud", "healthy")
    assert 4000 <= len(found["log"][-1]["output"]) <= 4096


def test_failures_in_the_start_period_do_not_count(cli: Cli) -> None:
    often = ("--health-start-interval", "1s", "--health-retries", "1")
    cli.ok("run", "-d", "--name", "late", "--health-cmd", "false", "--health-start-period", "1h", *often, *SLEEP)
    cli.ok("run", "-d", "--name", "soon", "--health-cmd", "false", *EVERY, *often, *SLEEP)  # the control

    becomes(cli, "soon", "unhealthy")
    checked = until(lambda: (found := health(cli, "late"))["log"] and found, "it was checked", timeout=30)
    assert (checked["status"], checked["failures"]) == ("starting", 0)


def test_a_check_that_cannot_be_executed(cli: Cli) -> None:
    """An image without a shell; and checks stay within the instance's limits."""
    layout = Layout()
    busybox = Path("/usr/bin/busybox").read_bytes()
    check = {"Test": ["CMD", "/nothing"], "Interval": 1_000_000, "Retries": 1}
    layer = tar(member("bin/"), member("bin/sleep", busybox, mode=0o755))
    layout.image([layer], process={"Cmd": ["sleep", "600"], "Healthcheck": check}, name="bare:1")
    assert cli.raw("image", "load", "-", stdin=layout.tar()).returncode == 0
    cli.ok("run", "-d", "--name", "bare", "bare:1")
    found = becomes(cli, "bare", "unhealthy")
    assert found["log"][-1]["exit_status"] == 127
    assert "/nothing" in found["log"][-1]["output"]


def test_the_users_options_override_the_images(cli: Cli) -> None:
    layout = Layout()
    busybox = Path("/usr/bin/busybox").read_bytes()
    layer = tar(member("bin/"), *(member(f"bin/{name}", busybox, mode=0o755) for name in ("busybox", "sh", "sleep")))
    check = {"Test": ["CMD-SHELL", "exit 3"], "Interval": 3_600_000_000_000, "Retries": 1}
    layout.image([layer], process={"Cmd": ["sleep", "600"], "Healthcheck": check}, name="checked:1")
    assert cli.raw("image", "load", "-", stdin=layout.tar()).returncode == 0
    cli.ok("run", "-d", "--name", "image", *EVERY, "checked:1")
    cli.ok("run", "-d", "--name", "user", *EVERY, "--health-cmd", "exit 0", "checked:1")
    cli.ok("run", "-d", "--name", "none", "--no-healthcheck", "checked:1")
    assert becomes(cli, "image", "unhealthy")["log"][-1]["exit_status"] == 3
    becomes(cli, "user", "healthy")
    assert health(cli, "none") is None


def test_an_instance_that_ended_has_no_health(cli: Cli) -> None:
    cli.ok("run", "-d", "--name", "short", "--health-cmd", "while test -e /wait; do sleep 0.1; done", *EVERY, *SLEEP)
    becomes(cli, "short", "healthy")
    cli.ok("exec", "short", "touch", "/wait")
    cli.ok("stop", "-t", "0", "short")
    assert health(cli, "short") is None
    cli.ok("start", "short")
    assert health(cli, "short")["status"] == "starting"
    cli.ok("exec", "short", "rm", "/wait")
    becomes(cli, "short", "healthy")


def test_a_new_insulad_goes_on_and_kills_old_checks(fresh: Daemon) -> None:
    cli = fresh.cli
    hang = ("--health-cmd", "test ! -e /hang || sleep 612", "--health-timeout", "8s")
    cli.ok("run", "-d", "--name", "web", *hang, *EVERY, *SLEEP)
    becomes(cli, "web", "healthy")
    cli.ok("exec", "web", "touch", "/hang")

    def sleeping() -> list[int]:
        return [p["pid"] for p in cli.json("top", "web") if p["command"] == "sleep 612"]

    [pid] = until(sleeping, "a check hangs")
    fresh.kill("insulad")
    fresh.start()
    until(lambda: not Path(f"/proc/{pid}").exists(), "the check of the time before is killed")
    cli.ok("exec", "web", "rm", "/hang")
    becomes(cli, "web", "healthy")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--health-cmd", "true", "--health-interval", "10ms"), "interval"),
        (("--health-cmd", "true", "--health-timeout", "48h"), "timeout"),
        (("--health-cmd", "true", "--health-retries", "100000"), "retries"),
    ],
)
def test_nonsense_is_refused(cli: Cli, options: tuple[str, ...], complaint: str) -> None:
    assert complaint in cli.fails("run", "-d", *options, *SLEEP, status=125)
    assert cli.json("ps", "-a") == []


def test_usage(cli: Cli) -> None:
    cli.fails("run", "--no-healthcheck", "--health-cmd", "true", *SLEEP, status=2)
