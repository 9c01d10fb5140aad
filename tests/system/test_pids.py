"""Process IDs: 1 inside and another outside, nested namespaces, `whois`, and signals (pid_namespaces(7))."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.support.cli import Cli
from tests.support.wait import until
from tests.system.conftest import TenantFactory


def status_field(pid: int, name: str) -> list[str]:
    """The words of one line of proc_pid_status(5)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return line.split()[1:]
    raise AssertionError(f"no {name} in the status of {pid}")


@pytest.fixture
def web(cli: Cli) -> Cli:
    """With an instance `web` whose PID 1 is `sleep 600`."""
    cli.ok("run", "-d", "--name", "web", "busybox", "sleep", "600")
    return cli


def first(cli: Cli, name: str) -> dict[str, Any]:
    """PID 1 of an instance, as `top` shows it."""
    [process] = [p for p in cli.json("top", name) if p["inside"] == 1]
    return dict(process)


def processes_of(cli: Cli, name: str, count: int, program: str) -> list[dict[str, Any]]:
    """The processes that `top` shows, once that many run and one of them is `program` (and no longer its parent's)."""

    def shown() -> list[dict[str, Any]]:
        found = cli.json("top", name)
        return found if len(found) == count and program in [each["command"] for each in found] else []

    return until(shown, f"{count} processes run in {name}, of them {program}")


def test_pid_1_inside_is_another_outside(web: Cli) -> None:
    assert web.ok("exec", "web", "readlink", "/proc/1/exe") == "/bin/busybox"
    process = first(web, "web")
    assert process["pid"] > 1
    until(lambda: Path(f"/proc/{process['pid']}/cmdline").read_bytes() == b"sleep\x00600\x00", "it runs its program")
    assert status_field(process["pid"], "NSpid") == [str(process["pid"]), "1"]
    [view] = web.json("ps")
    assert view["status"]["pid"] == process["pid"]


def test_two_instances_have_each_their_own_numbers(web: Cli, tenants: TenantFactory) -> None:
    other = tenants()
    other.ok("run", "-d", "--name", "web", "busybox", "sleep", "600")
    one, two = first(web, "web")["pid"], first(other, "web")["pid"]
    assert one != two
    assert os.readlink(f"/proc/{one}/ns/pid") != os.readlink(f"/proc/{two}/ns/pid")
    for cli in (web, other):
        pids = cli.ok("exec", "web", "sh", "-c", "ls -d /proc/[0-9]* | wc -l")
        assert int(pids) <= 4, "an instance sees its own processes only"


def test_whois(web: Cli) -> None:
    process = first(web, "web")
    who = web.json("whois", str(process["pid"]))
    assert (who["tenant"], who["instance"], who["inside"]) == (web.tenant, "web", 1)
    assert who["pids"] == [process["pid"], 1]
    nobody = web.json("whois", str(os.getpid()))
    assert nobody["instance"] is None
    text = web.ok("whois", str(process["pid"]))
    assert str(web.tenant) in text and "web" in text


def test_top_shows_the_tree_with_both_numbers(web: Cli) -> None:
    with web.start("exec", "web", "sh", "-c", "sleep 601 & wait") as client:
        processes = processes_of(web, "web", 3, "sleep 601")
        by_command = {process["command"]: process for process in processes}
        child = by_command["sleep 601"]
        parent = next(p for command, p in by_command.items() if command.startswith("sh"))
        assert child["parent"] == parent["inside"]
        for process in processes:
            assert status_field(process["pid"], "NSpid") == [str(n) for n in process["pids"]]
            assert process["pids"][0] == process["pid"]
            assert process["pids"][-1] == process["inside"]
            assert int(status_field(process["pid"], "Uid")[0]) == process["uid"] >= 65536
            assert process["user"] == 0
        client.kill()


