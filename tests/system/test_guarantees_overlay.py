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
from insula.network.linux.guarantees.control import OverlayFlow, ReceivingHost, decide, offered_by
from tests.support.hosts import Cloud, Host
from tests.support.lab import isolated
from tests.support.load import rates, sink, tcp, udp
from tests.support.wait import until

LINK, MBIT, SINK = 100_000_000, 1_000_000, 7000
CUBIC = "cubic"
"""BBR does not slow down when packets are lost."""


def floor(mbit: int | None, ceiling: int | None = None, incoming: int | None = None) -> Shaping:
    rate = Rate(floor=mbit * MBIT if mbit else None, ceiling=ceiling)
    return Shaping(link=LINK, out=rate, in_=Rate(floor=(incoming or mbit or 0) * MBIT or None))


def switch_port_of(host: Host) -> None:
    """Make the switch's port to a host a queue of its own, as wide as the link: it drops what does not fit, whose ever
    it is."""
    with Rtnl() as middle:
        index = middle.index(f"to{host.number}")
        assert index is not None
        middle.execute(tc.set_tbf(index, LINK, 64 << 10, 1 << 20))


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


def queue(cloud: Cloud, host: Host, tenant: str) -> ClassCounters:
    """The queue of what a tenant sends from a host."""

    def read() -> ClassCounters:
        with Rtnl() as rtnl:
            index = rtnl.index(host.fabric.shaper.device("out"))
            assert index is not None
            return tc.class_counters(rtnl, index)[tree.rest(cloud.tenants[tenant].index)]

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


@isolated
def test_the_receiver_s_floor_holds_against_tcp_and_with_the_loop_against_a_flood() -> None:
    """acme has one connection from host 1 to 3; globex floods host 3 from host 2, with ten times what fits."""
    cloud = two_tenants(count=3)
    one, two, three = cloud.hosts
    for name, host in (("acme", 1), ("globex", 2)):
        cloud.instance(name, "a", host)
        cloud.instance(name, "b", 3)
        cloud.apply(name, shaping=floor(60 if name == "acme" else None))
    switch_port_of(three)
    acme, globex = (cloud.instances[name, "a"] for name in ("acme", "globex"))
    targets = {name: cloud.instances[name, "b"] for name in ("acme", "globex")}
    with contextlib.ExitStack() as load:
        for each in targets.values():
            load.enter_context(sink(each.netns, SINK))
        load.enter_context(tcp(acme.netns, targets["acme"].port.address, SINK, control=CUBIC))
        with tcp(globex.netns, targets["globex"].port.address, SINK, connections=8, control=CUBIC):
            _holds(cloud, three)
        load.enter_context(udp(globex.netns, targets["globex"].port.address, SINK))
        caps = _loop(cloud, {"globex": two, "acme": one}, three, rounds=8)
        assert OverlayFlow("globex", "2", "3") in caps
        _holds(cloud, three)


def _holds(cloud: Cloud, receiver: Host) -> None:
    """Wait until acme has its floor at the receiver over two seconds: TCP has to find out first what it can send."""

    def holds() -> bool:
        found = rates(lambda: counters(cloud, receiver, "in"), 2, settle=0)
        assert found["acme"] >= 60 * MBIT * 0.95, found
        return True

    until(holds, "the floor holds", timeout=10)


def _loop(cloud: Cloud, senders: Mapping[str, Host], receiver: Host, rounds: int) -> dict[OverlayFlow, int]:
    """Run the loop some times: measure at the senders, decide, and set ceilings there."""
    caps: dict[OverlayFlow, int] = {}
    flows = {name: OverlayFlow(name, str(host.number), str(receiver.number)) for name, host in senders.items()}
    known = {str(receiver.number): ReceivingHost(LINK, {"acme": 60 * MBIT})}

    def count() -> dict[str, ClassCounters]:
        return {name: queue(cloud, host, name) for name, host in senders.items()}

    for _ in range(rounds):
        began, before = time.monotonic(), count()
        time.sleep(0.3)
        after, took = count(), time.monotonic() - began
        caps = decide(caps, {flows[n]: offered_by(before[n], after[n], took) for n in flows}, known)
        for name, host in senders.items():
            mbit = 60 if name == "acme" else None
            cloud.apply(name, [host], shaping=floor(mbit, caps.get(flows[name])))
    return caps
