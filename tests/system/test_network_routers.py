"""Routers: which networks reach each other, with packets. Two tenants have the same addresses at the same time."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import socket
import struct
import subprocess
from functools import partial
from typing import Any

import msgspec

from insula.kernel.netlink import Rtnl
from insula.kernel.netlink.nftables import NftablesSocket
from insula.kernel.netns import call_in
from insula.kernel.nftables import Nft
from insula.model.objects import Network
from insula.network.addresses import gateway_mac, link_local
from insula.network.dhcp.frames import icmpv6
from insula.network.linux import naming, routing
from insula.network.packets import checksum, frame, ip_packet
from insula.network.proof.prover import Prover
from tests.support.lab import Instance, Lab, World, isolated, query

SHORT = 0.3  # seconds that are waited for what should not come
FOUR, SIX = "10.{}.0.0/24", "fd00:{}::/64"


def networks(lab: Lab, tenant: str, count: int = 3) -> list[Instance]:
    """A tenant with networks n1, n2, …, and an instance on each at .2 and ::2."""
    lab.tenant(tenant)
    for number in range(1, count + 1):
        lab.network(tenant, FOUR.format(number), SIX.format(number), name=f"n{number}")
    return [lab.instance(tenant, f"i{number}", f"n{number}", 2) for number in range(1, count + 1)]


def addresses(number: int, host: int = 2) -> tuple[str, str]:
    return f"10.{number}.0.{host}", f"fd00:{number}::{host}"


def reaches(instance: Instance, number: int, *, timeout: float) -> set[str]:
    """The ways by which an instance reaches the one on network `number`: icmp4, icmp6, tcp4, tcp6."""
    found = set()
    for version, address in zip("46", addresses(number), strict=True):
        if instance.pings(address, timeout):
            found.add(f"icmp{version}")
        if instance.connects(address, 80, timeout):
            found.add(f"tcp{version}")
    return found


ALL = {"icmp4", "icmp6", "tcp4", "tcp6"}


@isolated
def test_networks_are_apart_until_a_router_joins_them() -> None:
    lab = Lab()
    for tenant in ("acme", "globex"):
        for instance in networks(lab, tenant):
            instance.serves(tenant, 80)
    one, three = lab.instances["acme", "i1"], lab.instances["acme", "i3"]
    assert reaches(one, 2, timeout=SHORT) == set()
    lab.router("acme", "n1", "n2")
    assert reaches(one, 2, timeout=5) == ALL
    assert reaches(lab.instances["acme", "i2"], 1, timeout=5) == ALL
    assert one.connects("10.2.0.2", 80) == "acme", "the other tenant has the same addresses"
    assert reaches(one, 3, timeout=SHORT) == reaches(three, 1, timeout=SHORT) == set(), "n3 is apart"
    assert reaches(lab.instances["globex", "i1"], 2, timeout=SHORT) == set(), "so are those of the other tenant"
    lab.router("acme", "n1", "n2", "n3")
    assert reaches(one, 3, timeout=5) == reaches(three, 2, timeout=5) == ALL
    lab.router("acme")
    assert reaches(one, 2, timeout=SHORT) == set()


@isolated
def test_gateways_of_joined_networks_answer_pings_and_nothing_else() -> None:
    lab = Lab()
    one, *_ = networks(lab, "acme")
    lab.router("acme", "n1", "n2")
    for near, far, apart in zip(addresses(1, 1), addresses(2, 1), addresses(3, 1), strict=True):
        assert one.pings(near) and one.pings(far)
        assert not one.pings(apart, SHORT)
        assert asks(one, near) and not asks(one, far, SHORT), "the resolver answers at the own gateway only"


def asks(instance: Instance, server: str, timeout: float = 5) -> bool:
    return query(instance.netns, server, "i1", timeout=timeout) is not None


@isolated
def test_names_are_those_of_the_whole_tenant() -> None:
    lab = Lab()
    for tenant in ("acme", "globex"):
        networks(lab, tenant)
    lab.router("acme", "n1", "n2")
    for tenant, number in itertools.product(("acme", "globex"), (1, 2, 3)):
        asking = lab.instances[tenant, f"i{number}"]
        for gateway in addresses(number, 1):
            for name in ("i2", f"i2.{tenant}.internal"):
                assert query(asking.netns, gateway, name) == (0, ["10.2.0.2"])
                assert query(asking.netns, gateway, name, 28) == (0, ["fd00:2::2"])
    assert query(lab.instances["acme", "i1"].netns, "10.1.0.1", "i2.globex.internal") == (3, [])


@isolated
def test_a_router_decrements_ttl_and_tells_when_it_is_exceeded() -> None:
    lab = Lab()
    one, *_ = networks(lab, "acme")
    lab.router("acme", "n1", "n2")
    for version, gateway, there in zip((4, 6), addresses(1, 1), addresses(2), strict=True):
        assert exceeded_at(one, there, version, 1) == gateway
        assert exceeded_at(one, there, version, 2) is None, "two hops are enough"


def exceeded_at(instance: Instance, address: str, version: int, ttl: int) -> str | None:
    """The router that reports that the TTL of a UDP packet was exceeded; None if it arrives (port unreachable)."""
    family = socket.AF_INET6 if version == 6 else socket.AF_INET
    with instance.socket(family, socket.SOCK_DGRAM) as sock:
        level, hops, errors = (41, 16, 25) if version == 6 else (0, 2, 11)
        sock.setsockopt(level, hops, ttl)
        sock.setsockopt(level, errors, 1)
        sock.settimeout(5)
        sock.connect((address, 33434))
        sock.send(b"x")
        with contextlib.suppress(OSError):
            sock.recv(100)
        _, ancillary, _, _ = sock.recvmsg(512, 512, 0x2000)  # MSG_ERRQUEUE
        data = ancillary[0][2]
        _, origin, kind, _ = struct.unpack_from("=IBBB", data)
        if (origin, kind) not in ((2, 11), (3, 3)):
            return None
        offender = data[16:]
        return socket.inet_ntop(family, offender[4:8] if version == 4 else offender[8:24])


def connection(client: Instance, address: str, port: int) -> socket.socket:
    """An open connection to a server that repeats what it gets."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = client.socket(family, socket.SOCK_STREAM)
    sock.settimeout(10)
    sock.connect((address, port))
    return sock


