"""`--pid container:NAME`: one PID namespace for two instances, and the end of one of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.cli import Cli
from tests.support.wait import patiently, until
from tests.system.conftest import TenantFactory
from tests.system.test_events import wait_for
from tests.system.test_pids import first, status_field

SLEEP = ("busybox", "sleep", "600")
BESIDE = ("--pid", "container:web", "busybox")


@pytest.fixture
def web(cli: Cli) -> Cli:
    cli.ok("run", "-d", "--name", "web", *SLEEP)
    return cli


def state(cli: Cli, name: str) -> str:
    [found] = [view["status"]["state"] for view in cli.json("ps", "-a") if view["instance"]["name"] == name]
    return str(found)


def test_its_proc_shows_the_processes_of_both(web: Cli) -> None:
    out = web.ok("run", "--rm", "--name", "beside", *BESIDE, "sh", "-c", "echo $$; ps -o pid,args")
    own, *table = out.splitlines()
    assert int(own) > 1
    assert any(line.split()[:2] == ["1", "sleep"] for line in table), out
    assert web.ok("run", "--rm", "busybox", "sh", "-c", "echo $$") == "1", "the control"


def test_signals_and_files_across(web: Cli) -> None:
    """The user namespace is shared with it: root of one is root of the other."""
    web.ok("exec", "web", "sh", "-c", "echo secret > /note")
    assert web.ok("run", "--rm", *BESIDE, "cat", "/proc/1/root/note") == "secret"
    client = web.start("exec", "web", "sleep", "613")
    [pid] = until(lambda: [p["inside"] for p in web.json("top", "web") if p["command"] == "sleep 613"], "it runs")
    killed = web.run("run", "--rm", *BESIDE, "kill", str(pid))
    assert (killed.status, client.wait(patiently(10))) == (0, 143), killed


def test_other_namespaces_are_its_own(web: Cli) -> None:
    web.ok("run", "-d", "--name", "beside", *BESIDE, "sleep", "600")
    one = first(web, "web")["pid"]
    [other] = [process["pid"] for process in web.json("top", "beside")]
    for kind in ("pid", "user"):
        assert os.readlink(f"/proc/{one}/ns/{kind}") == os.readlink(f"/proc/{other}/ns/{kind}")
    for kind in ("mnt", "net", "ipc", "uts", "cgroup"):
        assert os.readlink(f"/proc/{one}/ns/{kind}") != os.readlink(f"/proc/{other}/ns/{kind}")
    assert status_field(other, "Seccomp") == ["2"]
    who = web.json("whois", str(other))
    assert (who["instance"], who["pids"][0]) == ("beside", other) and who["inside"] > 1
    explained = web.ok("explain", "beside")
    assert "shared with web" in explained
    assert "shared with beside" in web.ok("explain", "web")
    assert web.ok("exec", "beside", "cat", "/proc/1/comm") == "sleep"
    web.ok("rm", "-f", "beside")
    assert state(web, "web") == "running", "the end of one that joined ends nobody else"


def test_it_ends_with_the_other(web: Cli) -> None:
    web.ok("run", "-d", "--name", "beside", *BESIDE, "sh", "-c", "sleep 614 & sleep 615; true")
    until(lambda: len(web.json("top", "beside")) == 3, "all three run")
    pids = [process["pid"] for process in web.json("top", "beside")]
    web.ok("kill", "web")
    assert web.ok("wait", "beside") == "137"
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), "all three have ended")
    assert "137" in web.ok("ps", "-a")


def test_one_that_is_paused_does_not_hold_up_the_others_end(web: Cli) -> None:
    web.ok("run", "-d", "--name", "beside", *BESIDE, "sleep", "600")
    web.ok("pause", "beside")
    web.ok("rm", "-f", "web", timeout=20)
    assert web.ok("wait", "beside") == "137"


def test_the_other_must_run(web: Cli, tenants: TenantFactory) -> None:
    web.ok("run", "-d", "--name", "beside", *BESIDE, "sleep", "600")
    web.ok("stop", "-t", "0", "web")
    assert web.ok("wait", "beside") == "137"
    assert "web" in web.fails("start", "beside")
    assert "not running" in web.fails("run", "-d", *BESIDE, "true", status=125)
    assert "nobody" in web.fails("run", "-d", "--pid", "container:nobody", "busybox", "true", status=125)
    stranger = tenants()
    assert "web" in stranger.fails("run", "-d", *BESIDE, "true", status=125), "it is another tenant's"
    assert stranger.json("ps", "-a") == []
    web.ok("start", "web")
    web.ok("start", "beside")
    assert state(web, "beside") == "running"


def test_a_restart_policy_waits_for_the_other(web: Cli) -> None:
    web.ok("run", "-d", "--name", "beside", "--restart", "always", *BESIDE, "sleep", "600")
    web.ok("stop", "-t", "0", "web")
    until(lambda: "not running" in web.ok("ps", "-a"), "the reason is told")
    web.ok("start", "web")
    until(lambda: state(web, "beside") == "running", "it was started again", timeout=30)
    assert web.ok("exec", "beside", "cat", "/proc/1/comm") == "sleep"


def test_health_checks_and_memory_of_the_joined(web: Cli) -> None:
    options = ("--health-cmd", "test -d /proc/1", "--health-interval", "1s")
    web.ok("run", "-d", "--name", "beside", *options, *BESIDE, "sleep", "600")
    wait_for(web, "healthy", "beside")


def test_the_hosts_pid_namespace_cannot_be_shared(cli: Cli) -> None:
    for namespace in ("host", "private", "container:", "4711"):
        cli.fails("run", "--pid", namespace, *SLEEP, status=2)
