"""Load balancers of the linux fabric: shares, affinity, losses, and hairpin."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Sequence

from insula.network.intent import BalancerIntent, BalancerListener, FloatingIntent, OutsideIntent
from tests.support.external import alive, answers, asks, connection, echoes, refuses, refuses_datagrams, tells
from tests.support.lab import SOON, Lab, World, isolated

SHORT = 0.3
VIP, VIP6, FLOATING = "10.0.0.200", "fd00::200", "203.0.113.77"


def lab_with(backends: int) -> Lab:
    lab = Lab()
    lab.tenant("acme")
    lab.network("acme", subnet6="fd00::/64")
    for number in range(backends):
        tells(lab.instance("acme", f"b{number}"), 80, name=f"b{number}")
    lab.instance("acme", "client")
    return lab


def balance(
    lab: Lab,
    listeners: Sequence[BalancerListener],
    backends: Sequence[str],
    affinity: bool = False,
    floating: Sequence[FloatingIntent] = (),
    port: int = 80,
) -> None:
    ports = [lab.instances["acme", name].port for name in backends]
    addresses = [(a, port) for each in ports for a in (each.address, each.address6) if a]
    balancer = BalancerIntent(index=7, listeners=listeners, backends=addresses, affinity=affinity)
    lab.apply("acme", outside=OutsideIntent(balancers=[balancer], floating=floating))


INTERNAL = [BalancerListener(address=each, port=80, network="net") for each in (VIP, VIP6)]
NAMES = ("b0", "b1", "b2", "b3")


def shares(netns: int, address: str, count: int = 60) -> Counter[str]:
    return Counter(answers(netns, address, 80).split()[0] for _ in range(count))


@isolated
def test_an_internal_address_spreads_connections_and_keeps_the_client() -> None:
    lab = lab_with(4)
    client = lab.instances["acme", "client"]
    balance(lab, INTERNAL, NAMES)
    for address, own in ((VIP, client.port.address), (VIP6, client.port.address6)):
        found = shares(client.netns, address)
        assert set(found) == set(NAMES), found
        assert answers(client.netns, address, 80).split()[1] == own
        assert answers(client.netns, address, 81, SHORT) == ""
    balance(lab, INTERNAL, NAMES[:3])
    assert set(shares(client.netns, VIP)) == set(NAMES[:3])
    lab.apply("acme")
    assert answers(client.netns, VIP, 80, SHORT) == "" and answers(client.netns, VIP6, 80, SHORT) == ""


@isolated
def test_a_backend_reaches_itself_through_the_balancer() -> None:
    lab = lab_with(1)
    balance(lab, INTERNAL, ["b0"])
    for address in (VIP, VIP6):
        assert answers(lab.instances["acme", "b0"].netns, address, 80).startswith("b0")


@isolated
def test_from_outside_by_the_host_and_by_a_floating_address() -> None:
    world, lab = World(), lab_with(2)
    listeners = [BalancerListener(address=None, port=80), BalancerListener(address=FLOATING, port=80)]
    balance(lab, listeners, NAMES[:2], floating=[FloatingIntent(address=FLOATING)])
    outside, client = world.instance.netns, lab.instances["acme", "client"]
    for address, own in ((World.HOST, World.ADDRESS), (World.HOST6, World.ADDRESS6), (FLOATING, World.ADDRESS)):
        assert set(shares(outside, address, 40)) == {"b0", "b1"}, address
        assert answers(outside, address, 80).split()[1] == own
        assert set(shares(client.netns, address, 40)) == {"b0", "b1"}, address


@isolated
def test_affinity_sends_a_client_to_one_backend_while_that_is_healthy() -> None:
    lab = lab_with(4)
    client = lab.instances["acme", "client"]
    balance(lab, INTERNAL, NAMES, affinity=True)
    (only,) = shares(client.netns, VIP, 20)
    balance(lab, INTERNAL, [each for each in NAMES if each != only], affinity=True)
    (other,) = shares(client.netns, VIP, 20)
    assert other != only
    balance(lab, INTERNAL, NAMES, affinity=True)
    assert set(shares(client.netns, VIP, 20)) == {only}


@isolated
def test_open_connections_stay_with_their_backends() -> None:
    lab = lab_with(3)
    client = lab.instances["acme", "client"]
    for name in NAMES[:3]:
        echoes(lab.instances["acme", name], 7)
    listener = [BalancerListener(address=VIP, port=80, network="net")]
    balance(lab, listener, NAMES[:3], port=7)
    open_ = [connection(client.netns, VIP, 80) for _ in range(12)]
    assert all(map(alive, open_))
    balance(lab, listener, NAMES[:2], port=7)
    assert all(map(alive, open_)), "also those to the backend that gets no new ones"


@isolated
def test_without_a_backend_connections_are_refused_at_once() -> None:
    world, lab = World(), lab_with(1)
    outside, client, b0 = world.instance.netns, lab.instances["acme", "client"].netns, lab.instances["acme", "b0"].netns
    tells(lab.instances["acme", "b0"], 80, udp=True)
    listeners = [
        *(BalancerListener(address=None, port=80, protocol=each) for each in ("tcp", "udp")),
        *(BalancerListener(address=FLOATING, port=80, protocol=each) for each in ("tcp", "udp")),
        *(BalancerListener(address=a, port=80, protocol=p, network="net") for a in (VIP, VIP6) for p in ("tcp", "udp")),
    ]
    reached = [(outside, each) for each in (World.HOST, World.HOST6, FLOATING)]
    reached += [(netns, each) for netns in (client, b0) for each in (World.HOST, World.HOST6, FLOATING, VIP, VIP6)]
    floating = [FloatingIntent(address=FLOATING)]
    balance(lab, listeners, ["b0"], floating=floating)
    for netns, address in reached:
        assert answers(netns, address, 80) and asks(netns, address, 80), address
    balance(lab, listeners, [], floating=floating)
    for netns, address in reached:
        place = f"{address} from {(outside, client, b0).index(netns)}"
        assert refuses(netns, address, 80) and refuses_datagrams(netns, address, 80), place
    balance(lab, listeners, [], affinity=True, floating=floating)
    for netns, address in reached:
        assert refuses(netns, address, 80), address
    assert not refuses(outside, FLOATING, 81, timeout=SHORT), "the control: nothing is heard of other ports"


@isolated
def test_datagrams_are_spread_and_go_to_another_backend_when_theirs_is_gone() -> None:
    world, lab = World(), lab_with(2)
    client, outside = lab.instances["acme", "client"], world.instance
    for name in NAMES[:2]:
        tells(lab.instances["acme", name], 53, udp=True, name=name)
    listeners = [
        BalancerListener(address=None, port=53, protocol="udp"),
        *(BalancerListener(address=each, port=53, protocol="udp", network="net") for each in (VIP, VIP6)),
    ]
    places = [(outside, World.HOST), (outside, World.HOST6), (client, VIP), (client, VIP6)]
    for who, address in places:
        balance(lab, listeners, NAMES[:2], port=53)
        assert {asks(who.netns, address, 53).split()[0] for _ in range(30)} == {"b0", "b1"}, address
        own = {World.HOST: World.ADDRESS, World.HOST6: World.ADDRESS6, VIP: client.port.address}
        assert asks(who.netns, address, 53).split()[1] == own.get(address, client.port.address6)
        balance(lab, listeners, NAMES[:2], port=53, affinity=True)
        with who.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as sock:
            first = told(sock, address)
            assert {told(sock, address), *(asks(who.netns, address, 53).split()[0] for _ in range(10))} == {first}
            balance(lab, listeners, [each for each in NAMES[:2] if each != first], port=53, affinity=True)
            assert {first, told(sock, address)} == {"b0", "b1"}, "the same socket, from the same port"


def told(sock: socket.socket, address: str) -> str:
    """Who answers a datagram, which is sent again while nobody does."""
    sock.settimeout(SOON / 4)
    for _ in range(8):
        try:
            sock.sendto(b"who am I?", (address, 53))
            return sock.recv(2048).decode().split()[0]
        except TimeoutError:
            continue
    return ""