def repeats(instance: Instance, port: int) -> None:
    """A TCP server that sends back what it gets, in a process of its own."""
    with instance.socket(socket.AF_INET6, socket.SOCK_STREAM) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("", port))
        server.listen(64)
        if os.fork() == 0:
            while True:
                accepted, _ = server.accept()
                if os.fork() == 0:
                    with contextlib.suppress(OSError):
                        while data := accepted.recv(65536):
                            accepted.sendall(data)
                    os._exit(0)
                accepted.close()


def is_alive(sock: socket.socket, timeout: float = 5) -> bool:
    token = os.urandom(8)
    sock.settimeout(timeout)
    try:
        sock.sendall(token)
        return sock.recv(8) == token
    except OSError:
        return False


@isolated
def test_leaving_cuts_open_connections_and_no_others() -> None:
    lab = Lab()
    one, two, three = networks(lab, "acme")
    for each in (two, three):
        repeats(each, 80)
    other = networks(lab, "globex", 2)
    repeats(other[1], 80)
    for tenant in ("acme", "globex"):
        lab.router(tenant, *[name for owner, name in lab.networks if owner == tenant])
    cut = [connection(one, address, 80) for address in addresses(2)]
    kept = [connection(one, address, 80) for address in addresses(3)]
    kept += [connection(other[0], address, 80) for address in addresses(2)]
    assert all(map(is_alive, cut + kept))
    lab.router("acme", "n1", "n3")
    assert all(map(is_alive, kept)), "others go on"
    assert not any(is_alive(sock, SHORT) for sock in cut), "those with n2 have ended"
    assert all(map(is_alive, kept))
    lab.router("acme", "n1", "n2", "n3")
    assert is_alive(connection(one, "10.2.0.2", 80)), "after joining again new ones work"


