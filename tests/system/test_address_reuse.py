"""Reuse of addresses: neighbours reach the new owner at once, with IPv4 and IPv6.

Neighbours remember at which MAC address an IP address is for about half a minute, so each of these is tried alone: the
MAC address stays with the address; where it changes, that is announced; and an address rests before it is given again.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.cli import Cli
from tests.support.lab import SOON, Instance, Lab, isolated, ping, two_tenants
from tests.support.wait import until
from tests.system.conftest import TenantFactory

FAMILIES = ["10.0.0.2", "fd00::2"]
OTHER = "02:99:00:00:00:07"


def reaches(source: Instance, address: str) -> bool:
    """By one of three pings, in less time than a neighbour is remembered for."""
    return any(source.pings(address, 1.0) for _ in range(3))


def replaced(cloud: Lab, mac: str | None) -> None:
    """acme's web goes while db remembers it, and another comes with its addresses."""
    web, db = cloud.instances["acme", "web"], cloud.instances["acme", "db"]
    assert all(db.pings(address) for address in FAMILIES)
    cloud.unplug(web)
    web.remove()
    cloud.instance("acme", "web", host=2, mac=mac)


@isolated
def test_the_same_mac_is_reached_at_once() -> None:
    with two_tenants() as cloud:
        replaced(cloud, None)
        assert [address for address in FAMILIES if not reaches(cloud.instances["acme", "db"], address)] == []


@isolated
def test_another_mac_is_reached_at_once_because_it_is_announced() -> None:
    with two_tenants() as cloud:
        replaced(cloud, OTHER)
        assert [address for address in FAMILIES if not reaches(cloud.instances["acme", "db"], address)] == []


@isolated
def test_without_an_announcement_another_mac_is_not_reached() -> None:
    """The positive control of the test above."""
    with two_tenants() as cloud:
        cloud.fabric._tenant(cloud.tenants["acme"])._injector = None
        replaced(cloud, OTHER)
        assert [address for address in FAMILIES if cloud.instances["acme", "db"].pings(address, 0.3)] == []
        assert ping(cloud.inside("acme"), "10.0.0.2"), "the router is told, not asked"


@isolated
def test_an_unchanged_address_is_not_announced() -> None:
    """Each announcement costs a packet to every instance of the network."""
    with two_tenants() as cloud:
        spy = cloud.instances["acme", "db"].sniffer()
        replaced(cloud, None)
        cloud.instance("acme", "third")
        assert not spy.sees(b"\x08\x06\x00\x01\x08\x00\x06\x04\x00\x01", 0.2)
        replaced(cloud, OTHER)
        assert spy.sees(b"\x08\x06\x00\x01\x08\x00\x06\x04\x00\x01", SOON)


@pytest.fixture
def acme(tenants: TenantFactory) -> Iterator[Cli]:
    cli = tenants()
    cli.ok("network", "create", "six", "--subnet", "10.6.0.0/24", "--subnet6", "fd06::/64")
    yield cli


def serve(cli: Cli, *options: str) -> None:
    cli.ok("run", "-d", "--name", "web", "--network", "six", *options, "busybox", "httpd", "-f", "-h", "/etc")
    until(lambda: cli.run("exec", "web", "wget", "-qO-", "http://127.0.0.1/hostname").status == 0, "web serves itself")


@pytest.mark.parametrize("options", [[], ["--ip", "10.6.0.77", "--ip6", "fd06::77"]], ids=["any", "same"])
def test_a_replaced_service_answers_at_once(acme: Cli, options: list[str]) -> None:
    acme.ok("run", "-d", "--name", "cli", "--network", "six", "busybox", "sleep", "600")
    seen = []
    for _ in range(3):
        serve(acme, *options)
        port = acme.json("inspect", "web")[0]["instance"]["ports"][0]
        seen.append((port["address"], port["address6"], port["mac"]))
        acme.ok("exec", "cli", "ping", "-c", "1", "-W", "20", "web")
        acme.ok("exec", "cli", "ping", "-6", "-c", "1", "-W", "20", port["address6"])
        assert acme.ok("exec", "cli", "timeout", "5", "wget", "-qO-", "http://web/hostname") == "web"
        acme.ok("rm", "-f", "web")
    assert len(set(seen)) == (1 if options else 3)


@pytest.mark.parametrize(("option", "address"), [("--ip", "10.6.0.88"), ("--ip6", "fd06::88")])
def test_a_reused_address_is_never_answered_under_its_old_name(acme: Cli, option: str, address: str) -> None:
    """Names are those of running instances, and no answer may be kept."""
    acme.ok("run", "-d", "--name", "cli", "--network", "six", "busybox", "sleep", "600")
    run = ("run", "-d", "--network", "six", "--stop-timeout", "0", "--name")

    def pings(name: str) -> bool:
        version = "-6" if ":" in address else "-4"
        return address in acme.run("exec", "cli", "ping", version, "-c", "1", "-W", "20", name).out

    acme.ok(*run, "old", option, address, "busybox", "sleep", "600")
    assert pings("old")
    acme.ok("stop", "old")
    assert not pings("old"), "it has stopped"
    acme.ok("start", "old")
    assert pings("old")
    acme.ok("rm", "-f", "old")
    acme.ok(*run, "new", option, address, "busybox", "sleep", "600")
    assert pings("new") and not pings("old")
    acme.ok("rename", "new", "newer")
    assert pings("newer") and not pings("new")


def test_ipv6_subnets_of_a_tenant_may_not_overlap(acme: Cli, tenants: TenantFactory) -> None:
    for six in ("fd06::/64", "fd06::/48", "fd06:0:0:0:8000::/65"):
        refused = acme.run("network", "create", "more", "--subnet", "10.8.0.0/24", "--subnet6", six)
        assert refused.status == 1 and "overlaps fd06::/64 of network six" in refused.err
    acme.ok("network", "create", "more", "--subnet", "10.8.0.0/24", "--subnet6", "fd06:0:0:1::/64")
    tenants().ok("network", "create", "six", "--subnet", "10.6.0.0/24", "--subnet6", "fd06::/64")


def test_the_mac_address_can_be_chosen(acme: Cli) -> None:
    mac = "06:42:ac:11:00:02"
    shown = acme.ok(
        "run", "--rm", "--network", "six", "--mac-address", mac.upper(), "busybox", "ip", "link", "show", "eth0"
    )
    assert f"link/ether {mac}" in shown
    acme.ok("run", "-d", "--name", "one", "--network", "six", "--mac-address", mac, "busybox", "sleep", "600")
    refused = acme.run("run", "-d", "--network", "six", "--mac-address", mac, "busybox", "true")
    assert refused.status != 0 and f"MAC address {mac} is taken" in refused.err
    acme.ok("network", "create", "other", "--subnet", "10.7.0.0/24")
    acme.ok("run", "--rm", "--network", "other", "--mac-address", mac, "busybox", "true")
    refused = acme.run("run", "--rm", "--network", "six", "--mac-address", "01:00:5e:00:00:01", "busybox", "true")
    assert refused.status != 0 and "is a group address" in refused.err
    refused = acme.run("run", "--rm", "--network", "none", "--mac-address", mac, "busybox", "true")
    assert refused.status != 0 and "without a network" in refused.err
    acme.ok("run", "-d", "--name", "two", "--network", "six", "busybox", "sleep", "600")
    acme.ok("exec", "two", "ping", "-c", "1", "-W", "20", "one")
    report = acme.json("verify")
    assert report["passed"], report
