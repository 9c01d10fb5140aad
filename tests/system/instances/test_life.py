"""The life of an instance: signals, stop, pause, restart policies, health checks, what is measured and shown. The same
for a container and a machine."""

from __future__ import annotations

import time
from typing import Any

from tests.support.wait import until
from tests.system.instances.conftest import LONG, Kind

TRAP = (
    "trap 'echo term; exit 4' TERM; trap 'echo hup' HUP; trap 'echo int' INT; echo ready; while :; do sleep 0.1; done"
)


def lines(kind: Kind, name: str) -> list[str]:
    return kind.cli.ok("logs", name).splitlines()


def test_signals(kind: Kind, name: str) -> None:
    kind.begin(name, "busybox", "sh", "-c", TRAP)
    until(lambda: lines(kind, name) == ["ready"], "it runs", LONG)
    for signal, said in (("HUP", "hup"), ("SIGINT", "int"), ("1", "hup")):
        before = lines(kind, name)
        kind.cli.ok("kill", "-s", signal, name)
        until(lambda before=before, said=said: lines(kind, name) == [*before, said], signal, LONG)  # type: ignore[misc]
    kind.cli.ok("kill", "-s", "TERM", name)
    assert kind.cli.ok("wait", name) == "4"
    assert lines(kind, name)[-1] == "term"
    exit_ = kind.status(name)["exit"]
    assert (exit_["exit_status"], exit_["signal"], exit_["oom"]) == (4, None, False)
    assert "not running" in kind.cli.fails("kill", name)


def test_stop(kind: Kind, name: str) -> None:
    """One that handles the signal ends by it, and keeps what it has written; one that does not is killed."""
    kind.begin(name, "busybox", "sh", "-c", f"echo $(cat /kept) > /kept; echo more >> /kept; {TRAP}")
    until(lambda: lines(kind, name) == ["ready"], "it runs", LONG)
    kind.cli.ok("stop", "-t", "60", name)
    assert (kind.status(name)["state"], kind.status(name)["exit"]["exit_status"]) == ("exited", 4)
    kind.cli.ok("start", name, timeout=LONG)
    until(lambda: lines(kind, name) == ["ready", "term", "ready"], "it runs again", LONG)
    assert kind.cli.ok("exec", name, "cat", "/kept") == "more\nmore"
    kind.cli.ok("kill", name)
    assert kind.cli.ok("wait", name) == "137"
    assert kind.status(name)["exit"]["signal"] == 9
    kind.cli.ok("rm", name)
    kind.begin(name, "busybox", "sleep", "600")
    kind.cli.ok("stop", "-t", "1", name)
    assert kind.status(name)["exit"]["exit_status"] == 137


def test_the_signal_and_the_time_of_stop(kind: Kind, name: str) -> None:
    """What it has written by then is kept."""
    kind.begin(name, "--stop-signal", "HUP", "--stop-timeout", "1", "busybox", "sh", "-c", TRAP)
    until(lambda: lines(kind, name) == ["ready"], "it runs", LONG)
    kind.cli.ok("exec", name, "sh", "-c", "echo kept > /kept")
    kind.cli.ok("stop", name)
    assert lines(kind, name) == ["ready", "hup"]
    assert kind.status(name)["exit"]["exit_status"] == 137
    kind.cli.ok("start", name, timeout=LONG)
    assert kind.cli.ok("exec", name, "cat", "/kept") == "kept"


def test_pause(kind: Kind, name: str) -> None:
    count = "i=0; trap 'echo done; exit 3' TERM; while :; do i=$((i+1)); echo $i > /count; usleep 1000; done"
    kind.begin(name, "busybox", "sh", "-c", count)
    until(lambda: kind.cli.run("exec", name, "test", "-s", "/count").status == 0, "it counts", LONG)
    pid = kind.status(name)["pid"]
    for _ in range(2):
        assert kind.cli.ok("pause", name) == name
        assert kind.status(name)["state"] == "paused"
        for words, status in ((("exec", name, "true"), 125), (("attach", name), 1), (("start", name), 1)):
            assert f"{name} is paused" in kind.cli.fails(*words, status=status)
        assert "paused already" in kind.cli.fails("pause", name)
        assert "is paused" in kind.cli.fails("rm", name)
        assert kind.cli.ok("unpause", name) == name
        assert kind.status(name)["state"] == "running" and kind.status(name)["pid"] == pid
        before = int(kind.cli.ok("exec", name, "cat", "/count") or 0)
        until(lambda before=before: int(kind.cli.ok("exec", name, "cat", "/count") or 0) > before, "it goes on", LONG)  # type: ignore[misc]
    assert "not paused" in kind.cli.fails("unpause", name)
    kind.cli.ok("pause", name)
    kind.cli.ok("stop", "-t", "60", name)
    assert kind.status(name)["exit"]["exit_status"] == 3, "its own handler ran"


def test_restart_policies(kind: Kind, name: str) -> None:
    kind.begin(name, "--restart", "on-failure:2", "busybox", "sh", "-c", "echo run >> /runs; cat /runs; exit 3")
    found = until(
        lambda: (s := kind.status(name))["state"] == "exited" and s["restarts"] == 2 and s, "it is given up", LONG
    )
    assert isinstance(found, dict) and found["exit"]["exit_status"] == 3
    assert lines(kind, name) == ["run"] * 6, "one, two and three: its files are kept"
    kind.cli.ok("rm", name)
    kind.begin(name, "--restart", "always", "busybox", "sleep", "600")
    kind.cli.ok("kill", name)
    until(lambda: (s := kind.status(name))["state"] == "running" and s["restarts"] == 1, "it runs again", LONG)
    kind.cli.ok("restart", "-t", "0", name, timeout=LONG)
    assert kind.status(name)["restarts"] == 0