@isolated
def test_an_instance_keeps_its_own_addresses_beyond_a_router() -> None:
    lab = Lab()
    one, two, _ = networks(lab, "acme")
    lab.router("acme", "n1", "n2", "n3")
    seen, other = two.sniffer(), two.sniffer()
    for forged in ("10.1.0.9", "10.3.0.2", "192.168.9.9"):
        one.send_frame(udp_frame(one, forged, "10.2.0.2", b"forged packet"))
    one.send_frame(udp_frame(one, "10.1.0.2", "10.2.0.2", b"honest packet"))
    assert seen.sees(b"honest packet", 5), "the positive control"
    assert not other.sees(b"forged packet")


def udp_frame(instance: Instance, source: str, target: str, payload: bytes) -> bytes:
    """A frame of an instance to its gateway."""
    return frame(gateway_mac(1), instance.port.mac, ip_packet("udp", source, target, payload))


@isolated
def test_random_joins_and_leaves_give_the_right_matrix() -> None:
    choose = random.Random(4)
    lab = Lab()
    for tenant in ("acme", "globex"):
        networks(lab, tenant, 4)
    names = ["n1", "n2", "n3", "n4"]
    for _ in range(6):
        parts: dict[tuple[str, str], set[str]] = {}
        for tenant in ("acme", "globex"):
            owner = {name: choose.choice(["r1", "r2", "apart"]) for name in names}
            for router in ("r1", "r2"):
                joined = [name for name in names if owner[name] == router]
                # a network leaves its router before it joins another one
                lab.routers.pop((tenant, router), None)
                parts[tenant, router] = set(joined)
            for router in ("r1", "r2"):
                lab.router(tenant, *parts[tenant, router], name=router)
        for tenant in ("acme", "globex"):
            for a, b in itertools.permutations(range(1, 5), 2):
                together = any(
                    {f"n{a}", f"n{b}"} <= joined for (owner_, _), joined in parts.items() if owner_ == tenant
                )
                got = [lab.instances[tenant, f"i{a}"].pings(to, 5 if together else 0.1) for to in addresses(b)]
                assert got == [together] * 2, (tenant, a, b, parts)


@isolated
def test_errors_about_connections_come_by_paths_only() -> None:
    """An ICMP error counts as related to the connection that it quotes, whoever sends it."""
    lab = Lab()
    one, two, three = networks(lab, "acme")
    lab.router("acme", "n1", "n2")
    repeats(two, 80)
    for version, there in enumerate(addresses(2)):
        sock = connection(one, there, 80)
        assert is_alive(sock)
        seen, other, ports = one.sniffer(), one.sniffer(), (sock.getsockname()[1], 80)
        for sender, payload in ((three, b"from afar"), (two, b"from the other end")):
            own = addresses(int(sender.port.network[1:]))[version]
            sender.send_frame(
                unreachable(sender, (own, addresses(1)[version]), (addresses(1)[version], there), ports, payload)
            )
        assert seen.sees(b"from the other end", 5), "the positive control"
        assert not other.sees(b"from afar")


def unreachable(
    sender: Instance, ends: tuple[str, str], about: tuple[str, str], ports: tuple[int, int], mark: bytes
) -> bytes:
    """A frame to the gateway with an ICMP error that quotes a TCP segment from one end of a connection to the other."""
    segment = struct.pack("!HHIIBBHHH", *ports, 1, 1, 5 << 4, 16, 100, 0, 0) + mark.ljust(24, b".")
    mac = gateway_mac(int(sender.port.network[1:]))
    packed = [socket.inet_pton(socket.AF_INET6 if ":" in each else socket.AF_INET, each) for each in (*ends, *about)]
    if len(packed[0]) == 16:
        quoted = struct.pack("!IHBB", 6 << 28, len(segment), 6, 64) + packed[2] + packed[3] + segment
        return icmpv6((sender.port.mac, mac), ends, struct.pack("!BBHI", 1, 0, 0, 0) + quoted)
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(segment), 1, 0, 64, 6, 0) + packed[2] + packed[3]
    quoted = head[:10] + struct.pack("!H", checksum(head)) + head[12:] + segment
    body = struct.pack("!BBHI", 3, 1, 0, 0) + quoted
    body = body[:2] + struct.pack("!H", checksum(body)) + body[4:]
    outer = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 1, 0, 64, 1, 0) + packed[0] + packed[1]
    return frame(mac, sender.port.mac, outer[:10] + struct.pack("!H", checksum(outer)) + outer[12:] + body)


