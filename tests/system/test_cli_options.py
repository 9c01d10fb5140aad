"""Options of `insula run`: environment, users, directories, file systems, capabilities, restart policies."""

from __future__ import annotations

import threading
import time

import pytest

from tests.support.cli import Cli
from tests.support.daemon import Daemon
from tests.support.wait import until


def shell(cli: Cli, script: str, *options: str) -> str:
    return cli.ok("run", "--rm", *options, "busybox", "sh", "-c", script)


def test_environment_names_and_directory(cli: Cli) -> None:
    out = shell(cli, "echo $A; pwd; hostname; echo $PATH", "-e", "A=b c", "-w", "/tmp", "--hostname", "other")
    a, directory, hostname, path = out.splitlines()
    assert (a, directory, hostname) == ("b c", "/tmp", "other")
    assert "/bin" in path.split(":")


def test_a_missing_working_directory(cli: Cli) -> None:
    """`run` makes it, `exec` does not."""
    assert shell(cli, "pwd", "-w", "/nowhere") == "/nowhere"
    assert "/bin/sh" in cli.fails("run", "--rm", "-w", "/bin/sh", "busybox", "true", status=125)
    cli.ok("run", "-d", "--name", "here", "busybox", "sleep", "600")
    assert "/nowhere" in cli.fails("exec", "-w", "/nowhere", "here", "true", status=125)


@pytest.mark.parametrize(
    ("user", "expected"),
    [("1000", "1000 0"), ("1000:1001", "1000 1001"), ("root", "0 0"), ("nobody", "65534 65534")],
)
def test_users(cli: Cli, user: str, expected: str) -> None:
    assert shell(cli, "echo $(id -u) $(id -g)", "-u", user) == expected


def test_entrypoint(cli: Cli) -> None:
    assert cli.ok("run", "--rm", "--entrypoint", "echo", "busybox", "a", "b") == "a b"


def test_read_only(cli: Cli) -> None:
    script = "touch /file 2>/dev/null || echo refused; touch /tmp/file && echo kept; touch /dev/shm/file && echo shm"
    assert shell(cli, script, "--read-only", "--tmpfs", "/tmp").split() == ["refused", "kept", "shm"]
    assert shell(cli, "touch /file && echo written") == "written"


def test_tmpfs_has_its_size(cli: Cli) -> None:
    script = "grep scratch /proc/mounts; dd if=/dev/zero of=/scratch/big bs=1M count=8 2>/dev/null; ls -l /scratch"
    out = shell(cli, script, "--tmpfs", "/scratch:size=4m")
    assert out.startswith("tmpfs /scratch tmpfs rw,nosuid,nodev")
    assert "4194304" in out


def test_ulimits_and_sysctls(cli: Cli) -> None:
    out = shell(
        cli,
        "ulimit -Sn; ulimit -Hn; cat /proc/sys/net/ipv4/ip_unprivileged_port_start",
        *("--ulimit", "nofile=100:200"),
        *("--sysctl", "net.ipv4.ip_unprivileged_port_start=0"),
    )
    assert out.split() == ["100", "200", "0"]


def test_capabilities(cli: Cli) -> None:
    def effective(*options: str) -> int:
        return int(shell(cli, "grep CapEff /proc/self/status", *options).split()[1], 16)

    default = 0x00000000A80425FB  # Docker's: moby's oci/caps/defaults.go
    assert effective() == default
    assert effective("--cap-drop", "ALL") == 0
    assert effective("--cap-add", "NET_ADMIN") == default | 1 << 12
    assert effective("--cap-drop", "ALL", "--cap-add", "CHOWN") == 1
    assert effective("-u", "1000") == 0


def test_init_reaps_zombies(cli: Cli) -> None:
    """An orphan of an orphan becomes PID 1's child; `sleep` never waits for it, tini does."""
    script = "(sh -c 'true & touch /begun; exec sleep 0.1' &) ; exec sleep 600"
    for name, options in (("with", ["--init"]), ("without", [])):
        cli.ok("run", "-d", "--name", name, *options, "busybox", "sh", "-c", script)

    def processes(name: str) -> list[str]:
        """The names and states of those that sleep or have ended, once the orphan has begun."""
        lines = cli.ok("exec", name, "sh", "-c", "test -e /begun && cat /proc/[0-9]*/stat").splitlines()
        found = [" ".join(line.split()[1:3]) for line in lines]
        return [each for each in found if each.startswith("(sleep)") or each.endswith("Z")]

    until(lambda: "(sleep) Z" in processes("without"), "the positive control")
    until(lambda: processes("with") == ["(sleep) S"], "nothing is left of the orphan")


