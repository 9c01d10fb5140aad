"""Allowed address pairs: what a port may send from beside its own addresses, and what not."""

from __future__ import annotations

import socket
from collections.abc import Sequence

from insula.kernel import netlink
from insula.kernel.netlink import Rtnl, maps
from insula.kernel.netns import call_in
from insula.model.objects import AddressPair
from insula.network.linux import naming
from insula.network.proof import reachability
from tests.support.frames import BROADCAST, arp, ethernet, udp
from tests.support.lab import Instance, Lab, isolated, ping, two_tenants

VIRTUAL = "00:00:5e:00:01:07"  # of VRRP's virtual router 7
IP, ARP = 0x0800, 0x0806


def allow(*addresses: str) -> list[AddressPair]:
    """Pairs from ADDRESS or ADDRESS@MAC."""
    return [
        AddressPair(address=address, mac=mac or None) for address, _, mac in (each.partition("@") for each in addresses)
    ]


def takes(instance: Instance, address: str) -> None:
    """Add an address inside, as root there may."""
    with call_in(instance.netns, Rtnl) as inside:
        index = inside.index("eth0")
        assert index
        inside.execute(netlink.add_address(index, address))


def problems(cloud: Lab, tenant: str = "acme") -> Sequence[str]:
    installed = cloud.fabric.installed(cloud.tenants[tenant])
    networks = [network for (owner, _), network in cloud.networks.items() if owner == tenant]
    ports = [each.port for (owner, _), each in cloud.instances.items() if owner == tenant]
    return [*installed.drift, *reachability.differences(installed, networks, ports)]


@isolated
def test_a_single_address_is_as_good_as_its_own() -> None:
    """For neighbours, which ask for it, and for the router, which doesn't have to."""
    with two_tenants() as cloud:
        gate = cloud.instance("acme", "gate", host=50, pairs=allow("10.0.0.100", "fd00::100"))
        db = cloud.instances["acme", "db"]
        cloud.apply("acme")
        for address, other in (("10.0.0.100/24", "10.0.0.101/24"), ("fd00::100/64", "fd00::101/64")):
            assert not db.pings(address.partition("/")[0], 0.3)
            takes(gate, address)
            takes(gate, other)
            assert any(db.pings(address.partition("/")[0]) for _ in range(3)), "the first was asked for in vain"
            assert ping(cloud.inside("acme"), address.partition("/")[0])
            assert not db.pings(other.partition("/")[0], 0.5), "one that is not allowed"
        for address in ("10.0.0.100", "fd00::100"):
            assert not cloud.instances["globex", "db"].pings(address, 0.3)
        assert problems(cloud) == []


@isolated
def test_a_range_may_come_from_behind_it() -> None:
    """Single packets with these sources pass, at this port alone; they are not announced."""
    with two_tenants() as cloud:
        pairs = allow("172.16.0.0/16", "172.16.5.0/24", "10.9.0.0/24", "fd99::/64")
        gate, db = cloud.instance("acme", "gate", host=50, pairs=pairs), cloud.instances["acme", "db"]
        spy = db.sniffer()

        def passes(who: Instance, source: str, mac: str | None = None) -> bool:
            mark = f"from {source} of {who.port.instance} {mac}".encode()
            packet = udp(source, db.port.address, mark)
            who.send_frame(ethernet(db.port.mac, mac or who.port.mac, IP, packet))
            return spy.sees(mark, 0.5)

        assert passes(gate, "10.0.0.50"), "the control"
        for source in ("172.16.0.1", "172.16.5.9", "172.16.255.255", "10.9.0.255"):
            assert passes(gate, source), source
            assert not passes(cloud.instances["acme", "web"], source), source
        for source in ("172.15.255.255", "172.17.0.0", "10.9.1.0", "10.0.0.3"):
            assert not passes(gate, source), source
        assert not passes(gate, "172.16.0.1", "02:99:00:00:00:01")
        gate.send_frame(announcement(gate.port.mac, "172.16.0.1"))
        assert not spy.sees(socket.inet_aton("172.16.0.1") * 1), "no range is announced"
        assert problems(cloud) == []
        cloud.apply("acme")
        assert passes(gate, "172.16.0.2"), "it is as before"
        cloud.unplug(gate)
        assert ranges(cloud) == 0


def ranges(cloud: Lab) -> int:
    namespace = cloud.fabric._tenant(cloud.tenants["acme"])
    sets = ("ranges4", "ranges6")
    return sum(len(maps.read(namespace._nftables, "bridge", "lab", name)) for name in sets)


def announcement(mac: str, address: str) -> bytes:
    """A gratuitous ARP request (RFC 5227)."""
    return ethernet(BROADCAST, mac, ARP, arp(1, mac, address, "00:00:00:00:00:00", address))


@isolated
def test_an_address_with_its_own_mac_moves_with_who_announces_it() -> None:
    """As VRRP has it: both may have it, and frames to it go to the one that has sent from it last."""
    with two_tenants() as cloud:
        pair = allow(f"10.0.0.100@{VIRTUAL}")
        one = cloud.instance("acme", "one", host=51, pairs=pair)
        two = cloud.instance("acme", "two", host=52, pairs=pair)
        db = cloud.instances["acme", "db"]
        cloud.apply("acme")
        spies = {"one": one.sniffer(), "two": two.sniffer()}
        for number, master in enumerate(("one", "two", "one")):
            announcing = cloud.instances["acme", master]
            announcing.send_frame(announcement(VIRTUAL, "10.0.0.100"))
            mark = f"to the master {number}".encode()
            db.send_frame(ethernet(VIRTUAL, db.port.mac, IP, udp(db.port.address, "10.0.0.100", mark)))
            assert [name for name, spy in spies.items() if spy.sees(mark, 0.5)] == [master]
        assert problems(cloud) == []


@isolated
def test_nobody_else_moves_it() -> None:
    with two_tenants() as cloud:
        one = cloud.instance("acme", "one", host=51, pairs=allow(f"10.0.0.100@{VIRTUAL}"))
        web, db = cloud.instances["acme", "web"], cloud.instances["acme", "db"]
        spies = {"one": one.sniffer(), "web": web.sniffer()}
        one.send_frame(announcement(VIRTUAL, "10.0.0.100"))
        web.send_frame(announcement(VIRTUAL, "10.0.0.100"))
        one.send_frame(announcement(db.port.mac, "10.0.0.100"))  # nor does it take others
        mark = b"to the only one"
        db.send_frame(ethernet(VIRTUAL, db.port.mac, IP, udp(db.port.address, "10.0.0.100", mark)))
        assert [name for name, spy in spies.items() if spy.sees(mark, 0.5)] == ["one"]
        assert web.pings("10.0.0.3"), "and db is where it was"
        namespace = cloud.fabric._tenant(cloud.tenants["acme"])
        learning = {link.name for link in namespace.rtnl.links() if link.learning and link.name.startswith("p")}
        assert learning == {naming.port(one.port.index)}


@isolated
def test_the_address_of_a_neighbour_stays_with_it() -> None:
    """Whoever is allowed another's address may announce it; the router does not follow."""
    with two_tenants() as cloud:
        gate = cloud.instance("acme", "gate", host=50, pairs=allow("10.0.0.3"))
        cloud.apply("acme")
        takes(gate, "10.0.0.3/24")
        with call_in(cloud.inside("acme"), Rtnl) as router:
            found = {n.address: n.mac for n in router.neighbours(socket.AF_INET) if n.permanent}
        assert found["10.0.0.3"] == cloud.instances["acme", "db"].port.mac
        assert problems(cloud) == []