@isolated
def test_many_networks_in_one_router_are_as_many_elements() -> None:
    """Not one for each pair of them, or a change of a hundred networks would take seconds."""
    lab = Lab()
    lab.tenant("acme")
    for number in range(1, 13):
        lab.network("acme", FOUR.format(number), SIX.format(number), name=f"n{number}")
    ends = [lab.instance("acme", f"i{number}", f"n{number}", 2) for number in (1, 2, 12)]
    for end in ends:
        end.serves("acme", 80)
    names = [name for _, name in lab.networks]

    def routed(*joined: str) -> int:
        lab.router("acme", *joined, routes={"172.16.0.0/16": "10.12.0.2"} if joined else None)
        inside = lab.inside("acme")
        with call_in(inside, NftablesSocket) as nftables:
            found = sum(len(nftables.keys("inet", "lab", name.split()[1])) for name in routing.SETS)
        with call_in(inside, Rtnl) as rtnl:
            found += len([each for each in rtnl.routes() if each.table > 255]) + len(rtnl.rules())
        os.close(inside)
        return found

    nothing = routed()
    six, twelve = routed(*names[6:]) - nothing, routed(*names) - nothing
    assert twelve < 2 * six
    assert [reaches(one, other, timeout=5) for one, other in zip(ends, (12, 1, 2), strict=True)] == [ALL] * 3
    routed(*names[1:])  # the router has another number without its first network
    assert reaches(ends[1], 12, timeout=5) == reaches(ends[2], 2, timeout=5) == ALL
    assert reaches(ends[0], 12, timeout=SHORT) == reaches(ends[2], 1, timeout=SHORT) == set()
    assert lab.fabric.installed(lab.tenants["acme"]).drift == []


# -- the way out -----------------------------------------------------------------------------------------------------


@isolated
def test_a_network_without_a_way_out_reaches_nothing_outside() -> None:
    world = World()
    world.tells_callers(80)
    lab = Lab()
    lab.tenant("acme")
    lab.network("acme", FOUR.format(1), SIX.format(1), name="n1")
    lab.network("acme", FOUR.format(2), SIX.format(2), name="n2", outbound="none")
    one, two = lab.instance("acme", "i1", "n1", 2), lab.instance("acme", "i2", "n2", 2)
    for address in (world.ADDRESS, world.ADDRESS6):
        assert one.connects(address, 80), "the positive control"
        assert not two.connects(address, 80, SHORT) and not two.pings(address, SHORT)
    lab.router("acme", "n1", "n2")
    assert two.pings("10.1.0.2") and not two.pings(world.ADDRESS, SHORT), "n1's way out is not that of n2"
    for pings in (two.pings("10.2.0.1"), two.pings("fd00:2::1")):
        assert pings
    lab.networks["acme", "n2"] = change(lab, "n2", outbound="nat")
    lab.apply("acme")
    assert two.connects(world.ADDRESS, 80) and two.connects(world.ADDRESS6, 80)


def change(lab: Lab, name: str, **fields: Any) -> Network:
    return msgspec.structs.replace(lab.networks["acme", name], **fields)


