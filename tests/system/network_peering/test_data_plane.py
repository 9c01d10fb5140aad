"""A peering on the fabric: what both sides have named passes, in both directions, and nothing else."""

from __future__ import annotations

import os
import socket
import subprocess
from functools import partial

import pytest

from insula.kernel.netns import call_in
from insula.model.policies import PortMatch
from tests.support.lab import SOON, eventually, isolated, query
from tests.system.network_peering.world import ICMP, SHORT, TCP80, address, only_its_ports_are_reached, two_tenants


@isolated
def test_only_the_ports_of_the_networks_in_it_are_reached() -> None:
    cloud = two_tenants()
    web, db, app, spy = (cloud.instances[each] for each in cloud.instances)
    peer = partial(cloud.peer, acme=(["net"], [TCP80, ICMP]), globex=(["net"], []))
    only_its_ports_are_reached([web, db, app, spy], peer)
    assert cloud.drift() == []
    for gateway in ("10.1.0.1", "10.1.1.1", "fd00:1:0::1"):
        assert not app.pings(gateway, SHORT), "the router of acme"
        assert query(app.netns, gateway, "web", timeout=SHORT) is None


@isolated
def test_both_sides_may_open_their_ports() -> None:
    cloud = two_tenants()
    web, app = cloud.instances["acme", "web"], cloud.instances["globex", "app"]
    web.serves("web", 80)
    app.serves("app", 8001)
    ports = PortMatch(protocol="tcp", port=8000, end_port=8010)
    cloud.peer(acme=(["net"], [TCP80]), globex=(["net"], [ports, PortMatch(protocol="udp")]))
    for version in (4, 6):
        assert app.connects(address(web, version), 80) == "web"
        assert web.connects(address(app, version), 8001) == "app"
        family = socket.AF_INET6 if version == 6 else socket.AF_INET
        with app.socket(family, socket.SOCK_DGRAM) as there, web.socket(family, socket.SOCK_DGRAM) as here:
            there.bind(("", 99))
            there.settimeout(SOON)
            here.settimeout(SOON)
            here.sendto(b"ping", (address(app, version), 99))
            data, sender = there.recvfrom(100)
            assert (data, sender[0]) == (b"ping", address(web, version)), "the sender's own address"
            there.sendto(b"pong", sender)
            assert here.recv(100) == b"pong"


@pytest.mark.parametrize("ends", ["acme", "globex", "both", "ports", "network"])
@isolated
def test_what_is_taken_back_ends_open_connections_and_others_go_on(ends: str) -> None:
    cloud = two_tenants()
    web, app = cloud.instances["acme", "web"], cloud.instances["globex", "app"]
    with (
        web.socket(socket.AF_INET, socket.SOCK_STREAM) as server,
        web.socket(socket.AF_INET, socket.SOCK_STREAM) as other,
    ):
        for sock, port in ((server, 80), (other, 82)):
            sock.bind(("", port))
            sock.listen()
            sock.settimeout(SOON)
        both = [TCP80, PortMatch(protocol="tcp", port=82)]
        cloud.peer(acme=(["net", "back"], both), globex=(["net"], []))
        with (
            app.socket(socket.AF_INET, socket.SOCK_STREAM) as one,
            app.socket(socket.AF_INET, socket.SOCK_STREAM) as two,
        ):
            pairs = []
            for client, at, port in ((one, server, 80), (two, other, 82)):
                client.settimeout(SOON)
                client.connect((web.port.address, port))
                pairs.append((client, at.accept()[0]))
            for client, connection in pairs:
                connection.settimeout(SOON)
                client.send(b"before")
                assert connection.recv(100) == b"before"
            if ends == "both":
                cloud.peer()
            elif ends in ("acme", "globex"):
                cloud.apply(ends, peerings=[])  # the other side is not told
            elif ends == "ports":
                cloud.peer(acme=(["net", "back"], both[1:]), globex=(["net"], []))
            else:
                cloud.peer(acme=(["back"], both), globex=(["net"], []))
            (client, connection), (kept, lasting) = pairs
            connection.settimeout(SHORT)
            client.send(b"after")
            with pytest.raises(TimeoutError):
                connection.recv(100)
            with pytest.raises(OSError):
                connection.send(b"the other way")
                client.settimeout(SHORT)
                client.recv(100)
            word = os.urandom(8)
            if ends == "ports":
                kept.send(word)
                assert lasting.recv(100) == word
            elif ends == "network":
                lasting.settimeout(SHORT)
                kept.send(word)
                with pytest.raises(TimeoutError):
                    lasting.recv(100)


