"""Routing between networks whose instances are on different hosts: each host routes, nothing else is let through."""

from __future__ import annotations

import os

import pytest

from insula.model.routers import Router
from insula.network.addresses import gateway_mac
from tests.support.frames import ethernet, udp
from tests.support.hosts import Cloud
from tests.support.lab import SOON, isolated
from tests.system.network_overlay.test_attacks import IP, SHORT, encapsulated


def routed(places: dict[str, int], version: int = 4) -> Cloud:
    """acme's networks front and back, and other, which is apart; instances are named after them."""
    cloud = Cloud(3, version)
    cloud.tenant("acme")
    for number, network in enumerate(("front", "back", "other"), 1):
        cloud.network("acme", f"10.0.{number}.0/24", f"fd00:{number}::/64", name=network)
    cloud.routers = [Router(tenant="acme", name="core", networks=["front", "back"], created=0.0)]
    for name, host in places.items():
        cloud.instance("acme", name, host, name.rstrip("2"))
    return cloud


@pytest.mark.parametrize(
    "places",
    [
        {"front": 1, "back": 2, "other": 3},
        {"front": 1, "back": 2, "front2": 2, "back2": 1, "other": 1},
        {"front": 1, "back": 1, "front2": 2, "back2": 3, "other": 2},
    ],
    ids=["apart", "crossed", "three"],
)
@isolated
def test_networks_that_a_router_joins_reach_each_other_wherever_they_are(places: dict[str, int]) -> None:
    cloud = routed(places)
    for (_, name), instance in cloud.instances.items():
        instance.serves(name, 80)
    for (_, name), instance in cloud.instances.items():
        for (_, other), target in cloud.instances.items():
            meets = name == other or "other" not in (name, other)
            for address in (target.port.address, str(target.port.address6)):
                said = instance.connects(address, 80, SOON if meets else SHORT)
                assert said == (other if meets else ""), f"{name} to {other} at {address}"
    assert cloud.drift() == []


@isolated
def test_a_host_forges_no_addresses_that_no_router_would_send() -> None:
    cloud = routed({"front": 1, "back": 2, "other": 2})
    front, back, other = (cloud.instances["acme", name] for name in ("front", "back", "other"))
    network = cloud.networks["acme", "front"]
    gateway, spy = gateway_mac(network.index), front.sniffer()
    for source, by, arrives in (
        (back.port.address, gateway, True),
        (other.port.address, gateway, False),
        ("203.0.113.9", gateway, False),
        (front.port.address, gateway, False),
        (back.port.address, back.port.mac, False),
    ):
        mark = os.urandom(6)
        frame = ethernet(front.port.mac, by, IP, udp(source, front.port.address, mark))
        cloud.hosts[1].sends(encapsulated(network.vni, frame), cloud.hosts[0].address)
        assert spy.sees(mark, SOON if arrives else SHORT) == arrives, (source, by)


@isolated
def test_when_the_router_goes_so_do_the_way_and_what_it_needs() -> None:
    cloud = routed({"front": 1, "back": 2})
    front, back = cloud.instances["acme", "front"], cloud.instances["acme", "back"]
    assert front.pings(back.port.address)
    cloud.routers = []
    cloud.apply("acme")
    assert not front.pings(back.port.address, SHORT) and cloud.drift() == []
    for host in cloud.hosts:
        installed = host.do(lambda host=host: host.fabric.installed(cloud.tenants["acme"]))  # type: ignore[misc]
        assert all(network.vni is None for network in installed.networks), "no device is needed any more"
