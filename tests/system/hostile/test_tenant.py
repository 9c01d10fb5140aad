"""A hostile tenant at the interface: what it asks for is refused in one line, changes nothing, and its quotas hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest

from insula.model.errors import Invalid, QuotaExceeded
from insula.model.peerings import MAX_PEERINGS
from insula.model.policies import CidrPeer, PolicyPeer, PolicyRule, PortMatch, Selector
from insula.sdk import Insula, UnixTransport
from tests.support.cli import Cli
from tests.support.daemon import Daemon
from tests.support.snapshot import assert_unchanged
from tests.system.conftest import TenantFactory, remove_instances

ESCAPE = "a\x1b[31mb\nc"
IMAGE = ("busybox", "sleep", "1000")
# What is typed, the exit statuses, and a word of the message; {peer} is another tenant.
CASES: list[tuple[tuple[str, ...], str]] = [
    # control characters
    *((words, "DNS label") for words in (
        ("network", "create", ESCAPE, "--subnet", "10.9.0.0/24"),
        ("router", "create", ESCAPE),
        ("policy", "create", ESCAPE, "--all", "--in"),
        ("endpoint", "create", ESCAPE, "--network", "a", "--to", "{peer}/web:tcp/80"),
        ("peer", "offer", "{peer}", "--network", ESCAPE),
        ("peer", "offer", ESCAPE, "--network", "a"),
    )),
    (("network", "create", "n", "--subnet", ESCAPE), "CIDR"),
    (("router", "route", "add", "r", ESCAPE, "10.1.0.9"), "not a range"),
    (("router", "route", "add", "r", "172.16.0.0/12", ESCAPE), "not an IP address"),
    # routes and networks of the host, the uplinks, the transit addresses of peerings, and metadata services
    *((("router", "route", "add", "r", to, "10.1.0.9"), "can't be routed") for to in (
        "100.64.0.0/10", "100.64.0.3/32", "100.100.0.0/16", "240.0.0.0/4", "240.0.7.3/32", "169.254.169.254/32",
        "169.254.0.0/16", "127.0.0.1/32", "224.0.0.0/4", "255.255.255.255/32", "0.0.0.0/8",
    )),
    *((("router", "route", "add", "r", to, "fd00:1::9"), "can't be routed") for to in (
        "fd69:6e73:756c:6100::/64", "fe80::/10", "::1/128", "ff00::/8",
    )),
    (("router", "route", "add", "r", "10.1.0.0/25", "10.1.0.9"), "lies in network"),
    *((("network", "create", "n", "--subnet", subnet), "can't be used") for subnet in (
        "100.64.0.0/16", "240.0.0.0/24", "169.254.169.0/24", "127.0.0.0/24", "224.0.0.0/24", "255.255.255.0/24",
    )),
    # addresses of others
    *((("run", "-d", "--network", f"a,allow={pair}", *IMAGE), word) for pair, word in (
        ("10.1.0.1", "gateway"), ("100.0.0.0/8", "can't be allowed"), ("169.254.169.254", "can't be allowed"),
        ("0.0.0.0/0", "can't"),
        ("100.64.0.3", "can't be allowed"), ("127.0.0.1", "can't be allowed"), ("::/0", "can't"),
        ("fe80::1", "can't be allowed"),
        ("240.0.7.3", "can't be allowed"),
    )),
    *((("run", "-d", "--network", f"a,ip={address}", *IMAGE), word) for address, word in (
        ("10.1.0.1", "gateway"), ("10.1.0.255", "whole subnet"), ("169.254.169.254", "outside"),
        ("100.64.0.3", "outside"),
    )),
    # ports of addresses that are not the tenant's
    *((("run", "-d", "--network", "a", "-p", f"{address}:5300:53/udp", *IMAGE), "host") for address in (
        "169.254.169.254", "10.1.0.1", "100.64.0.2", "100.64.0.4", "8.8.8.8", "255.255.255.255", "224.0.0.1",
        "240.0.7.3", "[fe80::1]", "[fd69:6e73:756c:6100::4]", "[ff02::1]",
    )),
]  # fmt: skip


@pytest.fixture(scope="module")
def hostile(daemon: Daemon) -> Iterator[Cli]:
    """A tenant with network a, 10.1.0.0/24, and router r."""
    daemon.cli.ok("tenant", "create", "hostile")
    cli = daemon.cli.of("hostile")
    cli.ok("network", "create", "a", "--subnet", "10.1.0.0/24", "--subnet6", "fd00:1::/64")
    cli.ok("router", "create", "r", "--network", "a")
    yield cli
    remove_instances(cli)
    daemon.cli.ok("tenant", "rm", "--force", "hostile")


def test_what_is_not_its_own_is_refused_in_one_line_and_nothing_changes(
    hostile: Cli, daemon: Daemon, tenants: TenantFactory
) -> None:
    peer = str(tenants().tenant)
    before = daemon.snapshot()
    wrong = []
    for words, said in CASES:
        result = hostile.run(*(word.replace("{peer}", peer) for word in words))
        lines = result.err.count("\n")
        if result.status == 0 or said not in result.err or lines > 1 or "\x1b" in result.err:
            wrong.append((words, result.status, result.err))
    assert wrong == []
    assert hostile.json("ps", "-a") == [] and hostile.json("peer", "ls") == []
    assert_unchanged(before, daemon.snapshot)


POLICIES = 20


def flood(ask: Callable[[int], object], most: int) -> str:
    """Ask for one more each time until it is refused for a quota; the message. Fails if that is not after `most`."""
    for number in range(most):
        ask(number)
    with pytest.raises(QuotaExceeded) as refused:
        ask(most)
    return refused.value.message


def test_floods_end_at_quotas_and_others_go_on(daemon: Daemon, tenants: TenantFactory) -> None:
    cli, victim = tenants("--policies", str(POLICIES)), tenants()
    mine, name = str(cli.tenant), str(victim.tenant)
    with Insula(UnixTransport(str(daemon.run / "insulad.sock"))) as cloud:
        everyone = Selector()
        said = flood(lambda n: cloud.policies.create(mine, f"p{n}", everyone, ["in"]), POLICIES)
        assert "policies" in said and "\n" not in said
        offer = partial(cloud.peerings.offer, mine, networks=["default"])
        cloud.peerings.offer(mine, name, ["default"])
        said = flood(lambda n: offer(f"nobody-{n}"), MAX_PEERINGS - 1)
        assert "peerings" in said and "\n" not in said
        labels = {f"label-{n}": "x" for n in range(10_000)}
        ports = [PortMatch(protocol="tcp", port=n) for n in range(1, 1000)]
        private: list[PolicyPeer] = [CidrPeer(cidr="10.0.0.0/8")]
        many_rules = [PolicyRule(direction="in", peers=private, ports=[each]) for each in ports]
        many_peers = PolicyRule(direction="in", peers=private * 1000)
        exceptions: list[PolicyPeer] = [CidrPeer(cidr="10.0.0.0/8", exceptions=[f"10.0.{n}.0/24" for n in range(100)])]
        many_exceptions = PolicyRule(direction="in", peers=exceptions)
        many_ports = PolicyRule(direction="in", peers=private, ports=ports)
        cloud.policies.remove(mine, "p0")
        for ask in (
            lambda: cloud.networks.create(mine, "n", "10.9.0.0/24", labels=labels),
            lambda: cloud.routers.create(mine, "n", labels=labels),
            lambda: cloud.policies.create(mine, "n", Selector(labels=labels), ["in"]),
            lambda: cloud.policies.create(mine, "n", everyone, ["in"], labels=labels),
            lambda: cloud.policies.create(mine, "n", everyone, ["in"], many_rules),
            lambda: cloud.policies.create(mine, "n", everyone, ["in"], [many_peers]),
            lambda: cloud.policies.create(mine, "n", everyone, ["in"], [many_ports]),
            lambda: cloud.policies.create(mine, "n", everyone, ["in"], [many_exceptions]),
            lambda: cloud.address_groups.create(mine, "n", [f"10.{n >> 8}.{n & 255}.0/24" for n in range(10_000)]),
            lambda: cloud.peerings.accept(mine, name, [f"n{n}" for n in range(1000)]),
        ):
            with pytest.raises((Invalid, QuotaExceeded)) as refused:
                ask()
            assert "\n" not in refused.value.message and len(refused.value.message) < 300
        assert len(list(cloud.policies.list(mine))) == POLICIES - 1 and len(list(cloud.networks.list(mine))) == 1
        [offered] = cloud.peerings.list(name)
        assert offered.state == "offered" and list(cloud.policies.list(name)) == []
    assert victim.ok("run", "--rm", "busybox", "echo", "as before").strip() == "as before"