@isolated
def test_no_query_leaves_a_network_without_a_way_out() -> None:
    world = World()
    lab = Lab(resolvers=(world.ADDRESS,))
    names_server(world)
    one, two = networks(lab, "acme", 2)
    for version, gateway in zip((1, 28), addresses(1, 1), strict=True):
        assert query(one.netns, gateway, "example.test", version) == (0, ["198.51.100.7"] if version == 1 else []), (
            "the positive control"
        )
    lab.networks["acme", "n1"] = change(lab, "n1", outbound="none")
    lab.apply("acme")
    seen, other = world.instance.sniffer(), world.instance.sniffer()
    for gateway in addresses(1, 1):
        assert query(one.netns, gateway, "secret.test") == (3, []), "NXDOMAIN"
        assert query(one.netns, gateway, "i2") == query(one.netns, gateway, "i2.acme.internal") == (0, ["10.2.0.2"])
        assert query(one.netns, gateway, "i2", 28) == (0, ["fd00:2::2"])
        assert query(one.netns, gateway, "nobody.acme.internal") == (3, [])
    assert query(two.netns, "10.2.0.1", "secreter.test")
    assert seen.sees(b"secreter", 5) and not other.sees(b"\x06secret\x04"), "that of n2 has left"
    lab.instance("acme", "late", "n2", 9)
    assert query(one.netns, "10.1.0.1", "late") == (0, ["10.2.0.9"]), "new names are known as well"
    lab.networks["acme", "n1"] = change(lab, "n1", outbound="nat")
    lab.apply("acme")
    assert query(one.netns, "10.1.0.1", "example.test") == (0, ["198.51.100.7"])


def names_server(world: World) -> None:
    """A name server outside that knows 198.51.100.7 for each name, in a process of its own."""
    with world.instance.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("", 53))
        if os.fork() == 0:
            while True:
                asked, sender = server.recvfrom(512)
                end = asked.index(b"\0", 12) + 5
                kind = asked[end - 4 : end - 2]
                answer = b"\xc0\x0c\0\1\0\1\0\0\0\1\0\4" + socket.inet_aton("198.51.100.7") if kind == b"\0\1" else b""
                count = b"\0\1" if answer else b"\0\0"
                server.sendto(asked[:2] + b"\x81\x80\0\1" + count + b"\0\0\0\0" + asked[12:end] + answer, sender)


@isolated
def test_taking_the_way_out_cuts_open_connections() -> None:
    world = World()
    repeats(world.instance, 80)
    lab = Lab()
    one, two = networks(lab, "acme", 2)
    cut = [connection(one, address, 80) for address in (world.ADDRESS, world.ADDRESS6)]
    kept = [connection(two, address, 80) for address in (world.ADDRESS, world.ADDRESS6)]
    assert all(map(is_alive, cut + kept))
    lab.networks["acme", "n1"] = change(lab, "n1", outbound="none")
    lab.apply("acme")
    assert all(map(is_alive, kept)) and not any(is_alive(sock, SHORT) for sock in cut)


# -- the proof -------------------------------------------------------------------------------------------------------


def findings(lab: Lab) -> list[str]:
    running = {instance.port.index for instance in lab.instances.values()}
    proven = Prover(lab.fabric).prove([lab.intent(tenant) for tenant in lab.tenants], running)
    return [finding.text for finding in proven.findings]


def know_link_locals(lab: Lab) -> None:
    """Have routers know the link-local addresses of instances, as when these have asked from there."""
    for (tenant, _), instance in lab.instances.items():
        bridge = naming.bridge(lab.networks[tenant, instance.port.network].index)
        own = link_local(instance.port.mac)
        command = ["ip", "neigh", "replace", own, "lladdr", instance.port.mac, "dev", bridge, "nud", "reachable"]
        call_in(lab.inside(tenant), partial(subprocess.run, command, check=True))


@isolated
def test_routers_routes_and_closed_networks_are_proven() -> None:
    lab = Lab()
    for tenant in ("acme", "globex"):
        networks(lab, tenant)
    lab.networks["acme", "n3"] = change(lab, "n3", outbound="none")
    lab.router("acme", "n1", "n3", routes={"172.16.0.0/12": "10.1.0.2", "fd20::/32": "fd00:1::2"})
    lab.router("globex", "n1", "n2", routes={"0.0.0.0/0": "10.2.0.2", "::/0": "fd00:2::2"})
    know_link_locals(lab)
    assert not (found := findings(lab)), "\n".join(found)
    one, two = (naming.bridge(lab.networks["acme", name].index) for name in ("n1", "n2"))
    inside = lab.inside("acme")
    with call_in(inside, Nft) as nft:
        nft.run(f"add element inet lab paths {{ {one} . {two} }}")
        assert any("acme/i1 can reach acme/i2" in text for text in findings(lab))
    os.close(inside)