def test_rm(kind: Kind, name: str) -> None:
    kind.begin(name, "--rm", "busybox", "sh", "-c", TRAP)
    assert "is running" in kind.cli.fails("rm", name)
    until(lambda: lines(kind, name) == ["ready"], "it runs", LONG)
    kind.cli.ok("kill", "-s", "TERM", name)
    until(lambda: kind.status(name) == {}, "it is gone", LONG)
    kind.begin(name, "busybox", "sleep", "600")
    kind.cli.ok("rm", "-f", name)
    assert kind.status(name) == {}
    assert f"no instance {name}" in kind.cli.fails("exec", name, "true", status=125)


def test_health_checks(kind: Kind, name: str) -> None:
    """Healthy, unhealthy and healthy again; a check that hangs is killed with what it has started."""
    check = "echo looked; test ! -e /hang || sleep 611; test ! -e /sick"
    often = ("--health-interval", "1s", "--health-timeout", "2s", "--health-retries", "2")
    kind.begin(name, "--health-cmd", check, *often, "busybox", "sleep", "600")

    def health() -> Any:
        return next(view["health"] for view in kind.cli.json("ps") if view["instance"]["name"] == name)

    def becomes(status: str, output: str) -> None:
        def reached() -> bool:
            found = health()
            return bool(found["status"] == status and found["log"] and found["log"][-1]["output"] == output)

        until(reached, f"it is {status}", LONG)

    becomes("healthy", "looked")
    kind.cli.ok("exec", name, "touch", "/sick")
    becomes("unhealthy", "looked")
    assert health()["log"][-1]["exit_status"] == 1
    kind.cli.ok("exec", name, "sh", "-c", "rm /sick; touch /hang")
    becomes("unhealthy", "looked\n\nkilled after 2 s")
    kind.cli.ok("exec", name, "rm", "/hang")
    becomes("healthy", "looked")
    sleeps = "ps | grep -c '[s]leep 611'"
    until(lambda: kind.cli.run("exec", name, "sh", "-c", sleeps).out == "0\n", "what hung is gone", LONG)
    assert kind.status(name)["restarts"] == 0


def test_a_check_that_can_not_be_executed(kind: Kind, name: str) -> None:
    check = ("--health-cmd", "no-such", "--health-interval", "1s", "--health-retries", "1")
    kind.begin(name, *check, "busybox", "sleep", "600")

    def log() -> list[dict[str, Any]]:
        return [
            each for view in kind.cli.json("ps") if view["instance"]["name"] == name for each in view["health"]["log"]
        ]

    found = until(log, "it was checked", LONG)[-1]
    assert (found["exit_status"], found["output"]) == (127, "/bin/sh: no-such: not found")


def test_what_is_shown(kind: Kind, sleeper: str, name: str) -> None:
    [view] = kind.cli.json("inspect", sleeper)
    assert view["instance"]["spec"]["options"]["kind"] == kind.name
    assert view["instance"]["spec"]["command"][:2] == ["sh", "-c"]
    assert view["instance"]["spec"]["env"] == {"FROM_RUN": "1"}
    assert (view["status"]["state"], view["status"]["restarts"]) == ("running", 0)
    assert view["instance"]["ports"][0]["address"].startswith("10.0.0.")
    [sample] = kind.cli.json("stats", "--no-stream", sleeper)["instances"]
    assert sample["cpu"] is not None and sample["memory"] > 0 and sample["pids"] >= 1
    assert sample["received"] is not None and sample["sent"] is not None
    assert kind.cli.json("top", sleeper)[0]["inside"] == 1
    explained = kind.cli.json("explain", sleeper)
    assert explained["security"]["no_new_privs"] == "yes" and explained["security"]["capabilities"] is not None
    assert kind.cli.json("whois", str(view["status"]["pid"]))["instance"] == sleeper
    ps = kind.cli.ok("exec", sleeper, "ps", "-o", "pid,args").splitlines()
    assert ps[1].split()[:3] == ["1", "sh", "-c"] and any(line.endswith("ps -o pid,args") for line in ps)
    kind.cli.ok("rename", sleeper, name)
    try:
        assert kind.cli.ok("exec", name, "hostname") == sleeper, "until its next start"
        assert kind.status(sleeper) == {} and kind.status(name)["pid"] == view["status"]["pid"]
    finally:
        kind.cli.ok("rename", name, sleeper)


def test_labels_and_updates(kind: Kind, name: str) -> None:
    kind.begin(name, "--label", "tier=web", "--cpus", "1", "busybox", "sleep", "600")
    kind.cli.ok("update", "--cpus", "0.5", name)
    [view] = kind.cli.json("inspect", name)
    assert view["instance"]["spec"]["resources"]["cpus"] == view["status"]["resources"]["cpus"] == 0.5
    assert view["instance"]["spec"]["labels"] == {"tier": "web"}


def test_wait_for_several(kind: Kind, name: str) -> None:
    begun = time.time()
    kind.begin(name, "busybox", "sh", "-c", "exit 5")
    kind.begin(f"{name}b", "busybox", "sh", "-c", "sleep 1; exit 6")
    assert kind.cli.ok("wait", name, f"{name}b").split() == ["5", "6"]
    for each in (name, f"{name}b"):
        found = kind.status(each)
        assert begun <= found["started"] <= found["exit"]["finished"] <= time.time()
    kind.cli.ok("rm", f"{name}b")