@isolated
def test_names_of_the_peer_are_answered_as_long_as_there_is_a_peering() -> None:
    cloud = two_tenants()
    app, spy = cloud.instances["globex", "app"], cloud.instances["globex", "spy"]
    gateway = "10.2.0.1"
    assert query(app.netns, gateway, "web.acme.peer") == (3, [])
    cloud.peer(acme=(["net"], [TCP80]), globex=(["net"], []))
    eventually(lambda: query(app.netns, gateway, "web.acme.peer") == (0, ["10.1.0.9"]))
    assert query(app.netns, gateway, "web.acme.peer", 28) == (0, ["fd00:1::9"])
    assert query(app.netns, gateway, "db.acme.peer") == (3, []), "on a network that is not in the peering"
    assert query(app.netns, gateway, "web.acme.internal") == (3, [])
    late = cloud.instance("acme", "late", "net", 20)
    eventually(lambda: query(app.netns, gateway, "late.acme.peer") == (0, ["10.1.0.20"]))
    cloud.unplug(late)
    eventually(lambda: query(app.netns, gateway, "late.acme.peer") == (3, []))
    cloud.peer()
    eventually(lambda: query(app.netns, gateway, "web.acme.peer") == (3, []))
    assert query(spy.netns, "10.2.1.1", "app") == (0, ["10.2.0.9"]), "its own names stay"


@isolated
def test_damage_is_found_and_either_side_repairs_it() -> None:
    cloud = two_tenants()
    web, app = cloud.instances["acme", "web"], cloud.instances["globex", "app"]
    cloud.peer(acme=(["net"], [TCP80, ICMP]), globex=(["net"], []))
    for tenant in ("acme", "globex"):
        for command, said in {
            "ip link del peer7": "rule elements of peer7, which does not exist",
            "ip link set peer7 down": "device peer7 is down",
            "ip link set peer7 address 02:00:00:00:99:99": None,
            "ip neigh flush dev peer7 nud permanent": "next hop 169.254.127.1 of peer7 is unknown",
            "ip route flush dev peer7": None,
            "ip -6 route flush dev peer7": None,
            "nft flush set inet lab peer_protocols": None,
        }.items():
            for repairs in ("acme", "globex"):
                words = command.split()
                call_in(cloud.inside(tenant), lambda words=words: subprocess.run(words, check=True))  # type: ignore[misc]
                assert said is None or tenant == "globex" or said in cloud.drift()
                cloud.apply(tenant if "nft" in command else repairs)
                assert app.pings(web.port.address) and app.pings(str(web.port.address6)), (tenant, command, repairs)
    assert cloud.drift() == []


@isolated
def test_large_packets_and_path_mtu() -> None:
    cloud = two_tenants()
    small = cloud.network("globex", "10.2.2.0/24", "fd00:2:2::/64", name="small", mtu=1400)
    thin = cloud.instance("globex", "thin", "small", 9)
    web, app = cloud.instances["acme", "web"], cloud.instances["globex", "app"]
    cloud.peer(acme=(["net"], [ICMP]), globex=(["net", "small"], [ICMP]))
    assert small.mtu == 1400
    assert app.pings(web.port.address, size=1500 - 28, dont_fragment=True)
    assert web.pings(thin.port.address, size=1400 - 28, dont_fragment=True)
    for version, header in ((4, 28), (6, 48)):
        target = address(thin, version)
        assert not web.pings(target, SHORT, size=1500 - header, dont_fragment=True), "the first is too large"

        def learned(target: str = target, version: int = version) -> bool:
            said = web.do(
                lambda: (
                    subprocess.run(
                        ["ip", f"-{version}", "route", "get", target], capture_output=True, text=True, check=True
                    ).stdout
                )
            )
            return "mtu 1400" in said

        eventually(learned)


@isolated
def test_nothing_is_left_when_a_tenant_is_removed() -> None:
    cloud = two_tenants()
    cloud.peer(acme=(["net"], [TCP80]), globex=(["net"], []))
    cloud.fabric.remove(cloud.tenants["acme"])
    assert "device peer7 is not ours" not in cloud.fabric.installed(cloud.tenants["globex"]).drift
    cloud.sides = {}
    cloud.apply("globex")
    assert cloud.fabric.installed(cloud.tenants["globex"]).drift == []
    cloud.fabric.teardown()
