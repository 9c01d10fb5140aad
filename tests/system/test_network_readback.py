"""Read-back of a tenant's namespace: each foreign change is reported, with its own words."""

from __future__ import annotations

import subprocess

from insula.kernel.netns import call_in
from insula.network.linux import naming
from insula.network.proof.reachability import differences
from tests.support.lab import Lab, isolated, two_tenants


def run(netns: int, *commands: str) -> None:
    """Commands of ip(8), bridge(8) and nft(8) in a network namespace."""
    for command in commands:
        words = command.split()
        call_in(netns, lambda words=words: subprocess.run(words, check=True))  # type: ignore[misc]


@isolated
def test_each_change_is_reported_and_nothing_else() -> None:
    with two_tenants() as cloud:
        changes = _changes(cloud)
        for change, undo, said in changes:
            assert _drift(cloud) == [], change
            run(cloud.inside("acme"), *change)
            assert sorted(_drift(cloud)) == said, change
            run(cloud.inside("acme"), *undo)
            _repair(cloud)
        assert _drift(cloud) == []
        assert cloud.fabric.installed(cloud.tenants["globex"]).drift == []


@isolated
def test_an_address_too_many_differs_from_what_is_wanted() -> None:
    """A port may have several MAC addresses (allowed address pairs), so that only the intent tells."""
    with two_tenants() as cloud:
        tenant, intent = cloud.tenants["acme"], cloud.intent("acme")
        assert differences(cloud.fabric.installed(tenant), intent.networks, intent.ports) == []
        run(cloud.inside("acme"), 'nft add element bridge lab macs { "p1" . 02:00:00:00:99:99 }')
        found = differences(cloud.fabric.installed(tenant), intent.networks, intent.ports)
        assert len(found) == 1 and "02:00:00:00:99:99" in found[0], found


@isolated
def test_a_port_whose_instance_is_not_there_has_no_carrier() -> None:
    with two_tenants() as cloud:
        run(cloud.instances["acme", "web"].netns, "ip link set eth0 down")
        assert _drift(cloud) == ["device p1 has no carrier"]
        installed = cloud.fabric.installed(cloud.tenants["acme"])
        assert {port.device: port.up for port in installed.ports} == {"p1": False, "p2": True}


@isolated
def test_what_is_installed_is_read_back() -> None:
    with two_tenants() as cloud:
        found = cloud.fabric.installed(cloud.tenants["acme"])
        [network] = found.networks
        assert (network.index, network.device, network.mtu, network.up) == (1, "br1", 1500, True)
        assert network.gateways == ["10.0.0.1/24", "fd00::1/64"]
        assert (found.tenant, found.namespace) == ("acme", True)
        for instance, port in zip(("web", "db"), sorted(found.ports, key=lambda port: port.index), strict=True):
            wanted = cloud.instances["acme", instance].port
            assert (port.index, port.device, port.network, port.up) == (
                wanted.index,
                naming.port(wanted.index),
                1,
                True,
            )
            assert (port.macs, port.addresses) == ([wanted.mac], [wanted.address])
            assert wanted.address6 in port.addresses6 and len(port.addresses6) == 2
        assert "table bridge lab" in found.rules and "table inet lab" in found.rules
        run(cloud.inside("acme"), "ip link set br1 down")
        [network] = cloud.fabric.installed(cloud.tenants["acme"]).networks
        assert not network.up


def _drift(cloud: Lab) -> list[str]:
    return cloud.fabric.installed(cloud.tenants["acme"]).drift


def _repair(cloud: Lab) -> None:
    cloud.apply("acme")
    for name in ("web", "db"):
        cloud.plug(cloud.instances["acme", name])


Change = tuple[list[str], list[str], list[str]]
"""Commands, those that take back what a repair does not, and what is said."""


def _changes(cloud: Lab) -> list[Change]:
    (theirs, _), (theirs6, ours6) = cloud.fabric.naming.addresses(cloud.tenants["acme"].index)
    mac = cloud.instances["acme", "web"].port.mac
    return [
        (["nft add rule inet lab forward accept"], [], ["rule added in inet lab: accept"]),
        (
            ["nft flush chain inet lab postrouting"],
            [],
            ['rule missing in inet lab: oifname "uplink" masquerade'],
        ),
        (["ip link set uplink down"], [], ["device uplink is down"]),
        (["ip link del uplink"], [], ["device uplink is missing"]),
        (
            ["ip addr add 192.0.2.77/32 dev uplink"],
            ["ip addr del 192.0.2.77/32 dev uplink"],
            ["address 192.0.2.77/32 of uplink is not ours"],
        ),
        ([f"ip addr del {ours6}/127 dev uplink"], [], [f"address {ours6}/127 of uplink is missing"]),
        (["ip route del default"], [], [f"no default route to {theirs} through uplink"]),
        (["ip -6 route del default"], [], [f"no default route to {theirs6} through uplink"]),
        (["ip link set br1 address 02:00:00:00:99:99"], [], ["device br1 is not the bridge it should be"]),
        (["ip addr del 10.0.0.1/24 dev br1"], [], ["gateway 10.0.0.1 of br1 is missing on the device"]),
        (["ip addr add 10.0.0.77/24 dev br1"], [], ["gateway 10.0.0.77 of br1 is missing in the rules"]),
        (
            ['nft delete element inet lab gateways6 { "br1" . fd00::1 }'],
            [],
            ["gateway fd00::1 of br1 is missing in the rules"],
        ),
        (['nft delete element inet lab bridges { "br1" }'], [], ["br1 is missing in set bridges"]),
        (['nft delete element inet lab paths { "br1" . "br1" }'], [], ["br1 is missing in set paths"]),
        (["ip link set p1 down"], [], ["device p1 is down"]),
        (["bridge link set dev p1 learning on"], [], ["device p1 learns addresses or is flooded"]),
        (["bridge link set dev p1 flood on"], [], ["device p1 learns addresses or is flooded"]),
        (
            [f'nft delete element bridge lab ipv4 {{ "p1" . {mac} . 10.0.0.2 }}'],
            [],
            ["device p1 has no rule elements"],
        ),
        ([f"bridge fdb del {mac} dev p1 master"], [], [f"device p1 has no forwarding entry for {mac}"]),
        (
            [f'nft add element bridge lab macs {{ "p77" . {mac} }}'],
            [f'nft delete element bridge lab macs {{ "p77" . {mac} }}'],
            ["rule elements of p77, which does not exist"],
        ),
        (
            ["ip link add strange type veth peer name stranger"],
            ["ip link del strange"],
            ["device strange is not ours", "device stranger is not ours"],
        ),
        (
            ["ip link set p1 down", "ip link set p1 name p55", "ip link set p55 up"],
            ["ip link set p55 down", "ip link set p55 name p1"],
            ["device p55 has the wrong interface index", "rule elements of p1, which does not exist"],
        ),
    ]
