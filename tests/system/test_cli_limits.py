"""Limits affect only the instance that exceeds them: a neighbour is measured meanwhile."""

from __future__ import annotations

from pathlib import Path

from tests.support.cli import Cli
from tests.support.wait import until
from tests.system.conftest import TenantFactory

# An interactive shell goes on after "can't fork"; PID 1 itself forks nothing.
BOMB = "(yes 'sleep 600 &' | sh -i) >/dev/null 2>&1 & exec sleep 600"
HOG = "x=0123456789abcdef; while :; do x=$x$x; done"


def neighbour(cli: Cli) -> None:
    cli.ok("run", "-d", "--name", "neighbour", "busybox", "sleep", "600")


def answers(cli: Cli) -> None:
    """The neighbour does, more than once."""
    for _ in range(5):
        assert cli.ok("exec", "neighbour", "echo", "here") == "here"


def test_a_memory_hog_is_killed_alone(cli: Cli) -> None:
    neighbour(cli)
    cli.ok("run", "-d", "--name", "hog", "--memory", "32m", "busybox", "sh", "-c", HOG)
    assert cli.ok("wait", "hog") == "137"
    [view] = cli.json("inspect", "hog")
    assert view["status"]["exit"]["oom"] is True
    answers(cli)
    assert [v["instance"]["name"] for v in cli.json("ps")] == ["neighbour"]


def test_a_hog_beside_pid_1_does_not_end_the_instance(cli: Cli) -> None:
    cli.ok("run", "-d", "--name", "house", "--memory", "48m", "busybox", "sleep", "600")
    assert cli.run("exec", "house", "sh", "-c", HOG).status == 137
    assert [v["instance"]["name"] for v in cli.json("ps")] == ["house"]


def test_memory_without_a_limit_is_available(cli: Cli) -> None:
    """The positive control of the above: 64 MiB are no problem where 32 are not the limit."""
    script = "dd if=/dev/zero bs=64M count=1 2>/dev/null | wc -c"
    assert cli.ok("run", "--rm", "busybox", "sh", "-c", script) == str(64 << 20)


def test_a_fork_bomb_stays_in_its_instance(cli: Cli) -> None:
    neighbour(cli)
    cli.ok("run", "-d", "--name", "bomb", "--pids", "64", "--cpus", "0.5", "busybox", "sh", "-c", BOMB)
    until(lambda: len(cli.json("top", "bomb")) >= 60, "the bomb has gone off", timeout=20)
    answers(cli)
    assert len(cli.json("top", "bomb")) <= 64
    cli.ok("rm", "-f", "bomb")
    assert [v["instance"]["name"] for v in cli.json("ps")] == ["neighbour"]


def test_a_full_instance_refuses_exec_clearly(cli: Cli) -> None:
    cli.ok("run", "-d", "--name", "full", "--pids", "8", "busybox", "sh", "-c", BOMB)
    until(lambda: len(cli.json("top", "full")) == 8, "it is full")
    cli.fails("exec", "full", "true", status=125)


def share(cli: Cli, *options: str) -> float:
    """The part of a processor that a busy loop gets: CPU seconds by those that have passed meanwhile, about two."""
    now = "cut -d' ' -f1 /proc/uptime"
    script = f"{now}; (while :; do :; done) & sleep 2; kill $!; wait; {now}; times"
    out = cli.ok("run", "--rm", *options, "busybox", "sh", "-c", script).split()
    minutes, seconds = out[4].rstrip("s").split("m")  # user time of the children
    return (float(minutes) * 60 + float(seconds)) / (float(out[1]) - float(out[0]))


def test_a_limit_of_cpus_throttles(cli: Cli) -> None:
    """Several tries: on a busy machine the one without a limit may not get more either."""
    pairs = []

    def differ() -> bool:
        pairs.append((share(cli, "--cpus", "0.2"), share(cli)))
        return pairs[-1][1] > 1.5 * pairs[-1][0]

    until(differ, f"one without a limit gets more: {pairs}")
    assert all(limited < 0.35 for limited, _ in pairs), pairs


def test_a_tenants_memory_is_limited_as_a_whole(tenants: TenantFactory) -> None:
    cli = tenants("--memory", "64m")
    cli.ok("run", "-d", "--name", "hog", "busybox", "sh", "-c", HOG)
    assert cli.ok("wait", "hog") == "137"


def test_a_tenants_instances_are_counted(tenants: TenantFactory) -> None:
    cli = tenants("--instances", "2")
    for name in ("a", "b"):
        cli.ok("run", "-d", "--name", name, "busybox", "sleep", "600")
    assert "2 instances" in cli.fails("run", "-d", "--name", "c", "busybox", "sleep", "600", status=125)
    cli.ok("rm", "-f", "a")
    cli.ok("run", "-d", "--name", "c", "busybox", "sleep", "600")


def test_a_limit_that_cannot_be_set_is_an_error(cli: Cli) -> None:
    """No process may set it above fs.nr_open (getrlimit(2)); the positive control is in test_cli_options."""
    assert "RLIMIT_NOFILE" in cli.fails("run", "--rm", "--ulimit", "nofile=2147483584", "busybox", "true", status=125)
    assert cli.json("ps", "-a") == []


def keys_of(uid: int) -> int:
    """How many keys a user of the host has (keyrings(7))."""
    lines = [line.replace(":", " ").split() for line in Path("/proc/key-users").read_text().splitlines()]
    return sum(int(words[2].partition("/")[0]) for words in lines if int(words[0]) == uid)


def test_instances_use_up_no_keys_of_the_tenants_user(tenants: TenantFactory) -> None:
    """200 keys are all that a user other than root may have, and so all instances of a tenant together."""
    cli = tenants()
    for name in "abcd":
        cli.ok("run", "-d", "--name", name, "busybox", "sleep", "600")
    assert keys_of(int(cli.json("explain", "a")["uid_map"].split()[1])) < 4
    assert keys_of(0) > 0, "the positive control: the list can be read"
