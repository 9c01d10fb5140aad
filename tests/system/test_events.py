"""`insula events` in the order of an instance's life, with out-of-memory kills, back-off and restarts."""

from __future__ import annotations

from tests.support.cli import Cli
from tests.support.daemon import Daemon
from tests.support.wait import until
from tests.system.test_health import actions, events

HOG = "tail /dev/zero"  # it keeps all, waiting for the last line
SLEEP = ("busybox", "sleep", "600")


def wait_for(cli: Cli, action: str, name: str) -> None:
    """Until the event is there, be it from before."""
    with cli.start("--json", "events", "--from-revision", "0") as watching:
        assert watching.stdout
        next(line for line in watching.stdout if f'"action": "{action}"' in line and f'"name": "{name}"' in line)
        watching.kill()


def test_events_of_an_instances_life(cli: Cli) -> None:
    with events(cli) as found:
        cli.ok("run", "-d", "--name", "web", *SLEEP)
        cli.ok("pause", "web")
        cli.ok("unpause", "web")
        cli.ok("update", "--pids", "99", "web")
        cli.ok("kill", "-s", "KILL", "web")
        until(lambda: cli.json("ps", "-a")[0]["status"]["state"] == "exited", "it ended")
        cli.ok("rm", "web")
    life = ["created", "running", "paused", "unpaused", "update", "exited", "remove", "removed"]
    assert actions(found, "web") == life
    [end] = [event for event in found if event["action"] == "exited"]
    assert (end["exit_status"], end["signal"], end["oom"]) == (137, 9, False)


def test_out_of_memory_of_pid_1(cli: Cli) -> None:
    with events(cli) as found:
        assert cli.run("run", "--name", "hog", "-m", "32m", "busybox", *HOG.split()).status == 137
    [oom] = [event for event in found if event["action"] == "oom"]
    assert oom["killed"] == 1
    [end] = [event for event in found if event["action"] == "exited" and event["name"] == "hog"]
    assert (end["signal"], end["oom"]) == (9, True)


def test_out_of_memory_of_a_child(cli: Cli) -> None:
    """As it happens: the event is there while the instance goes on."""
    with events(cli) as found:
        cli.ok("run", "-d", "--name", "parent", "-m", "32m", "busybox", "sh", "-c", f"({HOG}); sleep 600")
        cli.ok("run", "-d", "--name", "frugal", "-m", "32m", *SLEEP)
        wait_for(cli, "oom", "parent")
        assert {view["status"]["state"] for view in cli.json("ps")} == {"running"}
    assert actions(found, "parent") == ["created", "running", "oom"]
    assert actions(found, "frugal") == ["created", "running"], "the control"


def test_out_of_memory_of_an_adopted_instance(fresh: Daemon) -> None:
    cli = fresh.cli.of("default")
    script = f"while ! [ -e /go ]; do sleep 0.05; done; ({HOG}); sleep 600"
    cli.ok("run", "-d", "--name", "late", "-m", "32m", "busybox", "sh", "-c", script)
    fresh.kill("insulad")
    fresh.start()
    cli.ok("exec", "late", "touch", "/go")
    wait_for(cli, "oom", "late")
