"""A virtual machine and a container on a tenant's network: what holds for one holds for the other, whatever root of the
guest does to its kernel."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.cli import Cli
from tests.support.wait import until
from tests.system.conftest import TenantFactory

LONG = 300.0
KINDS = {"vm": ("--vm", "--privileged"), "container": ()}
SERVE = "while :; do echo from $(hostname) | nc -l -p 80; done"
LEASE = """[ "$1" != bound ] || echo "$ip/$mask router $router dns $dns"\n"""


@pytest.fixture(scope="module")
def cli(tenants: TenantFactory) -> Iterator[Cli]:
    """A tenant with a machine, a container that has the same image, command and labels, and two that talk to them."""
    cli = tenants()
    cli.ok("network", "create", "net", "--subnet", "10.7.0.0/24", "--subnet6", "fd07::/64", "--mtu", "1450")
    for name, options in KINDS.items():
        words = ("-d", *options, "--name", name, "--network", "net", "--label", "app=server")
        cli.ok("run", *words, "busybox", "sh", "-c", SERVE, timeout=LONG)
    for name in ("friend", "stranger"):
        words = ("--name", name, "--network", "net", "--label", f"app={name}", "busybox", "sleep", "1000")
        cli.ok("run", "-d", *words)
    for kind in KINDS:
        until(lambda kind=kind: fetches(cli, "stranger", kind), f"the {kind} serves", LONG)  # type: ignore[misc]
    yield cli


def fetches(cli: Cli, source: str, target: str) -> bool:
    return cli.run("exec", source, "nc", "-w", "2", target, "80").out == f"from {target}\n"


def port(cli: Cli, name: str) -> dict[str, str]:
    [found] = [each["instance"]["ports"] for each in cli.json("ps") if each["instance"]["name"] == name]
    return dict(found[0])


def heard(cli: Cli) -> int:
    """How many echo requests have arrived at the friend, as its kernel counts them (RFC 2011)."""
    lines = cli.ok("exec", "friend", "grep", "^Icmp:", "/proc/net/snmp").splitlines()
    names, numbers = (line.split() for line in lines)
    return int(dict(zip(names, numbers, strict=True))["InEchos"])


def pings(cli: Cli, *options: str) -> bool:
    return cli.run("exec", "vm", "ping", "-c", "1", "-W", "2", *options, port(cli, "friend")["address"]).status == 0


def test_names_and_addresses_of_both_versions(cli: Cli) -> None:
    for source, target in (("vm", "container"), ("container", "vm"), ("friend", "vm")):
        assert port(cli, target)["address"] in cli.ok("exec", source, "nslookup", target)
        for address in (port(cli, target)["address"], port(cli, target)["address6"]):
            assert cli.run("exec", source, "ping", "-c", "1", "-W", "5", address).status == 0, (source, address)
    assert cli.json("verify")["passed"]


def test_its_device_has_the_mtu_of_the_network(cli: Cli) -> None:
    """Larger packets, which root of the guest may send, do not arrive."""
    mtu = ("cat", "/sys/class/net/eth0/mtu")
    assert [cli.ok("exec", kind, *mtu) for kind in KINDS] == ["1450", "1450"]
    assert pings(cli, "-s", "1422") and pings(cli, "-s", "4000"), "as one packet, and in pieces"
    cli.ok("exec", "vm", "ip", "link", "set", "eth0", "mtu", "1500")
    assert not pings(cli, "-s", "1450") and pings(cli, "-s", "1422")
    cli.ok("exec", "vm", "ip", "link", "set", "eth0", "mtu", "1450")


def test_dhcp_says_what_the_agent_has_set(cli: Cli) -> None:
    cli.ok("exec", "-i", "vm", "sh", "-c", "(echo '#!/bin/sh'; cat) >/lease; chmod 755 /lease", stdin=LEASE)
    told = cli.ok("exec", "vm", "udhcpc", "-i", "eth0", "-n", "-q", "-s", "/lease", timeout=LONG)
    assert f"{port(cli, 'vm')['address']}/24 router 10.7.0.1 dns 10.7.0.1" in told


def test_a_policy_selects_both_and_trace_and_explain_tell(cli: Cli) -> None:
    def verdict(source: str, target: str) -> tuple[bool, bool]:
        """What a packet does, and what the trace says of it."""
        return fetches(cli, source, target), cli.run("trace", source, target, "tcp/80").status == 0

    for kind in KINDS:
        assert verdict("friend", kind) == verdict("stranger", kind) == (True, True), "the control"
    cli.ok("policy", "create", "friends", "--select", "app=server", "--in", "--allow", "from:app=friend tcp/80")
    for kind in KINDS:
        assert verdict("friend", kind) == (True, True), kind
        assert verdict("stranger", kind) == (False, False), kind
        assert "friends" in cli.run("trace", "stranger", kind, "tcp/80").out, "it names the policy"
        shown = cli.ok("explain", kind)
        assert port(cli, kind)["address"] in shown and port(cli, kind)["mac"] in shown
    assert cli.json("verify")["passed"]
    cli.ok("policy", "create", "none", "--select", "app=server", "--out")
    assert not fetches(cli, "vm", "container") and not fetches(cli, "container", "vm")
    assert cli.json("verify")["passed"]
    cli.ok("policy", "rm", "friends", "none")


def test_root_of_the_guest_can_not_forge_addresses(cli: Cli) -> None:
    """It has all rights on its kernel, and takes another address of IP, and another one of its device."""
    before = heard(cli)
    assert pings(cli) and heard(cli) == before + 1, "the control"
    cli.ok("exec", "vm", "ip", "addr", "add", "10.7.0.77/24", "dev", "eth0")
    assert not pings(cli, "-I", "10.7.0.77")
    mac = port(cli, "vm")["mac"]
    cli.ok("exec", "vm", "ip", "link", "set", "eth0", "address", "02:00:00:00:00:77")
    assert not pings(cli)
    assert heard(cli) == before + 1, "none has arrived"
    cli.ok("exec", "vm", "ip", "link", "set", "eth0", "address", mac)
    assert pings(cli) and heard(cli) == before + 2
    assert cli.json("verify")["passed"]
