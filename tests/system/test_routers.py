"""`insula router` and `insula network update`, at a daemon: what users see, what is refused, and what goes on after a
kill."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.cli import Cli
from tests.support.daemon import Daemon
from tests.support.wait import until
from tests.system.conftest import TenantFactory


def net(cli: Cli, name: str, number: int, *options: str) -> None:
    cli.ok(
        "network", "create", name, "--subnet", f"10.{number}.0.0/24", "--subnet6", f"fd00:{number}::/64", *options
    )  # fmt: skip


def sleeper(cli: Cli, name: str, network: str, address: str) -> None:
    cli.ok(
        "run", "-d", "--name", name, "--network", network, "--ip", address, "--stop-timeout", "0",
        "busybox", "sleep", "600",
    )  # fmt: skip


def pings(cli: Cli, name: str, address: str) -> bool:
    return cli.run("exec", name, "ping", "-c1", "-W1", address).status == 0


@pytest.fixture
def cli(tenants: TenantFactory) -> Cli:
    """A tenant of its own for each test."""
    return tenants()


@pytest.fixture
def joined(cli: Cli) -> Cli:
    """It has networks a and b, an instance on each, and a router r between them."""
    for number, name in enumerate(("a", "b"), 1):
        net(cli, name, number)
        sleeper(cli, f"on-{name}", name, f"10.{number}.0.9")
    cli.ok("router", "create", "r", "--network", "a", "--network", "b", "-l", "tier=core")
    return cli


def test_a_router_joins_networks_and_leaves_them(joined: Cli) -> None:
    cli = joined
    assert pings(cli, "on-a", "10.2.0.9") and pings(cli, "on-b", "10.1.0.9")
    assert pings(cli, "on-a", "on-b"), "names are those of the tenant"
    [view] = cli.json("router", "ls")
    assert view["router"]["networks"] == ["a", "b"] and view["status"] == {"ready": True, "reason": None}
    assert "a, b" in cli.ok("router", "ls")
    shown = cli.ok("router", "show", "r")
    assert "ready" in shown and "tier=core" in shown
    cli.ok("router", "update", "r", "--leave", "b")
    assert not pings(cli, "on-a", "10.2.0.9")
    cli.ok("router", "update", "r", "--join", "b")
    assert pings(cli, "on-a", "10.2.0.9")
    cli.ok("router", "rm", "r")
    assert not pings(cli, "on-a", "10.2.0.9") and cli.json("router", "ls") == []


def test_static_routes_come_and_go(joined: Cli) -> None:
    cli = joined
    cli.ok("router", "route", "add", "r", "172.16.0.0/12", "10.2.0.9")
    cli.ok("router", "route", "add", "r", "fd20::/32", "fd00:2::2")
    assert "172.16.0.0/12 via 10.2.0.9" in cli.ok("router", "show", "r")
    cli.ok("router", "route", "add", "r", "172.16.0.0/12", "10.1.0.9")
    routes = {each["destination"]: each["next_hop"] for each in cli.json("router", "show", "r")["router"]["routes"]}
    assert routes == {"172.16.0.0/12": "10.1.0.9", "fd20::/32": "fd00:2::2"}, "a destination has one route"
    cli.ok("router", "route", "rm", "r", "172.16.0.0/12")
    assert [each["destination"] for each in cli.json("router", "show", "r")["router"]["routes"]] == ["fd20::/32"]


def test_what_a_router_joins_is_reached_by_a_second_port(joined: Cli) -> None:
    """It is told to an instance that runs, when it starts and when the router changes."""
    cli = joined
    net(cli, "c", 3)
    cli.ok(
        "run", "-d", "--name", "both", "--network", "c", "--network", "b", "--stop-timeout", "0",
        "busybox", "sleep", "600",
    )  # fmt: skip
    [on_a] = cli.json("inspect", "on-a")[0]["instance"]["ports"]
    goals = (on_a["address"], on_a["address6"])
    assert all(pings(cli, "both", goal) for goal in goals), "a is beyond the router of b"
    cli.ok("router", "update", "r", "--leave", "b")
    assert not pings(cli, "both", goals[0]) and pings(cli, "both", "10.2.0.9")
    cli.ok("router", "update", "r", "--join", "b")
    assert all(pings(cli, "both", goal) for goal in goals)
    assert "10.1.0.0/24 via 10.2.0.1 dev eth1" in cli.ok("exec", "both", "ip", "route")
    cli.ok("port", "unplug", "both", "b")
    assert "via 10.2" not in cli.ok("exec", "both", "ip", "route")


REFUSED = [
    (("router", "create", "r", "--network", "c"), "already"),
    (("router", "create", "s", "--network", "a"), "belongs to router r"),
    (("router", "create", "s", "--network", "nowhere"), "no network nowhere"),
    (("router", "create", "S"), "DNS label"),
    (("router", "update", "s", "--join", "c"), "no router s"),
    (("router", "update", "r", "--leave", "c"), "does not join network c"),
    (("router", "update", "r", "--leave", "b", "--join", "b"), "both join and leave"),
    (("router", "route", "add", "r", "10.2.0.0/25", "10.1.0.9"), "lies in network b"),
    (("router", "route", "add", "r", "172.16.0.1/12", "10.1.0.9"), "host bits"),
    (("router", "route", "add", "r", "172.16.0.0/12", "10.3.0.9"), "in no network that router r joins"),
    (("router", "route", "add", "r", "172.16.0.0/12", "10.1.0.1"), "is the gateway itself"),
    (("router", "route", "add", "r", "172.16.0.0/12", "fd00:1::9"), "use an IPv4 address"),
    (("router", "route", "add", "r", "172.16.0.0/12", "web"), "not an IP address"),
    (("router", "route", "add", "r", "127.0.0.0/8", "10.1.0.9"), "loopback"),
    (("router", "route", "add", "r", "100.64.0.0/16", "10.1.0.9"), "uplinks"),
    (("router", "route", "rm", "r", "172.16.0.0/12"), "no route to 172.16.0.0/12"),
    (("network", "rm", "a"), "is used by on-a"),
    (("network", "rm", "joined"), "is joined by router q"),
]


def test_what_is_refused_changes_nothing(joined: Cli) -> None:
    cli = joined
    net(cli, "c", 3)
    net(cli, "joined", 4)
    cli.ok("router", "create", "q", "--network", "joined")
    before = [each["router"] for each in cli.json("router", "ls")]
    for words, said in REFUSED:
        result = cli.run(*words)
        assert result.status == 1 and said in result.err, (words, result.err)
        assert result.err.count("\n") == 1 and "; hint: " in result.err
    assert [each["router"] for each in cli.json("router", "ls")] == before
    cli.ok("router", "route", "add", "r", "172.16.0.0/12", "10.2.0.9")
    left = cli.run("router", "update", "r", "--leave", "b")
    assert left.status == 1 and "is in no network" in left.err, "a route needs it"
    for words in (
        ("router", "update", "r"),
        ("router", "route", "add", "r", "172.17.0.0/16"),
        ("network", "update", "a"),
    ):
        assert cli.run(*words).status == 2


def test_a_network_without_a_way_out(cli: Cli) -> None:
    net(cli, "shut", 1, "--outbound", "none")
    assert cli.json("network", "show", "shut")["network"]["outbound"] == "none"
    cli.ok("network", "update", "shut", "--outbound", "nat")
    assert cli.json("network", "show", "shut")["network"]["outbound"] == "nat"
    assert cli.run("network", "update", "shut", "--outbound", "some").status == 2


def test_routers_are_there_again_after_a_kill(daemon: Daemon, joined: Cli) -> None:
    joined.ok("router", "route", "add", "r", "172.16.0.0/12", "10.2.0.9")
    daemon.kill("insulad")
    daemon.reap()
    daemon.start()
    assert joined.json("router", "show", "r")["status"]["ready"]
    assert pings(joined, "on-a", "10.2.0.9")
    until(lambda: not joined.json("status")["problems"], "no problems")


def test_a_router_is_declared(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "nets.yaml"
    head = "apiVersion: insula/v1\n"
    networks = "---\n".join(
        f"{head}kind: Network\nmetadata: {{name: {name}}}\nspec: {{subnet: 10.{number}.0.0/24}}\n"
        for number, name in enumerate(("a", "b"), 1)
    )
    router = f"{head}kind: Router\nmetadata: {{name: r}}\nspec:\n  networks: [a, b]\n"
    route = "  routes: [{destination: 172.16.0.0/12, next_hop: 10.1.0.9}]\n"
    file.write_text(f"{router}---\n{networks}")
    cli.ok("apply", "-f", str(file))
    assert cli.json("router", "show", "r")["router"]["networks"] == ["a", "b"]
    file.write_text(f"{router}{route}---\n{networks}")
    assert "172.16.0.0/12" in cli.run("diff", "-f", str(file)).out
    cli.ok("apply", "-f", str(file))
    assert cli.json("router", "show", "r")["router"]["routes"] != []
    dumped = cli.ok("dump")
    assert "kind: Router" in dumped and "next_hop: 10.1.0.9" in dumped
    cli.ok("apply", "-f", str(file))