def test_init_forwards_signals(cli: Cli) -> None:
    cli.ok("run", "-d", "--init", "--name", "polite", "busybox", "sleep", "600")
    cli.ok("stop", "--timeout", "600", "polite")
    assert cli.ok("wait", "polite") == "143"


def runs(cli: Cli, name: str) -> int:
    """How often an instance that prints `run` at its start has been started."""
    return cli.ok("logs", name).split().count("run")


def test_restart_on_failure_with_a_limit(cli: Cli) -> None:
    options = ("--restart", "on-failure:2")
    cli.ok("run", "-d", "--name", "failing", *options, "busybox", "sh", "-c", "echo run; exit 3")
    cli.ok("run", "-d", "--name", "content", *options, "busybox", "sh", "-c", "echo run; exit 0")
    until(lambda: runs(cli, "failing") == 3, "the first run and two retries")
    time.sleep(1.5)
    assert (runs(cli, "failing"), runs(cli, "content")) == (3, 1)


def test_the_delay_before_a_restart_is_shown(cli: Cli) -> None:
    cli.ok("run", "-d", "--name", "again", "--restart", "always", "busybox", "sh", "-c", "exit 3")
    until(lambda: "restarting (3)" in cli.ok("ps"), "it waits", timeout=20)
    cli.ok("stop", "again")
    assert "again" not in cli.ok("ps")
    assert "exited (3)" in cli.ok("ps", "-a")


def test_restart_always_until_stopped(cli: Cli) -> None:
    script = "echo run; [ -e /slow ] && sleep 600; touch /slow; exit 0"
    cli.ok("run", "-d", "--name", "phoenix", "--restart", "always", "busybox", "sh", "-c", script)
    until(lambda: runs(cli, "phoenix") == 2, "it was started again")
    cli.ok("exec", "phoenix", "kill", "-0", "1")
    cli.ok("stop", "--timeout", "0.1", "phoenix")
    time.sleep(1.0)
    assert runs(cli, "phoenix") == 2, "a stopped instance stays stopped"


def test_rm_removes_it_when_it_exits(cli: Cli) -> None:
    cli.ok("run", "-d", "--rm", "--name", "gone", "busybox", "sleep", "0.3")
    until(lambda: cli.json("ps", "-a") == [], "it is removed by itself")


def test_names_are_generated_and_labels_kept(cli: Cli) -> None:
    name = cli.ok("run", "-d", "-l", "tier=web", "busybox", "sleep", "600")
    [view] = cli.json("ps")
    assert view["instance"]["name"] == name
    assert view["instance"]["spec"]["labels"] == {"tier": "web"}


def test_no_network_is_a_loopback_only(cli: Cli) -> None:
    out = shell(cli, "ls /sys/class/net; ping -c 1 -W 20 127.0.0.1 >/dev/null && echo self", "--network", "none")
    assert out.split() == ["lo", "self"]


def test_addresses(cli: Cli) -> None:
    assert "10.0.0.42/24" in shell(cli, "ip -4 address show eth0", "--ip", "10.0.0.42")


def test_events_show_the_life_of_an_instance(cli: Cli, daemon: Daemon) -> None:
    """New events are shown too: the command listens when the first instance named `listen-…` is shown."""
    with cli.start("--json", "events") as client:
        assert client.stdout is not None
        told = threading.Event()

        def begin() -> None:
            while not told.is_set():
                cli.ok("run", "--rm", "--network", "none", "--name", "listen", "busybox", "true")

        beginning = threading.Thread(target=begin)
        beginning.start()
        assert "listen" in client.stdout.readline()
        told.set()
        beginning.join()
        cli.ok("run", "--rm", "--name", "story", "busybox", "true")
        seen = ""
        while "story" not in seen:
            seen = client.stdout.readline()
            assert seen
        client.kill()
