"""Virtual machines as users have them: `insula run --vm` and the verbs that containers have. One daemon serves all."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.support.cli import Cli
from tests.support.daemon import Daemon
from tests.support.guests import kernel
from tests.support.wait import until

LONG = 300.0


@pytest.fixture(autouse=True)
def with_kernel() -> Iterator[None]:
    if kernel() is None:
        pytest.skip("the kernel of guests is not there: scripts/kernel fetches it")
    yield


def test_a_command_in_a_machine(cli: Cli) -> None:
    """Its output, its input, its exit status, and a kernel that is not the host's; the next one is a copy of the
    same boot and shares nothing that is secret."""
    script = "cat; uname -r; cat /proc/sys/kernel/random/boot_id; echo err >&2; exit 7"
    found = [
        cli.run("run", "--vm", "--rm", "-i", *cold, "busybox", "sh", "-c", script, stdin="given\n", timeout=LONG)
        for cold in ((), (), ("--cold",))
    ]
    assert [each.status for each in found] == [7, 7, 7], found
    lines = [each.out.splitlines() for each in found]
    assert {each[0] for each in lines} == {"given"} and {each.err for each in found} == {"err\n"}
    assert all(each[1] != os.uname().release for each in lines)
    assert len({each[2] for each in lines}) == 3
    assert cli.json("ps", "-a") == []


def test_the_life_of_a_machine(cli: Cli, daemon: Daemon) -> None:
    """On the network of a container, by its name and by its address; with exec, logs, a restart that keeps its disk,
    and insulad that is killed meanwhile."""
    serve = "echo up >> /log; cat /log; while :; do echo from the machine | nc -l -p 80; done"
    cli.ok("run", "-d", "--vm", "--name", "vm", "-m", "160m", "busybox", "sh", "-c", serve, timeout=LONG)
    cli.ok("run", "-d", "--name", "beside", "busybox", "sleep", "1000")

    def answers() -> bool:
        return cli.run("exec", "beside", "nc", "-w", "2", "vm", "80").out == "from the machine\n"

    until(answers, "a container is answered by the machine", LONG)
    assert cli.ok("logs", "vm") == "up"
    [port] = [each["instance"]["ports"][0] for each in cli.json("ps") if each["instance"]["name"] == "vm"]
    shown = cli.ok("exec", "vm", "ip", "addr", "show", "eth0")
    assert port["address"] in shown and port["mac"] in shown
    assert cli.ok("exec", "vm", "cat", "/etc/hostname") == "vm"
    assert cli.run("exec", "vm", "sh", "-c", "nslookup beside >/dev/null && exit 5").status == 5
    assert cli.run("exec", "vm", "ping", "-c", "1", "beside").status == 0
    assert cli.json("verify")["passed"], "its port is proven as others are"

    daemon.kill("insulad")
    daemon.start()
    assert answers(), "it went on, and is reached"
    assert cli.ok("exec", "vm", "echo", "adopted") == "adopted"

    cli.ok("stop", "-t", "0", "vm")
    cli.ok("start", "vm", timeout=LONG)
    until(lambda: cli.ok("logs", "vm").splitlines()[-2:] == ["up", "up"], "its disk was kept", LONG)
    assert "no files" in cli.fails("cp", "vm:/log", "-")
    cli.ok("rm", "-f", "vm")
    assert not list((daemon.root / "instances").glob("*/disk"))


def test_signals_and_the_terminal(cli: Cli) -> None:
    trap = "trap 'echo ended; exit 4' TERM; echo ready; while :; do sleep 0.1; done"
    cli.ok("run", "-d", "--vm", "--name", "vm", "--network", "none", "busybox", "sh", "-c", trap, timeout=LONG)
    until(lambda: cli.ok("logs", "vm") == "ready", "it runs", LONG)
    cli.ok("kill", "-s", "TERM", "vm")
    assert cli.ok("wait", "vm") == "4"
    assert cli.ok("logs", "vm").splitlines() == ["ready", "ended"]
    cli.ok("rm", "vm")
    with cli.terminal("run", "--vm", "--rm", "-it", "--network", "none", "busybox", "sh", rows=30, columns=90) as shell:
        shell.expect("#", LONG)
        shell.type("stty size; echo $((40 + 2))\n")
        shell.expect("30 90", LONG)
        shell.expect("42", LONG)
        shell.type("exit 3\n")
        assert shell.wait(LONG) == 3


def test_what_a_machine_can_not_have(cli: Cli) -> None:
    assert "64" in cli.fails("run", "--vm", "-m", "64m", "busybox", status=125)
    cli.ok("network", "create", "more", "--subnet", "10.9.0.0/24")
    told = cli.fails("run", "--vm", "--network", "default", "--network", "more", "busybox", status=125)
    assert "one network" in told
    assert cli.json("ps", "-a") == []
