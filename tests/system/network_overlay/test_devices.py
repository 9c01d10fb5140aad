"""The overlay's devices: where a network needs one, what crosses the underlay, packet sizes, damage and removal."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import time

import pytest

from insula.kernel.netlink import Rtnl
from insula.kernel.netns import call_in
from insula.model.errors import Invalid, Unavailable
from insula.network.intent import RemotePort, TenantIntent
from insula.network.linux.underlay import Underlay
from tests.support.frames import ethernet, udp
from tests.support.hosts import Cloud, Host
from tests.support.lab import SOON, Lab, Sniffer, eventually, isolated, ping
from tests.support.wait import patiently


def acme(count: int = 2, version: int = 4, mtu: int = 1600) -> Cloud:
    cloud = Cloud(count, version, mtu)
    cloud.tenant("acme")
    cloud.network("acme")
    cloud.instance("acme", "web", 1)
    cloud.instance("acme", "db", 2)
    return cloud


def run(netns: int, command: str) -> str:
    words = command.split()
    done = call_in(netns, lambda: subprocess.run(words, check=True, capture_output=True, text=True))
    return done.stdout


def overlays(host: Host, tenant: str) -> list[str]:
    with call_in(host.inside(tenant), Rtnl) as rtnl:
        return [link.name for link in rtnl.links() if link.kind == "vxlan"]


def arrivals(sniffer: Sniffer, seconds: float) -> list[bytes]:
    """The frames that have arrived, of which the first is waited for."""
    frames: list[bytes] = []
    with contextlib.suppress(BlockingIOError, TimeoutError):
        while True:
            sniffer.socket.settimeout(0 if frames else seconds)
            frame, (_, _, kind, *_) = sniffer.socket.recvfrom(65536)
            if kind != 4:  # PACKET_OUTGOING
                frames.append(frame)
    return frames


@isolated
def test_a_network_has_a_device_only_where_ports_have_others_elsewhere() -> None:
    cloud = Cloud(3)
    cloud.tenant("acme")
    cloud.network("acme")
    web = cloud.instance("acme", "web", 1)
    assert [overlays(host, "acme") for host in cloud.hosts] == [[], [], []]
    db = cloud.instance("acme", "db", 2)
    assert [overlays(host, "acme") for host in cloud.hosts] == [["vx1"], ["vx1"], []]
    assert web.pings(db.port.address)
    cloud.unplug(db, cloud.hosts[1])
    del cloud.instances["acme", "db"]
    cloud.apply("acme")
    assert [overlays(host, "acme") for host in cloud.hosts] == [[], [], []]
    assert not web.pings(db.port.address, 0.2)
    assert cloud.drift() == []


@isolated
def test_no_request_and_no_broadcast_crosses_the_underlay() -> None:
    cloud = acme()
    web, db = cloud.instances["acme", "web"], cloud.instances["acme", "db"]
    wire = cloud.hosts[1].sniffer()
    run(web.netns, "ip neigh flush dev eth0 to 10.0.0.3")
    with web.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        sock.sendto(b"to nobody there", ("10.0.0.99", 9))
        sock.sendto(b"broadcast", ("10.0.0.255", 9))
        sock.sendto(b"multicast", ("224.0.0.251", 9))
        sock.sendto(b"to db itself", (db.port.address, 9))
    web.send_frame(ethernet("02:66:00:00:00:01", web.port.mac, 0x0800, udp("10.0.0.2", "10.0.0.99", b"unknown MAC")))
    frames: list[bytes] = []
    deadline = time.monotonic() + SOON
    while not any(b"to db itself" in frame for frame in frames) and time.monotonic() < deadline:
        frames += arrivals(wire, SOON)
    time.sleep(0.3)
    frames += arrivals(wire, 0)
    inner = [frame[50:] for frame in frames if frame[36:38] == (4789).to_bytes(2, "big")]
    assert [frame for frame in inner if b"to db itself" in frame]
    assert {frame[:6].hex(":") for frame in inner} == {db.port.mac}


@pytest.mark.parametrize("version", [4, 6])
@isolated
def test_the_largest_packets_arrive_whole(version: int) -> None:
    overhead = {4: 50, 6: 70}[version]
    cloud = acme(version=version, mtu=1500 + overhead)
    web, db = cloud.instances["acme", "web"], cloud.instances["acme", "db"]
    wire = cloud.hosts[1].sniffer()
    assert web.pings(db.port.address, size=1500 - 28, dont_fragment=True), "1,500 bytes with IPv4 header"
    assert web.pings(str(db.port.address6), size=1500 - 48)
    wire.socket.settimeout(SOON)
    sizes = {len(wire.socket.recv(65536)) for _ in range(4)}
    assert max(sizes) <= 1500 + overhead + 14


@pytest.mark.parametrize("version", [4, 6])
@isolated
def test_a_network_that_does_not_fit_is_an_error_with_the_size_that_does(version: int) -> None:
    overhead = {4: 50, 6: 70}[version]
    cloud = Cloud(2, version, 1500)
    cloud.tenant("acme")
    cloud.network("acme", mtu=1500 - overhead)
    web, db = cloud.instance("acme", "web", 1), cloud.instance("acme", "db", 2)
    assert web.pings(db.port.address, size=1500 - overhead - 28, dont_fragment=True)
    large = cloud.network("acme", "10.1.0.0/24", "fd01::/64", name="large", mtu=1501 - overhead)
    cloud.instance("acme", "a", 1, "large")
    with pytest.raises(Invalid) as refused:
        cloud.instance("acme", "b", 2, "large")
    assert refused.value.message == (
        f"network large has an MTU of {large.mtu}, but wan has room for {1500 - overhead} with VXLAN"
    )
    assert f"--mtu {1500 - overhead}" in str(refused.value.hint)
    assert list(cloud.errors("acme", cloud.hosts[1])) == ["network large"]
    assert web.pings(db.port.address), "the other network is not touched"


@isolated
def test_hosts_are_checked() -> None:
    cloud = acme()
    first, second = cloud.hosts
    for hosts in (["fd20::1"], ["nonsense"], ["198.51.100.2", "198.51.100.256"]):
        with pytest.raises(Invalid):
            first.do(lambda hosts=hosts: first.fabric.set_hosts(hosts))  # type: ignore[misc]
    assert cloud.drift() == []
    port = cloud.instances["acme", "db"].port
    stray = RemotePort(network="net", instance="far", mac="02:99:00:00:00:01", addresses=["10.0.0.9"], host="192.0.2.9")
    intent = cloud.intent("acme", first)
    found = first.do(lambda: first.fabric.apply(cloud.intent("acme", first, remotes=[*intent.remotes, stray])))
    assert [(part, type(error)) for part, error in found.items()] == [("network net", Invalid)]
    assert "instance far is on host 192.0.2.9" in found["network net"].message
    assert cloud.instances["acme", "web"].pings(port.address), "the others are there"
    for address, device in (("nonsense", None), ("198.51.100.01", None), ("198.51.100.1", 'x" accept')):
        with pytest.raises(Invalid):
            Underlay(address, device)
    first.do(first.fabric.close)
    second.do(lambda: second.fabric.set_hosts([second.address]))
    assert not cloud.instances["acme", "web"].pings(port.address, 0.3), "the first host is no longer one of the cloud"


@isolated
def test_a_host_without_an_underlay_says_so() -> None:
    cloud = Lab()
    cloud.tenant("acme")
    cloud.network("acme")
    with pytest.raises(Unavailable):
        cloud.fabric.set_hosts(["192.0.2.1"])
    remote = RemotePort(network="net", instance="db", mac="02:99:00:00:00:01", addresses=["10.0.0.9"], host="192.0.2.9")
    errors = cloud.fabric.apply(cloud.intent("acme", remotes=[remote]))
    assert [(part, type(error)) for part, error in errors.items()] == [("network net", Unavailable)]


DAMAGES = {
    "device deleted": ("ip link del vx1", "rule elements of vx1, which does not exist"),
    "device down": ("ip link set vx1 down", "device vx1 is down"),
    "no host for a MAC address": ("bridge fdb del {mac} dev vx1 self", "device vx1 has no host for {mac}"),
    "another host": ("bridge fdb replace {mac} dev vx1 self permanent dst 198.51.100.77", None),
    "a host too much": (
        "bridge fdb add 02:77:00:00:00:01 dev vx1 self permanent dst 198.51.100.2",
        "device vx1 has a host for 02:77:00:00:00:01",
    ),
    "all frames to a host": (
        "bridge fdb append 00:00:00:00:00:00 dev vx1 self permanent dst 198.51.100.2",
        "device vx1 has a host for 00:00:00:00:00:00",
    ),
    "flooded": ("bridge link set dev vx1 flood on", "device vx1 learns addresses or is flooded"),
    "broadcast": ("bridge link set dev vx1 bcast_flood on", "device vx1 learns addresses or is flooded"),
    "learning": ("bridge link set dev vx1 learning on", "device vx1 learns addresses or is flooded"),
    "no answers": ("bridge link set dev vx1 neigh_suppress off", "device vx1 learns addresses or is flooded"),
    "the device learns": ("ip link set vx1 type vxlan learning", "device vx1 learns addresses or is flooded"),
    "on no bridge": ("ip link set vx1 nomaster", "device vx1 is not on br1"),
    "no neighbours": ("ip neigh flush dev br1 nud permanent", "br1 has no neighbour entry for {mac}"),
    "no forwarding": ("bridge fdb del {mac} dev vx1 master", "device vx1 has no forwarding entry for {mac}"),
    "a source too much": (
        "nft add element bridge h1 macs {{ vx1 . 02:77:00:00:00:01 }}",
        "device vx1 has no host for 02:77:00:00:00:01",
    ),
}


@isolated
def test_any_damage_is_found_and_repaired() -> None:
    cloud = acme()
    web, db = cloud.instances["acme", "web"], cloud.instances["acme", "db"]
    first = cloud.hosts[0]
    for what, (command, said) in DAMAGES.items():
        assert cloud.drift() == [], what
        run(first.inside("acme"), command.format(mac=db.port.mac))
        if said:
            assert f"h1 acme: {said.format(mac=db.port.mac)}" in cloud.drift(), what
        else:
            [network] = first.do(lambda: first.fabric.installed(cloud.tenants["acme"])).networks
            assert network.remotes == {db.port.mac: "198.51.100.77"}
        cloud.apply("acme", [first])
        assert cloud.drift() == [], what
        assert web.pings(db.port.address) and web.pings(str(db.port.address6)), what
    run(first.netns, "nft add element inet h1 members4 { 198.51.100.9 }")
    assert cloud.drift() == ["h1: host 198.51.100.9 is added to set members4"]
    first.do(lambda: first.fabric.set_hosts(host.address for host in cloud.hosts))
    assert cloud.drift() == []


@isolated
def test_removal_leaves_nothing_and_frees_the_identifiers() -> None:
    cloud = acme()
    web = cloud.instances["acme", "web"]
    for _ in range(5):
        for host in cloud.hosts:
            host.do(lambda host=host: host.fabric.remove(cloud.tenants["acme"]))  # type: ignore[misc]
            assert not os.path.exists(host.fabric.naming.namespace("acme"))
        cloud.apply("acme")
        for instance in cloud.instances.values():
            cloud.plug(instance)
        cloud.apply("acme")
        assert web.pings("10.0.0.3")
    network = cloud.networks.pop(("acme", "net"))
    instances, cloud.instances = cloud.instances, {}
    cloud.apply("acme")
    assert [overlays(host, "acme") for host in cloud.hosts] == [[], []]
    cloud.networks["acme", "net"], cloud.instances = network, instances
    for host in cloud.hosts:
        host.do(host.fabric.teardown)
        assert run(host.netns, "nft list ruleset") == ""
        assert "vxlan" not in run(host.netns, "ss -lunp")
        assert run(host.netns, "ss -Hlun") == "", "no socket listens at the port"


@isolated
def test_an_incomplete_intent_removes_no_ports_of_others() -> None:
    cloud = acme()
    web, db = cloud.instances["acme", "web"], cloud.instances["acme", "db"]
    cloud.apply("acme", remotes=[], complete=False)
    assert web.pings(db.port.address)
    cloud.apply("acme", remotes=[])
    assert not web.pings(db.port.address, 0.2)


@isolated
def test_kill_9_at_any_moment_is_repaired() -> None:
    """A child makes and removes a host's part again and again and is killed; then all is put in order."""
    random.seed(11)
    cloud = acme()
    web, db, first = cloud.instances["acme", "web"], cloud.instances["acme", "db"], cloud.hosts[0]
    intent, tenant = cloud.intent("acme", first), cloud.tenants["acme"]
    bare = TenantIntent(tenant=tenant, networks=intent.networks, ports=intent.ports)
    first.do(first.fabric.close)
    for number in range(12):
        child = os.fork()
        if child == 0:
            try:
                first.start()
                while True:
                    for each in (intent, bare, TenantIntent(tenant=tenant), intent):
                        first.do(lambda each=each: first.fabric.apply(each))  # type: ignore[misc]
                    first.do(lambda: first.fabric.remove(tenant))
            finally:
                os._exit(1)
        time.sleep(random.uniform(0.02, 0.3))
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), "the work ended by itself: it failed"
        first.start()
        assert first.do(lambda: first.fabric.apply(intent)) == {}
        cloud.plug(web)
        cloud.apply("acme", [first])
        assert cloud.drift() == [], f"round {number}"
        eventually(lambda: web.pings(db.port.address) and db.pings(str(web.port.address6)))
        first.do(first.fabric.close)
    assert ping(web.netns, db.port.address, patiently(1.0))
