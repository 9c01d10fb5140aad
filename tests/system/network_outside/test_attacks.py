"""Attacks on published ports: loopback services through route_localnet, stale entries, exhausted tables."""

from __future__ import annotations

import os
import socket

import pytest

from insula.kernel.netns import call_in
from insula.network.linux import sysctl
from tests.support.external import alive, answers, asks, connection, echoes, publish, tells
from tests.support.lab import Lab, World, isolated, two_tenants

SHORT = 0.3
HOST, HOST6 = World.HOST, World.HOST6


def open_router(lab: Lab, tenant: str) -> None:
    """The router of a tenant that an attacker has taken over: no rules, and it forwards anything."""
    nft = lab.fabric._tenant(lab.tenants[tenant]).nft
    nft.run(
        "flush chain bridge lab prerouting; chain bridge lab prerouting { policy accept; }\n"
        "flush chain inet lab forward; chain inet lab forward { policy accept; }\n"
        "flush chain inet lab postrouting\n"
    )
    loose = {f"ipv4/conf/{device}/{name}": value for device in ("all", "uplink") for name, value in _LOOSE.items()}
    call_in(lab.inside(tenant), lambda: sysctl.write(loose))


_LOOSE = {"route_localnet": "1", "rp_filter": "0"}


@isolated
def test_services_on_the_loopback_of_the_host_stay_closed() -> None:
    """CVE-2020-8558: with route_localnet the kernel takes packets to 127.0.0.1 that come from the uplink."""
    with two_tenants() as lab:
        web = lab.instances["acme", "web"]
        tells(web, 80)
        publish(lab, "acme", web=["127.0.0.1:8443:80", "[::1]:8443:80"])
        assert answers(None, "127.0.0.1", 8443) and answers(None, "::1", 8443)
        secret = socket.create_server(("127.0.0.1", 6379))
        secret6 = socket.create_server(("::1", 6379), family=socket.AF_INET6)
        datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        datagrams.bind(("127.0.0.1", 6379))
        for each in (secret, secret6, datagrams):
            each.settimeout(SHORT)
        open_router(lab, "acme")
        router = lab.inside("acme")
        for netns in (web.netns, router):
            for address in ("127.0.0.1", "::1", "100.64.0.2", HOST):
                assert answers(netns, address, 6379, SHORT) == ""
        raw = call_in(router, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"uplink")
        for address in ("127.0.0.1", "127.0.0.2"):
            try:
                raw.sendto(b"attack", (address, 6379))
            except OSError:
                continue
        for each in (secret, secret6):
            try:
                each.accept()
            except TimeoutError:
                continue
            raise AssertionError("the host's loopback service was reached")
        try:
            raise AssertionError(f"a datagram came: {datagrams.recv(100)!r}")
        except TimeoutError:
            pass
        with socket.create_connection(("127.0.0.1", 6379), 1):
            secret.accept()  # the control


@isolated
def test_a_tenant_can_not_take_packets_to_an_address_that_is_not_the_hosts() -> None:
    world = World()
    with two_tenants() as lab:
        web, victim = lab.instances["acme", "web"], lab.instances["globex", "web"]
        tells(web, 53, udp=True, name="thief")
        tells(web, 80, name="thief")
        tells(world.instance, 53, udp=True, name="real")
        tells(world.instance, 80, name="real")
        publish(lab, "acme", web=[f"{World.ADDRESS}:53:53/udp", f"{World.ADDRESS}:80:80"])
        assert asks(victim.netns, World.ADDRESS, 53).startswith("real")
        assert answers(victim.netns, World.ADDRESS, 80).startswith("real")
        assert answers(None, World.ADDRESS, 80).startswith("real")


