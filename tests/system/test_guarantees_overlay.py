"""Floors on the overlay: three hosts, of which two send to the third, whose port of the switch is a plain queue."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from insula.kernel.netlink import Rtnl
from insula.kernel.netlink import traffic_control as tc
from insula.kernel.netlink.traffic_control import ClassCounters
from insula.kernel.netns import call_in
from insula.model.guarantees import Rate, Shaping
from insula.network.linux.guarantees import overlay, tree
from tests.support.hosts import Cloud, Host
from tests.support.lab import isolated
from tests.support.load import rates, sink, tcp, udp
from tests.support.overload import Controls, switch_port_of
from tests.support.wait import until

LINK, MBIT, SINK = 100_000_000, 1_000_000, 7000
CUBIC = "cubic"
"""BBR does not slow down when packets are lost."""


def floor(mbit: int | None, ceiling: int | None = None, incoming: int | None = None) -> Shaping:
    rate = Rate(floor=mbit * MBIT if mbit else None, ceiling=ceiling)
    return Shaping(link=LINK, out=rate, in_=Rate(floor=(incoming or mbit or 0) * MBIT or None))


def counters(cloud: Cloud, host: Host, direction: str) -> dict[str, int]:
    """Bytes on the wire of each tenant at a host."""

    def read() -> dict[str, int]:
        with Rtnl() as rtnl:
            found = {}
            for name, tenant in cloud.tenants.items():
                counted = host.fabric.shaper.counters(rtnl, tenant.index)
                found[name] = counted[direction].bytes if direction in counted else 0
            return found

    return host.do(read)


def two_tenants(version: int = 4, count: int = 2) -> Cloud:
    cloud = Cloud(count, version)
    for name in ("acme", "globex"):
        cloud.tenant(name)
        cloud.network(name)
    return cloud


@pytest.mark.parametrize("version", [4, 6])
def test_floors_of_senders_hold_in_bytes_on_the_wire(version: int) -> None:
    @isolated
    def test() -> None:
        cloud = two_tenants(version)
        for name, mbit in (("acme", 60), ("globex", 20)):
            cloud.instance(name, "a", 1)
            cloud.instance(name, "b", 2)
            cloud.apply(name, shaping=floor(mbit))
        with contextlib.ExitStack() as load:
            for name, connections in (("acme", 1), ("globex", 8)):
                here, there = cloud.instances[name, "a"], cloud.instances[name, "b"]
                load.enter_context(sink(there.netns, SINK))
                load.enter_context(tcp(here.netns, there.port.address, SINK, connections=connections))
            one, two = cloud.hosts
            sent = rates(lambda: counters(cloud, one, "out"), 3)
            assert sent["acme"] >= 60 * MBIT * 0.97, sent
            assert sent["globex"] >= 20 * MBIT * 0.97, sent
            assert sum(sent.values()) <= LINK * 0.97, sent
            arrived = rates(lambda: counters(cloud, two, "in"), 1, settle=0)
            assert arrived["acme"] > 0, "the receiver counts them too"

            accounted, wire = counters(cloud, one, "out"), _sent(one)
            time.sleep(2)
            accounted = {name: each - accounted[name] for name, each in counters(cloud, one, "out").items()}
            # the device counts the headers of what it segments later once
            assert 1.0 <= sum(accounted.values()) / (_sent(one) - wire) <= 1.12, "outer headers count"
        assert cloud.drift() == []
        for name in cloud.tenants:
            cloud.apply(name)
        with call_in(one.netns, Rtnl) as rtnl:
            assert rtnl.index("h1-out") is None
            wan = rtnl.index("wan")
            assert wan is not None
            assert tc.u32_redirections(rtnl, wan, tc.EGRESS, overlay.PRIORITIES["out"]) == []
        assert cloud.instances["acme", "a"].pings(cloud.instances["acme", "b"].port.address)

    test()


def _sent(host: Host) -> int:
    """Bytes that the underlay device has sent."""
    text = host.do(Path("/proc/thread-self/net/dev").read_text)
    fields = next(line for line in text.splitlines() if "wan:" in line).split(":")[1].split()
    return int(fields[8])


@pytest.mark.parametrize("flood", ["udp", "cubic", "reno", "bbr"])
def test_the_receiver_s_floor_holds_and_a_flood_is_limited_where_it_is_sent(flood: str) -> None:
    """acme has one connection from host 1 to 3; globex sends ten times what fits from host 2 to 3."""

    @isolated
    def test() -> None:
        cloud = two_tenants(count=3)
        one, two, three = cloud.hosts
        for name, host in (("acme", one), ("globex", two)):
            cloud.instance(name, "a", host.number)
            cloud.instance(name, "b", 3)
            cloud.apply(name, shaping=floor(60 if name == "acme" else None))
        switch_port_of(three, LINK)
        acme, globex = (cloud.instances[name, "a"] for name in ("acme", "globex"))
        to = {name: cloud.instances[name, "b"].port.address for name in ("acme", "globex")}
        with contextlib.ExitStack() as load:
            for name in cloud.tenants:
                load.enter_context(sink(cloud.instances[name, "b"].netns, SINK))
            load.enter_context(tcp(acme.netns, to["acme"], SINK, control=CUBIC))
            flooding = (
                udp(globex.netns, to["globex"], SINK)
                if flood == "udp"
                else tcp(globex.netns, to["globex"], SINK, connections=8, control=flood)
            )
            load.enter_context(flooding)
            controls = Controls(cloud)
            _holds(cloud, three)
            index = {name: tenant.index for name, tenant in cloud.tenants.items()}
            told = controls.of[three.address]
            if flood == "udp":
                until(lambda: MBIT <= told.ceilings.get(index["globex"], 0) <= 60 * MBIT, "what globex is told")
                until(lambda: _dropped(two) > 0, "it is limited where it is sent")
                assert cloud.drift() == []
        if flood == "udp":
            until(lambda: not told.ceilings, "ceilings go when there is no flood any more")
            until(lambda: not any(tree.is_destination(n) for n in _classes(two)), "and their classes")

    test()


@pytest.mark.parametrize("version", [4, 6])
def test_a_ceiling_for_a_host_is_about_packets_to_it_and_ends(version: int) -> None:
    @isolated
    def test() -> None:
        cloud = Cloud(3, version)
        acme = cloud.tenant("acme")
        cloud.network("acme")
        for number, name in enumerate("abc", 1):
            cloud.instance("acme", name, number)
        cloud.apply("acme", shaping=floor(60))
        one, two, three = cloud.hosts
        a, b, c = (cloud.instances["acme", name] for name in "abc")

        def limited() -> dict[int, int]:
            return {n: each.packets for n, each in _classes(one).items() if tree.is_destination(n)}

        one.fabric.limit_senders(two.address, {acme.index: 10 * MBIT, 99: MBIT})
        one.fabric.limit_senders(three.address, {acme.index: 20 * MBIT})
        assert len(limited()) == 2, "of a tenant that isn't here there is none"
        assert b.pings(a.port.address)
        assert sorted(limited().values())[0] == 0, "host 3 got nothing"
        assert sorted(limited().values())[1] > 0
        assert cloud.drift() == []
        one.fabric.limit_senders(three.address, {})
        cloud.network("acme", "10.0.1.0/24", "fd01::/64", name="more")
        cloud.apply("acme", shaping=floor(50))
        assert len(limited()) == 1, "an intent leaves it alone"
        controls = Controls(cloud)
        controls.call(controls.of[one.address].limit(three.address, {acme.index: 20 * MBIT}))
        assert len(limited()) == 2
        until(lambda: len(limited()) == 1, "it ends, as the receiver doesn't tell it again")
        one.do(one.fabric.close)
        one.start()
        cloud.apply("acme", shaping=floor(50))
        assert limited() == {}, "the next daemon removes what it finds"
        one.fabric.limit_senders(two.address, {acme.index: 10 * MBIT})
        cloud.apply("acme")
        assert a.pings(b.port.address)
        assert a.pings(c.port.address)

    test()


def _dropped(sender: Host) -> int:
    """How many packets were dropped by ceilings for other hosts."""
    return sum(each.drops for number, each in _classes(sender).items() if tree.is_destination(number))


def _classes(host: Host) -> Mapping[int, ClassCounters]:
    """The classes of what a host sends."""

    def read() -> Mapping[int, ClassCounters]:
        with Rtnl() as rtnl:
            index = rtnl.index(host.fabric.shaper.device("out"))
            assert index is not None
            return tc.class_counters(rtnl, index)

    return host.do(read)


def _holds(cloud: Cloud, receiver: Host) -> None:
    """Wait until acme has its floor at the receiver over two seconds: TCP has to find out first what it can send."""

    def holds() -> bool:
        found = rates(lambda: counters(cloud, receiver, "in"), 2, settle=0)
        assert found["acme"] >= 60 * MBIT * 0.95, found
        return True

    until(holds, "the floor holds", timeout=10)
