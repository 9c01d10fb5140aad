"""Floating addresses of the linux fabric: all packets of one external address and one instance, both ways."""

from __future__ import annotations

import socket

from insula.model.objects import PublishedPort
from insula.network.intent import FloatingIntent, OutsideIntent
from tests.support.external import alive, answers, asks, connection, echoes, forward, tells
from tests.support.lab import Lab, World, isolated, two_tenants

SHORT = 0.3
CLIENT, CLIENT6 = World.ADDRESS, World.ADDRESS6
NEAR, NEAR6 = "203.0.113.77", "2001:470::77"  # in the networks of the host: it answers ARP and NDP for them
OTHER = "203.0.113.78"


def attach(lab: Lab, tenant: str, *floating: tuple[str, str | None]) -> None:
    lab.apply(tenant, outside=OutsideIntent(floating=[FloatingIntent(address=a, target=t) for a, t in floating]))


@isolated
def test_a_floating_address_leads_to_an_instance_with_all_ports() -> None:
    world = World()
    with two_tenants() as lab:
        web, outside = lab.instances["acme", "web"], world.instance.netns
        tells(web, 80)
        tells(web, 53, udp=True)
        assert answers(outside, NEAR, 80, SHORT) == ""
        attach(lab, "acme", (NEAR, web.port.address), (NEAR6, web.port.address6))
        assert answers(outside, NEAR, 80) == CLIENT and answers(outside, NEAR6, 80) == CLIENT6
        assert asks(outside, NEAR, 53) == CLIENT
        assert world.instance.pings(NEAR) and world.instance.pings(NEAR6)
        assert answers(None, NEAR, 80) == "100.64.0.2", "the host itself"
        attach(lab, "acme")
        assert answers(outside, NEAR, 80, SHORT) == "" and answers(outside, NEAR6, 80, SHORT) == ""
        assert not world.instance.pings(NEAR, SHORT)


@isolated
def test_what_the_instance_sends_has_its_floating_address() -> None:
    world = World()
    with two_tenants() as lab:
        web, db = lab.instances["acme", "web"], lab.instances["acme", "db"]
        world.tells_callers(80)
        attach(lab, "acme", (NEAR, web.port.address), (NEAR6, web.port.address6))
        assert web.connects(CLIENT, 80) == NEAR and web.connects(CLIENT6, 80) == NEAR6
        assert db.connects(CLIENT, 80) == World.HOST and db.connects(CLIENT6, 80) == World.HOST6
        assert lab.instances["globex", "web"].connects(CLIENT, 80) == World.HOST
        attach(lab, "acme", (NEAR, db.port.address))
        assert db.connects(CLIENT, 80) == NEAR and web.connects(CLIENT, 80) == World.HOST


@isolated
def test_it_is_reached_from_inside_and_by_other_tenants() -> None:
    World()
    with two_tenants() as lab:
        lab.network("acme", "10.1.0.0/24", "fd01::/64", name="back")
        other = lab.instance("acme", "other", "back", 2)
        web, db, stranger = (lab.instances[each] for each in (("acme", "web"), ("acme", "db"), ("globex", "web")))
        tells(web, 80)
        tells(stranger, 80)
        attach(lab, "acme", (NEAR, web.port.address), (NEAR6, web.port.address6))
        attach(lab, "globex", (OTHER, stranger.port.address))
        for address, near, far in ((NEAR, db.port.address, "10.1.0.2"), (NEAR6, db.port.address6, "fd01::2")):
            assert answers(db.netns, address, 80) == near
            assert answers(other.netns, address, 80) == far
            assert answers(web.netns, address, 80), "from itself"
        assert answers(stranger.netns, NEAR, 80) == OTHER
        assert answers(web.netns, OTHER, 80) == NEAR
        assert answers(db.netns, OTHER, 80) == "100.64.0.4"


@isolated
def test_a_floating_address_may_have_published_ports_only() -> None:
    world = World()
    with two_tenants() as lab:
        web, db, outside = lab.instances["acme", "web"], lab.instances["acme", "db"], world.instance.netns
        tells(web, 80, name="web")
        tells(web, 81)
        tells(db, 80, name="db")
        forwards = [
            forward(lab, "acme", "web", PublishedPort(address=NEAR, port=80, target=80)),
            forward(lab, "acme", "db", PublishedPort(address=NEAR, port=8080, target=80)),
        ]
        lab.apply("acme", outside=OutsideIntent(forwards=forwards, floating=[FloatingIntent(address=NEAR)]))
        assert answers(outside, NEAR, 80) == f"web {CLIENT}" and answers(outside, NEAR, 8080) == f"db {CLIENT}"
        assert answers(outside, NEAR, 81, SHORT) == "" and not world.instance.pings(NEAR, SHORT)


@isolated
def test_it_moves_to_another_tenant_and_old_connections_end() -> None:
    world = World()
    with two_tenants() as lab:
        mine, theirs = lab.instances["acme", "web"], lab.instances["globex", "web"]
        echoes(mine, 7)
        tells(theirs, 80, name="globex")
        attach(lab, "acme", (NEAR, mine.port.address))
        sock = connection(world.instance.netns, NEAR, 7)
        assert alive(sock)
        attach(lab, "globex", (NEAR, theirs.port.address))
        attach(lab, "acme")
        assert not alive(sock, SHORT)
        assert answers(world.instance.netns, NEAR, 80) == f"globex {CLIENT}"


@isolated
def test_nobody_sends_with_the_floating_address_of_another_tenant() -> None:
    """Neither an instance, nor a tenant whose router has lost its rules."""
    world = World()
    with two_tenants() as lab:
        web, thief = lab.instances["acme", "web"], lab.instances["globex", "web"]
        attach(lab, "acme", (NEAR, web.port.address))
        spy = world.instance.sniffer()

        def sends(source: socket.socket, mark: bytes) -> None:
            source.sendto(mark, (CLIENT, 9))

        with web.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sends(sock, b"the control")
        assert spy.sees(b"the control", 5.0)
        nft = lab.fabric._tenant(lab.tenants["globex"]).nft
        nft.run(
            "flush chain bridge lab prerouting; chain bridge lab prerouting { policy accept; }\n"
            f"add table ip theft; add chain ip theft c {{ type nat hook postrouting priority 50; }}\n"
            f"add rule ip theft c oifname uplink snat to {NEAR}\n"
        )
        with thief.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sends(sock, b"the thief")
        assert not spy.sees(b"the thief", SHORT)
