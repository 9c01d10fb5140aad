"""The counters of ports: every IP packet once, none of another port, and for as long as the port is plugged in."""

from __future__ import annotations

import os
import socket

import msgspec

from insula.kernel.netns import call_in
from insula.kernel.nftables import Nft
from insula.network.fabric import NetnsNic, Traffic
from tests.support.lab import Instance, Lab, eventually, isolated, two_tenants

HEADERS = 20 + 8  # IPv4, UDP
HEADERS6 = 40 + 8


def traffic(lab: Lab, tenant: str, *names: str) -> dict[str, Traffic]:
    ports = [lab.instances[tenant, name].port for name in names]
    found = lab.fabric.traffic(lab.tenants[tenant], ports)
    return {name: found[port.index] for name, port in zip(names, ports, strict=True) if port.index in found}


def amounts(of: Traffic) -> tuple[int, int, int, int]:
    return of.received.bytes, of.received.packets, of.sent.bytes, of.sent.packets


def exchange(sender: Instance, receiver: Instance, sizes: list[int], six: bool = False) -> None:
    """Send datagrams of these sizes, and return when all have arrived."""
    family = socket.AF_INET6 if six else socket.AF_INET
    address = receiver.port.address6 if six else receiver.port.address
    with receiver.socket(family, socket.SOCK_DGRAM) as there, sender.socket(family, socket.SOCK_DGRAM) as here:
        there.bind(("::" if six else "", 9))
        there.settimeout(20)
        for size in sizes:
            here.sendto(bytes(size), (address, 9))
            assert len(there.recv(65536)) == size


@isolated
def test_every_packet_is_counted_once_on_either_side() -> None:
    """Not more, as ARP and Ethernet headers; not less, as a datagram in fragments, which is longer on the wire."""
    with two_tenants(subnet6=None) as lab:
        web, db = lab.instances["acme", "web"], lab.instances["acme", "db"]
        assert {amounts(each) for each in traffic(lab, "acme", "web", "db").values()} == {(0, 0, 0, 0)}
        sizes = [0, 1, 100, 1472]
        exchange(web, db, sizes)
        sent = sum(sizes) + len(sizes) * HEADERS
        found = traffic(lab, "acme", "web", "db")
        assert amounts(found["web"]) == (0, 0, sent, len(sizes))
        assert amounts(found["db"]) == (sent, len(sizes), 0, 0)
        assert {amounts(each) for each in traffic(lab, "globex", "web", "db").values()} == {(0, 0, 0, 0)}
        before = traffic(lab, "acme", "web")["web"].sent.bytes
        exchange(web, db, [2000])  # in two fragments, each with a header of its own
        assert traffic(lab, "acme", "web")["web"].sent.bytes - before == 2000 + 8 + 2 * 20


@isolated
def test_version_6_is_counted_too_and_what_is_dropped_is_not() -> None:
    with two_tenants() as lab:
        web, db = lab.instances["acme", "web"], lab.instances["acme", "db"]
        exchange(web, db, [0], six=True)  # so that neighbour discovery is over
        before = amounts(traffic(lab, "acme", "web")["web"])
        exchange(web, db, [500], six=True)
        after = amounts(traffic(lab, "acme", "web")["web"])
        assert after[2:] == (before[2] + HEADERS6 + 500, before[3] + 1)
        forged = bytes.fromhex(db.port.mac.replace(":", "")) + bytes.fromhex("020000000099") + b"\x08\x00" + bytes(40)
        web.send_frame(forged)
        assert amounts(traffic(lab, "acme", "web")["web"])[2:] == after[2:]


@isolated
def test_counters_outlive_the_instance_and_begin_anew_with_a_new_port() -> None:
    """They can be read until the port is unplugged, however often the tenant's intent is applied meanwhile."""
    with two_tenants(subnet6=None) as lab:
        web, db = lab.instances["acme", "web"], lab.instances["acme", "db"]
        exchange(web, db, [100])
        first = traffic(lab, "acme", "web")["web"]
        lab.plug(web)  # repairs nothing
        lab.apply("acme")
        assert traffic(lab, "acme", "web")["web"] == first
        web.remove()
        with call_in(os.open(lab.fabric.naming.namespace("acme"), os.O_RDONLY), Nft) as nft:
            eventually(lambda: lab.fabric.status(lab.tenants["acme"], lab.networks["acme", "net"]).ports == 1)
            lab.apply("acme")
            assert traffic(lab, "acme", "web")["web"] == first
            assert not [each for each in nft.elements("bridge", "lab")["macs"] if each[0] == f"p{web.port.index}"]
            lab.unplug(web)
            assert traffic(lab, "acme", "web") == {}
            assert nft.elements("bridge", "lab")["sent"] == {(f"p{db.port.index}",)}
        again = Instance()
        again.port = web.port
        lab.fabric.plug(lab.tenants["acme"], lab.networks["acme", "net"], again.port, NetnsNic(again.netns))
        second = traffic(lab, "acme", "web")["web"]
        assert amounts(second) == (0, 0, 0, 0)
        assert second.sent.incarnation != first.sent.incarnation
        assert second.received.incarnation != first.received.incarnation


@isolated
def test_counters_of_ports_that_are_in_no_intent_are_removed() -> None:
    with two_tenants(subnet6=None) as lab:
        exchange(lab.instances["acme", "web"], lab.instances["acme", "db"], [100])
        whole = lab.intent("acme")
        lab.fabric.apply(msgspec.structs.replace(whole, ports=whole.ports[:1]))
        assert set(traffic(lab, "acme", "web", "db")) == {"web"}


@isolated
def test_many_ports_are_read_together_as_one_is_alone() -> None:
    lab = Lab()
    lab.tenant("acme")
    lab.network("acme")
    names = [f"i{number}" for number in range(12)]
    for name in names:
        lab.instance("acme", name)
    for number, name in enumerate(names[1:]):
        exchange(lab.instances["acme", name], lab.instances["acme", "i0"], [10 * number])
    together = traffic(lab, "acme", *names)
    assert together == {name: traffic(lab, "acme", name)[name] for name in names}
    assert len({amounts(each) for each in together.values()}) == len(names)
    assert lab.fabric.installed(lab.tenants["acme"]).drift == []


@isolated
def test_a_port_that_is_not_counted_is_a_finding() -> None:
    with two_tenants(subnet6=None) as lab:
        index = lab.instances["acme", "web"].port.index
        with call_in(os.open(lab.fabric.naming.namespace("acme"), os.O_RDONLY), Nft) as nft:
            nft.run(f'delete element bridge lab sent {{ "p{index}" }}')
        assert f"packets of device p{index} are not counted" in lab.fabric.installed(lab.tenants["acme"]).drift
        lab.apply("acme")
        assert lab.fabric.installed(lab.tenants["acme"]).drift == []
