"""`insula peer`, at a daemon: who may agree on what, what users see, what is refused, and how it ends."""

from __future__ import annotations

import json

import pytest

from tests.support.cli import Cli
from tests.support.daemon import Daemon
from tests.support.wait import until
from tests.system.conftest import TenantFactory


def run(cli: Cli, name: str, network: str, address: str) -> None:
    """An instance that serves its name on port 80."""
    serve = f"while true; do echo {name} | nc -l -p 80; done"
    cli.ok(
        "run", "-d", "--name", name, "--network", network, "--ip", address, "--stop-timeout", "0",
        "busybox", "sh", "-c", serve,
    )  # fmt: skip


def fetch(cli: Cli, name: str, address: str, port: int = 80) -> str:
    return cli.run("exec", name, "sh", "-c", f"nc -w 2 {address} {port} </dev/null 2>/dev/null").out.strip()


def pings(cli: Cli, name: str, address: str) -> bool:
    return cli.run("exec", name, "ping", "-c1", "-W1", address).status == 0


@pytest.fixture
def acme(tenants: TenantFactory) -> Cli:
    """A tenant with db on network back, 10.21.0.0/24."""
    cli = tenants()
    cli.ok("network", "create", "back", "--subnet", "10.21.0.0/24", "--subnet6", "fd00:21::/64")
    run(cli, "db", "back", "10.21.0.9")
    return cli


@pytest.fixture
def globex(tenants: TenantFactory) -> Cli:
    """A tenant with app on network front, 10.22.0.0/24; its network default has the addresses of acme's default."""
    cli = tenants()
    cli.ok("network", "create", "front", "--subnet", "10.22.0.0/24", "--subnet6", "fd00:22::/64")
    run(cli, "app", "front", "10.22.0.9")
    return cli


def name(cli: Cli) -> str:
    return str(cli.tenant)


def test_an_offer_that_is_accepted_joins_networks_until_one_side_ends_it(acme: Cli, globex: Cli) -> None:
    acme.ok("peer", "offer", name(globex), "--network", "back", "--allow", "tcp/80")
    [view] = globex.json("peer", "ls")
    assert (view["state"], view["offered_by"], view["peer"]) == ("offered", name(acme), name(acme))
    assert view["peer_networks"] == [{"name": "back", "subnet": "10.21.0.0/24", "subnet6": "fd00:21::/64"}]
    assert f"offered by {name(acme)}" in globex.ok("peer", "ls")
    assert fetch(globex, "app", "10.21.0.9") == "", "an offer alone does nothing"
    globex.ok("peer", "accept", name(acme), "--network", "front")
    assert fetch(globex, "app", "10.21.0.9") == "db"
    until(lambda: fetch(globex, "app", f"db.{name(acme)}.peer") == "db", "its name is answered", timeout=10)
    assert not pings(globex, "app", "10.21.0.9"), "only tcp/80 was offered"
    assert fetch(acme, "db", "10.22.0.9") == "", "globex has opened nothing"
    findings = json.loads(acme.run("verify", "--json").out)["findings"]
    assert not [each for each in findings if "/" in each["source"] or "peer " in each["text"]], findings
    [view] = acme.json("peer", "ls")
    assert view["state"] == "active"
    assert [(each["protocol"], each["port"]) for each in view["allow"]] == [("tcp", 80)]
    assert "tcp/80" in acme.ok("peer", "show", name(globex))
    globex.ok("peer", "end", name(acme))
    assert fetch(globex, "app", "10.21.0.9") == ""
    assert acme.json("peer", "ls") == [] == globex.json("peer", "ls")


def test_networks_with_the_same_addresses_are_refused_at_each_step(acme: Cli, globex: Cli) -> None:
    acme.ok("peer", "offer", name(globex), "--network", "default")
    error = globex.fails("peer", "accept", name(acme), "--network", "front")
    assert f"network default of {name(acme)} overlaps network default" in error
    assert globex.json("peer", "ls")[0]["state"] == "offered"
    globex.ok("peer", "end", name(acme))
    acme.ok("peer", "offer", name(globex), "--network", "back")
    globex.ok("peer", "accept", name(acme), "--network", "front")
    for cli, subnet in ((acme, "10.22.0.0/25"), (globex, "10.21.0.128/25")):
        error = cli.fails("network", "create", "late", "--subnet", subnet)
        assert "overlaps network" in error and "of peer" in error
    for cli, subnet6 in ((acme, "fd00:22::/80"), (globex, "fd00:21::/48")):
        error = cli.fails("network", "create", "late", "--subnet", "10.24.0.0/24", "--subnet6", subnet6)
        assert "overlaps network" in error and "of peer" in error
    acme.ok("network", "create", "fine", "--subnet", "10.23.0.0/24")
    acme.ok("peer", "end", name(globex))
    acme.ok("network", "create", "late", "--subnet", "10.22.0.0/25")


REFUSED = [
    (("peer", "offer", "{self}", "--network", "back"), "with itself"),
    (("peer", "offer", "{peer}", "--network", "nothing"), "no network nothing"),
    (("peer", "offer", "{peer}", "--network", "back", "--allow", "tcp/1-5000"), "at most 1024"),
    (("peer", "offer", "{peer}", "--network", "back", "--allow", "tcp/90-80"), "no range of ports"),
    (("peer", "offer", "No Name", "--network", "back"), "tenant"),
    (("peer", "accept", "{peer}", "--network", "back"), "no peering"),
    (("peer", "end", "{peer}"), "no peering"),
    (("peer", "show", "{peer}", "--name", "other"), "no peering"),
]