def test_nested_pid_namespaces_show_every_number(cli: Cli) -> None:
    options = ("--cap-add", "SYS_ADMIN")
    cli.ok("run", "-d", "--name", "nest", *options, "busybox", "unshare", "-p", "-f", "sleep", "602")
    [inner] = [p for p in processes_of(cli, "nest", 2, "sleep 602") if p["command"] == "sleep 602"]
    assert len(inner["pids"]) == 3, inner
    host, middle, innermost = inner["pids"]
    assert innermost == 1
    assert inner["inside"] == middle
    assert status_field(host, "NSpid") == [str(host), str(middle), "1"]
    explained = cli.json("explain", "nest")
    assert [p["pids"] for p in explained["processes"] if p["pid"] == host] == [inner["pids"]]
    who = cli.json("whois", str(host))
    assert (who["instance"], who["pids"]) == ("nest", inner["pids"])


def test_explain_matches_the_kernel(web: Cli) -> None:
    explained = web.json("explain", "web")
    pid = first(web, "web")["pid"]
    for namespace in explained["namespaces"]:
        kind = {"mount": "mnt", "network": "net"}.get(namespace["kind"], namespace["kind"])
        assert os.stat(f"/proc/{pid}/ns/{kind}").st_ino == namespace["inode"]
    text = web.ok("explain", "web")
    for word in (str(pid), "10.0.0.", "pids"):
        assert word in text


# -- signals -----------------------------------------------------------------------------------------------------


def test_pid_1_ignores_from_inside_what_it_does_not_handle(web: Cli) -> None:
    """pid_namespaces(7): SIGKILL and SIGSTOP too. What it handles gets through."""
    before = first(web, "web")
    for name in ("TERM", "INT", "USR1", "KILL", "STOP"):
        web.ok("exec", "web", "kill", f"-{name}", "1")
        assert web.run("exec", "web", "true").status == 0, f"SIG{name} from inside"
    assert first(web, "web")["pid"] == before["pid"]
    assert status_field(before["pid"], "State")[0] == "S", "it sleeps, and was not stopped"
    [view] = web.json("ps")
    assert (view["status"]["state"], view["status"]["restarts"]) == ("running", 0)
    trap = "trap 'exit 7' TERM; echo ready; while :; do sleep 0.1; done"
    web.ok("run", "-d", "--name", "polite", "busybox", "sh", "-c", trap)
    until(lambda: web.ok("logs", "polite") == "ready", "its handler is set")
    web.run("exec", "polite", "kill", "-TERM", "1")  # PID 1 may take it along when it ends
    until(lambda: web.json("inspect", "polite")[0]["status"]["state"] == "exited", "the control: a handler is called")
    assert web.json("inspect", "polite")[0]["status"]["exit"]["exit_status"] == 7


def test_from_outside_only_sigkill_is_forced(web: Cli) -> None:
    web.ok("kill", "-s", "TERM", "web")
    assert web.run("exec", "web", "true").status == 0
    web.ok("kill", "-s", "KILL", "web")
    assert web.ok("wait", "web") == "137"


def test_a_handled_signal_reaches_pid_1_from_both_sides(cli: Cli) -> None:
    script = "trap 'echo usr1' USR1; while :; do sleep 0.05; done"
    cli.ok("run", "-d", "--name", "listener", "busybox", "sh", "-c", script)
    until(lambda: cli.run("exec", "listener", "sh", "-c", "grep -q 'SigCgt.*2..' /proc/1/status").status == 0, "a trap")
    cli.ok("kill", "-s", "USR1", "listener")
    until(lambda: cli.ok("logs", "listener") == "usr1", "the signal from outside")
    cli.ok("exec", "listener", "kill", "-USR1", "1")
    until(lambda: cli.ok("logs", "listener").split() == ["usr1"] * 2, "the signal from inside")


def test_the_namespace_dies_with_pid_1(cli: Cli) -> None:
    script = "for i in 1 2 3; do setsid sleep 603 & done; exec sleep 600"
    cli.ok("run", "-d", "--name", "family", "busybox", "sh", "-c", script)
    pids = [process["pid"] for process in processes_of(cli, "family", 4, "sleep 603")]
    cli.ok("kill", "family")
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), "all are gone")


def test_numbers_of_the_host_mean_nothing_inside(web: Cli) -> None:
    victim = os.getpid()
    result = web.run("exec", "web", "kill", "-0", str(victim + 100000))
    assert result.status != 0
    assert "No such process" in result.err
