"""Policies by the command line: made, shown, changed, enforced, in audit, declared, and after kill -9."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.support.cli import Cli
from tests.support.daemon import Daemon
from tests.support.wait import until

SERVE = "echo hello > /tmp/index.html; exec httpd -f -h /tmp"


@pytest.fixture(autouse=True)
def _no_policies(cli: Cli) -> Iterator[None]:
    """Remove what a test has made, since the tests share a tenant."""
    yield
    for kind in ("policy", "group"):
        if names := [view.get("policy", view)["name"] for view in cli.json(kind, "ls")]:
            cli.ok(kind, "rm", *names)


def run(cli: Cli, name: str, *options: str, command: str = "sleep 600") -> str:
    """Run an instance with its name as the label "app", and return its address."""
    labels = ("-l", f"app={name}")
    cli.ok("run", "-d", "--name", name, "--stop-timeout", "0", *labels, *options, "busybox", "sh", "-c", command)
    if command == SERVE:
        until(lambda: cli.run("exec", name, "wget", "-qO-", "http://127.0.0.1/").status == 0, "it serves")
    [view] = cli.json("inspect", name)
    return str(view["instance"]["ports"][0]["address"])


def fetched(cli: Cli, name: str, address: str) -> bool:
    """Whether a server of another instance answers; a refusal is told at once."""
    return cli.run("exec", name, "timeout", "5", "wget", "-qO-", f"http://{address}/").out == "hello\n"


def test_a_policy_from_creation_to_removal(cli: Cli) -> None:
    db = run(cli, "db", command=SERVE)
    run(cli, "web")
    run(cli, "cron")
    assert fetched(cli, "web", db) and fetched(cli, "cron", db)
    assert cli.ok("policy", "create", "db", "--select", "app=db", "--allow", "from:app=web tcp/80") == "db"
    assert fetched(cli, "web", db) and not fetched(cli, "cron", db)
    listed = cli.ok("policy", "ls")
    assert "app=db" in listed and "enforced" in listed
    shown = cli.ok("policy", "show", "db")
    assert "from:app=web tcp/80" in shown and "instances  db" in shown
    effective = cli.ok("policy", "show", "--effective", "db")
    assert "selected by db: only what one of the rules allows" in effective
    assert "from:app=web tcp/80 (policy db)" in effective
    assert "no policy selects it in direction out: everything is allowed" in effective
    cli.ok("policy", "update", "db", "--allow", "from:app=cron tcp/80", "--remove", "from:app=web tcp/80")
    assert fetched(cli, "cron", db) and not fetched(cli, "web", db)
    cli.ok("policy", "rm", "db")
    assert fetched(cli, "web", db)
    assert cli.json("policy", "ls") == []


def test_labels_that_change_take_effect(cli: Cli) -> None:
    db = run(cli, "db", command=SERVE)
    run(cli, "web")
    cli.ok("policy", "create", "db", "--select", "app=db", "--allow", "from:role=reader tcp/80")
    assert not fetched(cli, "web", db)
    cli.ok("update", "web", "--label", "role=reader")
    assert fetched(cli, "web", db)
    cli.ok("update", "web", "--unlabel", "role")
    assert not fetched(cli, "web", db)
    cli.ok("update", "db", "--label", "app=other")
    assert fetched(cli, "web", db)
    [view] = cli.json("inspect", "db")
    assert view["instance"]["spec"]["labels"] == {"app": "other"}


def test_an_instance_has_its_policies_from_its_start_on(cli: Cli) -> None:
    db = run(cli, "db", command=SERVE)
    cli.ok("policy", "create", "out", "--select", "quiet=yes", "--out")
    fetch = f"timeout 5 wget -qO- http://{db}/ || echo refused"
    assert cli.ok("run", "--rm", "-l", "quiet=yes", "busybox", "sh", "-c", fetch) == "refused"
    assert cli.ok("run", "--rm", "busybox", "sh", "-c", fetch) == "hello"


def test_audit_counts_what_would_be_denied_and_then_it_is(cli: Cli) -> None:
    db = run(cli, "db", command=SERVE)
    run(cli, "web")
    run(cli, "cron")
    cli.ok("policy", "create", "db", "--select", "app=db", "--allow", "from:app=web tcp/80", "--audit")
    assert "nothing would have been denied" in cli.ok("policy", "show", "db")
    assert fetched(cli, "web", db) and fetched(cli, "cron", db) and fetched(cli, "cron", db)
    [flow] = cli.json("policy", "show", "db")["audited"]
    assert (flow["source_instance"], flow["destination_instance"], flow["protocol"]) == ("cron", "db", "tcp")
    assert (flow["direction"], flow["port"], flow["connections"]) == ("in", 80, 2)
    assert "cron → db tcp/80 (in), 2 connections" in cli.ok("policy", "show", "db")
    cli.ok("policy", "update", "db", "--enforce")
    assert fetched(cli, "web", db) and not fetched(cli, "cron", db)


def test_groups_and_declared_state(cli: Cli, tmp_path: Path) -> None:
    db = run(cli, "db", command=SERVE)
    web = run(cli, "web")
    run(cli, "cron")
    file = tmp_path / "policy.json"
    peer = {"type": "group", "group": "readers"}
    documents = [
        {
            "apiVersion": "insula/v1",
            "kind": "Policy",
            "metadata": {"name": "db"},
            "spec": {
                "select": {"labels": {"app": "db"}},
                "directions": ["in"],
                "rules": [{"direction": "in", "peers": [peer], "ports": [{"protocol": "tcp", "port": 80}]}],
            },
        },
        {
            "apiVersion": "insula/v1",
            "kind": "AddressGroup",
            "metadata": {"name": "readers"},
            "spec": {"cidrs": [f"{web}/32"]},
        },
    ]
    file.write_text(json.dumps(documents))
    assert "created" in cli.ok("policy", "apply", "-f", str(file))
    assert fetched(cli, "web", db) and not fetched(cli, "cron", db)
    assert "unchanged" in cli.ok("apply", "-f", str(file))
    [cron] = [view["instance"]["ports"][0]["address"] for view in cli.json("inspect", "cron")]
    cli.ok("group", "update", "readers", "--add", cron, "--remove", f"{web}/32")
    assert fetched(cli, "cron", db) and not fetched(cli, "web", db)
    assert "used by policy db" in cli.fails("group", "rm", "readers")
    dumped = cli.ok("dump")
    assert "kind: AddressGroup" in dumped and "kind: Policy" in dumped
    cli.ok("policy", "rm", "db")
    cli.ok("group", "rm", "readers")


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("from:app=web tcp/http", "named ports are not supported"),
        ("from:10.0.0.1/8 tcp/80", "has bits set behind its prefix"),
        ("from:app=web tcp/90-80", "the lower one comes first"),
        ("from:app=web tcp/0", "is no port"),
        ("from:network:none", "has no network none"),
        ("from:group:none", "has no address group none"),
        ("from:example.com tcp/443", "can't be the source of a rule"),
        ("web tcp/80", "is no rule"),
        ("from:app=web sctp/80", "names no protocol"),
    ],
)
def test_bad_rules_are_refused_and_change_nothing(cli: Cli, rule: str, message: str) -> None:
    said = cli.run("policy", "create", "bad", "--select", "app=db", "--allow", rule)
    assert said.status in (1, 2) and message in said.err and "hint: " in said.err
    assert len(said.err.strip().splitlines()) == 1
    assert cli.json("policy", "ls") == []


def test_a_change_is_taken_whole_or_not_at_all(cli: Cli) -> None:
    """Of several rules one is wrong: none is taken, and what is in force stays."""
    db = run(cli, "db", command=SERVE)
    run(cli, "web")
    cli.ok("policy", "create", "db", "--select", "app=db", "--allow", "from:app=web tcp/80")
    before = cli.json("policy", "show", "db")["policy"]
    for wrong in ("from:10.0.0.1/8 tcp/80", "from:group:none", "from:network:none tcp/1"):
        change = ("--allow", "from:app=cron", "--remove", "from:app=web tcp/80", "--allow", wrong)
        assert cli.run("policy", "update", "db", *change).status == 1
        assert cli.json("policy", "show", "db")["policy"] == before and fetched(cli, "web", db)


def test_what_applies_says_whether_the_resolver_is_open(cli: Cli) -> None:
    run(cli, "web")
    cli.ok("policy", "create", "web", "--select", "app=web", "--out")
    assert "the resolver at the gateway is open" in cli.ok("policy", "show", "--effective", "web")
    assert cli.run("exec", "web", "timeout", "10", "nslookup", "web").status == 0
    cli.ok("policy", "update", "web", "--no-dns")
    assert "policy web" in next(
        line for line in cli.ok("policy", "show", "--effective", "web").splitlines() if "dns" in line
    )
    assert cli.run("exec", "web", "timeout", "5", "nslookup", "web").status != 0


def test_the_operators_policies_are_above_and_only_the_operators(cli: Cli) -> None:
    run(cli, "web")
    name = f"company-{cli.tenant}"
    cli.ok("policy", "create", name, "--operator", "--tenants", "none=such", "--rule", "deny to:10.0.0.0/8 tcp/22")
    try:
        shown = cli.ok("policy", "show", name, "--operator")
        assert "deny" in shown and "to:10.0.0.0/8 tcp/22" in shown
        assert name in cli.ok("policy", "ls", "--operator")
        assert name not in cli.ok("policy", "show", "--effective", "web"), "the tenant does not have the label"
        assert "nothing to change" in cli.fails("policy", "update", name, "--operator")
        assert "no --audit" in cli.run("policy", "update", name, "--operator", "--audit").err
        cli.ok("policy", "update", name, "--operator", "--rule", "pass to:any tcp/23", "--priority", "7")
        changed = cli.json("policy", "show", name, "--operator")
        assert changed["priority"] == 7 and [rule["action"] for rule in changed["rules"]] == ["pass"]
        assert changed["tenants"]["labels"] == {"none": "such"}, "what is not given stays"
    finally:
        cli.ok("policy", "rm", name, "--operator")


def test_the_operators_policies_follow_the_labels_of_a_tenant(cli: Cli) -> None:
    run(cli, "web")
    tenant = str(cli.tenant)
    name = f"trust-{cli.tenant}"
    cli.ok("policy", "create", name, "--operator", "--tenants", f"trust={name}", "--rule", "deny to:192.0.2.0/24")

    def passes() -> bool:
        """By the installed rules of the tenant; whether the host has a route there is another matter."""
        traced = json.loads(cli.run("trace", "web", "192.0.2.9", "tcp/80", "-v", "--json").out)
        assert not any("drifted" in step for step in traced["steps"]), traced
        return not any("operator_deny_out" in rule["text"] for rule in traced["rules"])

    try:
        assert passes()
        cli.ok("tenant", "update", tenant, "--label", f"trust={name}", "--label", "site=b")
        assert not passes() and name in cli.ok("policy", "show", "--effective", "web")
        cli.ok("tenant", "update", tenant, "--unlabel", "trust", "--instances", "90")
        assert passes()
        labels = cli.json("tenant", "show", tenant)["tenant"]["labels"]
        assert "trust" not in labels and labels["site"] == "b"
        assert "nothing to change" in cli.run("tenant", "update", tenant).err
        assert "not a name for a label" in cli.fails("tenant", "update", tenant, "--label", "a b=c")
    finally:
        cli.ok("tenant", "update", tenant, "--unlabel", "site", "--instances", "none")
        cli.ok("policy", "rm", name, "--operator")


def test_policies_hold_while_insulad_is_gone_and_when_it_is_back(cli: Cli, daemon: Daemon) -> None:
    db = run(cli, "db", command=SERVE)
    run(cli, "web")
    run(cli, "cron")
    cli.ok("policy", "create", "db", "--select", "app=db", "--allow", "from:app=web tcp/80")
    daemon.kill("insulad")
    daemon.start()
    assert fetched(cli, "web", db) and not fetched(cli, "cron", db)
    cli.ok("restart", "-t", "0", "cron")
    assert not fetched(cli, "cron", db)
    cli.ok("policy", "rm", "db")
    assert fetched(cli, "cron", db)


def test_a_drawing_of_the_networks(cli: Cli, tmp_path: Path) -> None:
    db = run(cli, "db")
    cli.ok("policy", "create", "only", "--select", "app=db", "--allow", "from:app=web tcp/80")
    drawn, file = cli.ok("network", "graph", "--width", "120"), tmp_path / "drawn.svg"
    [line] = [line for line in drawn.splitlines() if db in line]
    assert "db" in line and "policies only (in)" in line and drawn.startswith(str(cli.tenant))
    assert cli.ok("network", "graph", "--svg", str(file)) == ""
    shown = ["".join(text.itertext()) for text in ElementTree.parse(file).iter("{http://www.w3.org/2000/svg}text")]
    assert {"db", db, "policy only (in)", "the outside"} <= {*shown}
    [network] = cli.json("network", "graph")["networks"]
    assert [port["instance"] for port in network["ports"]] == ["db"]
    assert "can't be written" in cli.fails("network", "graph", "--svg", str(tmp_path / "no" / "file.svg"))