@pytest.mark.parametrize(("host", "own"), [(HOST, World.ADDRESS), (World.HOST6, World.ADDRESS6)], ids=["ipv4", "ipv6"])
@isolated
def test_a_client_that_keeps_sending_follows_what_is_published(host: str, own: str) -> None:
    """Entries of connection tracking from before a port was published, and from before it moved, don't stay."""
    world = World()
    with two_tenants() as lab:
        web, db = lab.instances["acme", "web"], lab.instances["acme", "db"]
        for instance, name in ((web, "web"), (db, "db")):
            tells(instance, 53, udp=True, name=name)
        client = world.instance.socket(socket.AF_INET6 if ":" in own else socket.AF_INET, socket.SOCK_DGRAM)
        client.bind(("", 40000))

        def asked() -> str:
            client.settimeout(SHORT)
            for _ in range(10):
                try:
                    client.sendto(b"?", (host, 5353))
                    return client.recv(200).decode()
                except OSError:
                    continue
            return ""

        assert asked() == ""
        publish(lab, "acme", web="5353:53/udp")
        assert asked() == f"web {own}"
        publish(lab, "acme", db="5353:53/udp")
        assert asked() == f"db {own}"
        publish(lab, "acme")
        publish(lab, "globex")
        assert asked() == ""


@isolated
def test_connections_end_with_their_port_and_others_stay() -> None:
    world = World()
    with two_tenants() as lab:
        web = lab.instances["acme", "web"]
        echoes(web, 7)
        publish(lab, "acme", web=["7000:7", "7001:7", "7100-7200:7100-7200"])
        gone, kept = (connection(world.instance.netns, HOST, port) for port in (7000, 7001))
        assert alive(gone) and alive(kept)
        publish(lab, "acme", web=["7001:7", "7002:7"])
        assert alive(kept), "the other port's"
        assert not alive(gone, SHORT)
        second = connection(world.instance.netns, HOST, 7002)
        assert alive(kept) and alive(second)


@isolated
def test_what_is_damaged_is_repaired() -> None:
    world = World()
    with two_tenants() as lab:
        web = lab.instances["acme", "web"]
        tells(web, 80)
        wanted = ["8080:80", f"{HOST}:8081:80", "127.0.0.1:8082:80", "20000-20100:20000-20100"]
        publish(lab, "acme", web=wanted)
        damage = (
            ("host", "flush map inet lab-outside host_ports4"),
            ("host", "delete table inet lab-outside"),
            ("tenant", "flush map inet lab-outside ports4"),
            ("tenant", "delete table inet lab-outside"),
            ("host", "add element inet lab-outside host_ports4 { tcp . 9999 : 100.64.0.3 }"),
        )
        for where, command in damage:
            nft = lab.fabric._handles()[1] if where == "host" else lab.fabric._tenant(lab.tenants["acme"]).nft
            nft.run(command)
            publish(lab, "acme", web=wanted)
            for port in (8080, 8081):
                assert answers(world.instance.netns, HOST, port) == World.ADDRESS, command
            assert answers(None, "127.0.0.1", 8082), command
        assert "9999" not in lab.fabric._handles()[1].run("list map inet lab-outside host_ports4")
        sysctl.write({"ipv4/conf/lab-u1/route_localnet": "0"})
        publish(lab, "acme", web=wanted)
        assert answers(None, "127.0.0.1", 8082)


@isolated
def test_the_rules_are_as_many_for_one_port_as_for_many() -> None:
    with two_tenants() as lab:
        publish(lab, "acme", web="8080:80")
        hosts, tenants = (_rules(lab, each) for each in ("host", "tenant"))
        publish(lab, "acme", web=[f"{port}:80" for port in range(10000, 10200)])
        assert (hosts, tenants) == tuple(_rules(lab, each) for each in ("host", "tenant"))


def _rules(lab: Lab, where: str) -> str:
    nft = lab.fabric._handles()[1] if where == "host" else lab.fabric._tenant(lab.tenants["acme"]).nft
    return nft.rules("inet", "lab-outside")


@isolated
def test_nothing_is_left_of_a_tenant_that_is_gone() -> None:
    with two_tenants() as lab:
        publish(lab, "acme", web=["8080:80", "127.0.0.1:8082:80"])
        publish(lab, "globex", web="8081:80")
        lab.fabric.remove(lab.tenants["acme"])
        host = lab.fabric._handles()[1]
        elements = host.run("list table inet lab-outside")
        assert "8080" not in elements and "8082" not in elements and "8081" in elements
        assert os.listdir(lab.run / "network" / "outside") == ["globex"]
        lab.fabric.teardown()
