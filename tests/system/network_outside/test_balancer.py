"""Load balancers of the linux fabric: shares, affinity, losses, and hairpin."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from insula.network.intent import BalancerIntent, BalancerListener, FloatingIntent, OutsideIntent
from tests.support.external import alive, answers, asks, connection, echoes, tells
from tests.support.lab import Lab, World, isolated

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
def test_datagrams_go_to_another_backend_when_theirs_is_gone() -> None:
    lab = lab_with(2)
    client = lab.instances["acme", "client"]
    for name in NAMES[:2]:
        tells(lab.instances["acme", name], 53, udp=True, name=name)
    listener = [BalancerListener(address=VIP, port=53, protocol="udp", network="net")]
    balance(lab, listener, NAMES[:2], port=53, affinity=True)
    first = asks(client.netns, VIP, 53).split()[0]
    balance(lab, listener, [each for each in NAMES[:2] if each != first], port=53, affinity=True)
    second = asks(client.netns, VIP, 53).split()[0]
    assert {first, second} == {"b0", "b1"}
