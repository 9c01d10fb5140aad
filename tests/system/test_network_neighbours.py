"""The neighbour tables, which all namespaces of a host share: limits of one instance's entries."""

from __future__ import annotations

import functools
import os
import socket
import subprocess

import pytest

from insula.kernel import netlink
from insula.kernel.netlink import Rtnl
from insula.kernel.netns import call_in
from insula.network import packets
from insula.network.addresses import gateway_mac
from insula.network.linux import naming, neighbours, sysctl
from tests.support.lab import Instance, Lab, World, eventually, isolated, ping
from tests.support.wait import patiently

MANY = 200
FEW = 40
PERMANENT = [f"10.0.8.{number}" for number in range(250)] + [f"fd00::8:{number:x}" for number in range(250)]


def waiting(instance: Instance, version: int) -> int:
    """Entries that wait for an answer: the kernel can't take these out of a table that is full."""
    return waiting_in(instance.netns, version)


def waiting_in(netns: int, version: int) -> int:
    command = ["ip", f"-{version}", "neigh", "show", "nud", "incomplete"]
    listed = call_in(netns, lambda: subprocess.run(command, capture_output=True, text=True, check=True))
    return len(listed.stdout.splitlines())


def ask_for_many(instance: Instance, version: int) -> None:
    """Send to unused addresses of its own subnet."""
    with instance.socket(socket.AF_INET6 if version == 6 else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for number in range(MANY):
            sock.sendto(b"x", (f"fd00::9:{number:x}" if version == 6 else f"10.0.9.{number}", 9))


def ordinary() -> Instance:
    """A namespace with the kernel's own settings, and a device with the same subnets."""
    instance, other = Instance(), Instance()
    with call_in(instance.netns, Rtnl) as here, call_in(other.netns, Rtnl) as there:
        here.execute(netlink.veth("eth0", "eth0", other.netns))
        near, far = here.link("eth0"), there.link("eth0")
        assert near and far
        there.execute(netlink.set_link(far.index, up=True))
        here.execute(netlink.add_address(near.index, "10.0.0.2/16"), netlink.add_address(near.index, "fd00::2/64"))
        here.sync_carrier("eth0")
    return instance


@pytest.mark.parametrize("version", [4, 6])
@isolated
def test_entries_that_wait_for_an_answer_wait_a_tenth_of_the_usual_time(version: int) -> None:
    cloud, usual = Lab(), ordinary()
    cloud.tenant("acme")
    cloud.network("acme", "10.0.0.0/16", "fd00::/64")
    instance = cloud.instance("acme", "web")
    ask_for_many(instance, version)
    ask_for_many(usual, version)
    assert waiting(usual, version) == MANY, "the control: they do wait"
    eventually(lambda: waiting(instance, version) == 0)
    for _ in range(3):  # as long as it has taken for the one, it has not been enough for the other
        if waiting(usual, version) == MANY:
            break
        ask_for_many(instance, version)
        ask_for_many(usual, version)
        eventually(lambda: waiting(instance, version) == 0)
    assert waiting(usual, version) == MANY
    other = cloud.instance("acme", "db")
    assert instance.pings(str(other.port.address6 if version == 6 else other.port.address)), "neighbours are found"


def sends_to(instance: Instance, count: int, version: int, first: int = 0) -> int:
    """The number of unused addresses of its own subnet, of so many, that the instance may send to."""
    sent = 0
    with instance.socket(socket.AF_INET6 if version == 6 else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for number in range(first, first + count):
            try:
                sock.sendto(b"x", (f"fd00::9:{number:x}" if version == 6 else f"10.0.16.{number}", 9))
            except PermissionError:
                continue
            sent += 1
    return sent


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound is so low that the tables of the host that runs the test have room for it."""
    monkeypatch.setattr(neighbours, "MOST4", FEW)
    monkeypatch.setattr(neighbours, "MOST6", FEW)


@pytest.mark.parametrize("version", [4, 6])
@isolated
def test_the_number_of_unresolved_neighbours_is_limited(few: None, version: int) -> None:
    world, cloud = World(), Lab()
    cloud.tenant("acme")
    network = cloud.network("acme", "10.0.0.0/16", "fd00::/64")
    hog, friend, other = (cloud.instance("acme", name) for name in ("hog", "friend", "other"))
    six = version == 6
    there = str(friend.port.address6 if six else friend.port.address)
    gateway, outside = str(network.gateway6 if six else network.gateway), world.ADDRESS6 if six else world.ADDRESS
    assert hog.pings(there)
    assert FEW - 3 <= sends_to(hog, FEW + 30, version) < FEW, "the friend has a place, by IPv6 with two addresses"
    assert sends_to(hog, 30, version, first=100) == 0
    assert hog.pings(there), "who has a place keeps it"
    assert hog.pings(gateway) and hog.pings(outside), "the way out is not counted"
    assert other.pings(there) and sends_to(other, 30, version) == 30, "the control: each has its own bound"
    free = "delete element inet lab ipv{} {{ {} }}".format(version, "fd00::9:5" if six else "10.0.16.5")
    hog.do(lambda: subprocess.run(["nft", free], check=True))  # as when its time is over
    assert sends_to(hog, 30, version, first=100) == 1


@isolated
def test_groups_and_loopback_are_not_counted(few: None) -> None:
    cloud = Lab()
    cloud.tenant("acme")
    cloud.network("acme", "10.0.0.0/16", "fd00::/64")
    hog = cloud.instance("acme", "hog")
    assert sends_to(hog, FEW + 30, 4) == FEW, "the control: the set is full"
    with hog.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for address in ("224.0.0.251", "127.0.0.1", str(hog.port.address)):
            assert sock.sendto(b"x", (address, 9)) == 1
        with pytest.raises(PermissionError):
            sock.sendto(b"x", ("10.0.200.1", 9))


@isolated
def test_rules_of_an_instance_that_ran_are_neither_read_nor_changed() -> None:
    cloud = Lab()
    cloud.tenant("acme")
    cloud.network("acme", "10.0.0.0/16")
    instance = cloud.instance("acme", "web")

    def nft(*words: str) -> str:
        command = ["nft", *words]
        done = instance.do(lambda: subprocess.run(command, capture_output=True, text=True, check=True))
        return str(done.stdout)

    assert "table inet lab" in nft("list", "ruleset")
    nft("flush", "ruleset")
    nft("add", "table", "inet", "own")
    cloud.plug(instance)
    assert nft("list", "ruleset").split() == ["table", "inet", "own", "{", "}"]


@pytest.mark.parametrize("version", [4, 6])
@isolated
def test_the_router_resolves_no_neighbours(version: int) -> None:
    """It is asked to by an instance that sends frames itself."""
    cloud = Lab()
    cloud.tenant("acme")
    network = cloud.network("acme", "10.0.0.0/16", "fd00::/64")
    instance = cloud.instance("acme", "web")
    source = str(instance.port.address6 if version == 6 else instance.port.address)
    router = cloud.inside("acme")

    def looked_for() -> int:
        """Neighbours whom the router waits for, once it was asked for twenty."""
        for number in range(20):
            target = f"fd00::9:{number:x}" if version == 6 else f"10.0.9.{number}"
            packet = packets.ip_packet("udp", source, target, b"x")
            instance.send_frame(packets.frame(gateway_mac(network.index), instance.port.mac, packet))
        return waiting_in(router, version)

    assert looked_for() == 0
    setting = f"ipv{version}/neigh/{naming.bridge(network.index)}/mcast_solicit"
    call_in(router, lambda: sysctl.write({setting: "3"}))
    assert looked_for() == 20, "the control"


@isolated
def test_others_resolve_neighbours_while_an_instance_with_cap_net_admin_fills_the_table() -> None:
    """It undoes the short wait, has entries that wait for answers in both tables, and permanent ones that the kernel
    counts to no limit. As many as here, and no more: the tables are those of the host that runs the test."""
    world, cloud = World(), Lab()
    for tenant in ("acme", "globex"):
        cloud.tenant(tenant)
        cloud.network(tenant, "10.0.0.0/16", "fd00::/64")
    hog = cloud.instance("acme", "hog")
    slow = {f"{ip}/neigh/eth0/retrans_time_ms": "60000" for ip in ("ipv4", "ipv6")}
    hog.do(lambda: sysctl.write(slow))
    permanent = [f"neigh replace {address} lladdr 02:00:00:00:00:01 dev eth0 nud permanent" for address in PERMANENT]
    batch = ["ip", "-batch", "-"]
    hog.do(lambda: subprocess.run(batch, input="\n".join(permanent), text=True, check=True, timeout=patiently(20)))
    for version in (4, 6):
        ask_for_many(hog, version)
    for tenant in ("acme", "globex"):
        first, second = cloud.instance(tenant, "first"), cloud.instance(tenant, "second")
        assert first.pings(str(second.port.address)) and first.pings(str(second.port.address6)), tenant
    home = os.open("/proc/self/ns/net", os.O_RDONLY)
    assert ping(home, world.ADDRESS) and ping(home, world.ADDRESS6), "the host's own"
    for version in (4, 6):
        assert waiting(hog, version) == MANY, "the control: they wait all the time"
        command = ["ip", f"-{version}", "neigh", "show", "nud", "permanent"]
        listed = call_in(
            hog.netns, functools.partial(subprocess.run, command, capture_output=True, text=True, check=True)
        )
        assert len(listed.stdout.splitlines()) >= len(PERMANENT) // 2, "the control: it has these"
