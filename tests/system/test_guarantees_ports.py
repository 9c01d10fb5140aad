"""Ceilings and floors of single instances: in both directions, TCP and UDP, in bits and in packets."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

from insula.kernel.netlink import Rtnl
from insula.kernel.netlink import traffic_control as tc
from insula.kernel.netns import call_in
from insula.model.guarantees import PortRates, Rate, Shaping
from insula.network.linux.guarantees import tree
from tests.support.lab import Lab, World, eventually, isolated
from tests.support.load import rates, sink, tcp, udp

LINK, MBIT, SINK = 100_000_000, 1_000_000, 7000
NOTHING = Rate()


def lab() -> Lab:
    """A tenant with the instances web, db and bulk."""
    made = Lab()
    made.tenant("acme")
    made.network("acme", subnet6="fd00::/64")
    for name in ("web", "db", "bulk"):
        made.instance("acme", name)
    return made


def shape(made: Lab, whole: Rate = NOTHING, link: int | None = None, **ports: Rate) -> None:
    """Shape the tenant, and instances by their names, the same in both directions."""
    found = {}
    for number, (name, rate) in enumerate(ports.items()):
        found[made.instances["acme", name].port.index] = PortRates(number=number, out=rate, in_=rate)
    made.apply("acme", shaping=Shaping(link=link, out=whole, in_=whole, ports=found))


def arrived(made: Lab, name: str) -> Callable[[], dict[str, int]]:
    """Bytes and packets that have arrived at an instance's device."""
    instance = made.instances["acme", name]

    def count() -> dict[str, int]:
        text = call_in(instance.netns, Path("/proc/thread-self/net/dev").read_text)
        fields = next(line for line in text.splitlines() if "eth0:" in line).split(":")[1].split()
        return {"bytes": int(fields[0]), "packets": int(fields[1])}

    return count


@isolated
def test_a_ceiling_holds_between_instances_too_in_both_directions() -> None:
    made = lab()
    web, db = made.instances["acme", "web"], made.instances["acme", "db"]
    with sink(db.netns, SINK), contextlib.ExitStack() as load:
        shape(made, web=Rate(ceiling=20 * MBIT))
        load.enter_context(tcp(web.netns, db.port.address, SINK))
        found = rates(arrived(made, "db"), 3)
        assert 14 * MBIT <= found["bytes"] <= 20.6 * MBIT, found
        load.enter_context(udp(web.netns, str(db.port.address6), SINK))
        found = rates(arrived(made, "db"), 2)
        assert 14 * MBIT <= found["bytes"] <= 20.6 * MBIT, found
    with sink(web.netns, SINK), udp(db.netns, web.port.address, SINK):
        found = rates(arrived(made, "web"), 2)
        assert 14 * MBIT <= found["bytes"] <= 20.6 * MBIT, found
        shape(made, web=Rate(ceiling=10 * MBIT))
        found = rates(arrived(made, "web"), 2)
        assert 7 * MBIT <= found["bytes"] <= 10.4 * MBIT, found
        shape(made)
        assert rates(arrived(made, "web"), 2)["bytes"] > 12 * MBIT, "without a ceiling it gets more"


@isolated
def test_packets_a_second_are_limited_in_both_directions() -> None:
    made = lab()
    web, db = made.instances["acme", "web"], made.instances["acme", "db"]
    shape(made, web=Rate(packets=500))
    with udp(web.netns, db.port.address, SINK, size=22):
        assert 0 < rates(arrived(made, "db"), 2)["packets"] / 8 <= 560
    with udp(db.netns, web.port.address, SINK, size=22):
        assert 0 < rates(arrived(made, "web"), 2)["packets"] / 8 <= 560
    shape(made)
    with udp(web.netns, db.port.address, SINK, size=22):
        eventually(lambda: rates(arrived(made, "db"), 1)["packets"] / 8 > 600)  # the control


@isolated
def test_an_instance_with_a_floor_gets_it_beside_others_of_its_tenant() -> None:
    """It has an address of its own on the uplink, in both directions and both versions of IP."""
    made, world = lab(), World()
    web, bulk = made.instances["acme", "web"], made.instances["acme", "bulk"]
    shape(made, Rate(floor=50 * MBIT, ceiling=50 * MBIT), LINK, web=Rate(floor=30 * MBIT))
    with Rtnl() as host, sink(world.instance.netns, SINK), contextlib.ExitStack() as load:
        index = {each: host.index(f"lab-{each}") for each in ("out", "in")}

        def count(direction: str) -> Callable[[], dict[str, int]]:
            device = index[direction]
            assert device is not None

            def read() -> dict[str, int]:
                counters = tc.class_counters(host, device)
                return {"web": counters[tree.instance(0)].bytes, "rest": counters[tree.rest(1)].bytes}

            return read

        load.enter_context(udp(bulk.netns, World.ADDRESS, SINK))
        load.enter_context(tcp(web.netns, World.ADDRESS6, SINK, connections=2))
        found = rates(count("out"), 3)
        assert found["web"] >= 30 * MBIT * 0.97, found
        assert sum(found.values()) <= 51 * MBIT, found
    with Rtnl() as host, sink(world.instance.netns, SINK), contextlib.ExitStack() as load:
        load.enter_context(tcp(bulk.netns, World.ADDRESS, SINK, connections=8, get=True))
        load.enter_context(tcp(web.netns, World.ADDRESS, SINK, get=True))
        found = rates(count("in"), 4)
        assert found["web"] >= 30 * MBIT * 0.9, found
    shape(made)
    assert web.pings(World.ADDRESS)
    assert web.pings(World.ADDRESS6)


@isolated
def test_rates_come_with_a_new_port_and_nothing_is_left() -> None:
    made = lab()
    web, db = made.instances["acme", "web"], made.instances["acme", "db"]
    shape(made, web=Rate(ceiling=20 * MBIT, packets=100_000))
    made.unplug(web)
    made.plug(web)
    with sink(web.netns, SINK), udp(db.netns, web.port.address, SINK):
        assert 14 * MBIT <= rates(arrived(made, "web"), 2)["bytes"] <= 20.6 * MBIT
    with udp(web.netns, db.port.address, SINK):
        assert 14 * MBIT <= rates(arrived(made, "db"), 2)["bytes"] <= 20.6 * MBIT
    made.apply("acme")
    with call_in(made.inside("acme"), Rtnl) as inside:
        assert inside.index("rates") is None
        assert {kind for _, kind in tc.kinds(inside)} <= {"noqueue", "pfifo_fast", "mq"}
    assert web.pings(db.port.address)