def test_bad_input_is_one_line_and_changes_nothing(acme: Cli, globex: Cli) -> None:
    for words, said in REFUSED:
        filled = [word.format(self=name(acme), peer=name(globex)) for word in words]
        assert said in acme.fails(*filled), words
    for allow in ("tcp/0", "tcp/65536", "gre", "icmp/8", "tcp/", "tcp/a-b", "tcp/1-"):
        words = ("peer", "offer", name(globex), "--network", "back", "--allow", allow)
        assert acme.run(*words).status in (1, 2), allow
    assert acme.run("peer", "offer", name(globex)).status == 2
    acme.ok("peer", "offer", name(globex), "--network", "back")
    assert "already" in acme.fails("peer", "offer", name(globex), "--network", "back")
    assert "by this tenant" in acme.fails("peer", "accept", name(globex), "--network", "back")
    acme.ok("rm", "-f", "db")
    assert "is in a peering with" in acme.fails("network", "rm", "back")
    assert len(acme.json("peer", "ls")) == 1
    acme.ok("peer", "offer", "nobody-there", "--network", "back")  # it does not tell who exists


def test_a_peering_survives_a_kill_and_goes_with_its_tenant(daemon: Daemon, acme: Cli, tenants: TenantFactory) -> None:
    other = daemon.cli.of("peer-going")
    daemon.cli.ok("tenant", "create", "peer-going")
    other.ok("network", "create", "front", "--subnet", "10.24.0.0/24")
    run(other, "app", "front", "10.24.0.9")
    acme.ok("peer", "offer", "peer-going", "--network", "back")
    other.ok("peer", "accept", name(acme), "--network", "front", "--allow", "any")
    assert fetch(other, "app", "10.21.0.9") == "db" and pings(acme, "db", "10.24.0.9")
    daemon.kill("insulad")
    daemon.reap()
    daemon.start()
    until(lambda: fetch(other, "app", "10.21.0.9") == "db", "it works after a restart", timeout=20)
    daemon.cli.ok("tenant", "rm", "--force", "peer-going")
    assert acme.json("peer", "ls") == []
    assert not pings(acme, "db", "10.24.0.9")
    daemon.cli.ok("tenant", "create", "peer-going")
    assert daemon.cli.of("peer-going").json("peer", "ls") == [], "a later tenant of the name has no part in it"
    daemon.cli.ok("tenant", "rm", "--force", "peer-going")


def test_a_service_endpoint_reaches_over_networks_with_the_same_addresses(acme: Cli, globex: Cli) -> None:
    run(acme, "twin", "default", "10.0.0.9")
    run(globex, "near", "default", "10.0.0.9")
    run(globex, "client", "default", "10.0.0.8")
    acme.ok("peer", "offer", name(globex), "--network", "default", "--allow", "tcp/80")
    create = ("endpoint", "create", "svc", "--network", "default", "--to", f"{name(acme)}/twin:tcp/80")
    assert "only offered" in globex.fails(*create)
    assert "overlaps" in globex.fails("peer", "accept", name(acme), "--network", "default")
    globex.ok("peer", "accept", name(acme), "--endpoints")
    address = globex.ok(*create, "--ip", "10.0.0.50").strip()
    assert address == "10.0.0.50"
    assert fetch(globex, "client", address) == "twin" and fetch(globex, "client", "10.0.0.9") == "near"
    until(lambda: fetch(globex, "client", f"svc.{name(acme)}.peer") == "twin", "its name is answered", timeout=10)
    assert fetch(globex, "client", f"twin.{name(acme)}.peer") == "", "names of instances only where there are routes"
    assert pings(globex, "client", address)
    findings = json.loads(globex.run("verify", "--json").out)["findings"]
    assert not [each for each in findings if "/" in each["source"] or "peer " in each["text"]], findings
    assert "already" in globex.fails(*create)
    [endpoint] = globex.json("endpoint", "ls")
    assert (endpoint["instance"], endpoint["port"], endpoint["address"]) == ("twin", 80, "10.0.0.50")
    assert f"{name(acme)}/twin:tcp/80" in globex.ok("endpoint", "ls")
    other = ("endpoint", "create", "x", "--network")
    peer = name(acme)
    for words, said in (
        ((*other, "default", "--to", f"{peer}/twin:tcp/81"), "does not open"),
        ((*other, "default", "--to", f"{peer}/nobody:tcp/80"), "no instance nobody"),
        ((*other, "nothing", "--to", f"{peer}/twin:tcp/80"), "no network nothing"),
        ((*other, "default", "--to", "nobody/twin:tcp/80"), "no peering"),
        ((*other, "default", "--to", f"{peer}/twin:tcp/80", "--ip", "10.0.0.9"), "is taken"),
        (("endpoint", "rm", "other"), "no endpoint"),
    ):
        assert said in globex.fails(*words), words
    assert globex.run("endpoint", "create", "x", "--network", "default", "--to", "nonsense").status in (1, 2)
    assert (
        "10.0.0.50" in globex.run("run", "-d", "--network", "default", "--ip", "10.0.0.50", "busybox", "sleep", "9").err
    ), "its address is taken"
    globex.ok("endpoint", "rm", "svc")
    assert fetch(globex, "client", address) == "" and not pings(globex, "client", address)
    globex.ok(*create)
    acme.ok("peer", "end", name(globex))
    assert globex.json("endpoint", "ls") == [], "it goes with the peering"
