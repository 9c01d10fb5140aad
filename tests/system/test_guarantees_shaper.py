"""Floors and ceilings of tenants on one host, measured in bytes on the wire: what their uplinks have carried."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import pytest

from insula.control.networks.admission import MOST_FLOORS
from insula.kernel import netlink
from insula.kernel.netlink import Rtnl
from insula.kernel.netlink import traffic_control as tc
from insula.kernel.netlink.traffic_control import ClassCounters
from insula.kernel.netns import call_in
from insula.kernel.nftables import Nft
from insula.model.guarantees import PortRates, Rate, Shaping
from insula.network.linux.fabric import LinuxFabric
from insula.network.linux.guarantees import program, tree
from tests.support.lab import Lab, World, isolated
from tests.support.load import rates, sink, tcp, udp

LINK = 100_000_000
FLOORS = (40, 20, 15, 10, 5)
SINK = 7000
MBIT = 1_000_000


class Tenants:
    """Tenants t1, t2 and so on, each with an instance `web` in the same subnet, and a world that they send to."""

    def __init__(self, count: int) -> None:
        self.lab, self.world = Lab(), World()
        self.host = Rtnl()
        for number in range(1, count + 1):
            name = f"t{number}"
            self.lab.tenant(name)
            self.lab.network(name, subnet6="fd00::/64")
            self.lab.instance(name, "web")

    def shape(self, name: str, shaping: Shaping | None) -> None:
        self.lab.apply(name, shaping=shaping)

    def netns(self, name: str) -> int:
        return self.lab.instances[name, "web"].netns

    def sent(self, direction: str = "out") -> dict[str, int]:
        """Bytes that have passed the tenants' classes."""
        found = {}
        for name, tenant in self.lab.tenants.items():
            counters = self.lab.fabric.shaper.counters(self.host, tenant.index)
            found[name] = counters[direction].bytes if direction in counters else 0
        return found


@contextlib.contextmanager
def tenants(count: int) -> Iterator[Tenants]:
    made = Tenants(count)
    with sink(made.world.instance.netns, SINK):
        yield made


def floor(mbit: int | None, link: int = LINK, ceiling: int | None = None) -> Shaping:
    rate = Rate(floor=mbit * MBIT if mbit else None, ceiling=ceiling)
    return Shaping(link=link, out=rate, in_=rate)


@pytest.mark.parametrize("direction", ["out", "in"])
def test_floors_hold_under_overload(direction: str) -> None:
    @isolated
    def test() -> None:
        """Also against eight connections of the tenant with the lowest floor."""
        with tenants(len(FLOORS)) as made, contextlib.ExitStack() as load:
            for number, mbit in enumerate(FLOORS, 1):
                made.shape(f"t{number}", floor(mbit))
            for number in range(1, len(FLOORS) + 1):
                connections = 8 if number == len(FLOORS) else 2
                netns, get = made.netns(f"t{number}"), direction == "in"
                load.enter_context(tcp(netns, World.ADDRESS, SINK, connections=connections, get=get))
            found = rates(lambda: made.sent(direction), 4)
            for number, mbit in enumerate(FLOORS, 1):
                assert found[f"t{number}"] >= mbit * MBIT * 0.97, found
            assert sum(found.values()) <= LINK * 0.97, found

    test()


@isolated
def test_what_nobody_uses_is_shared_and_a_flood_of_datagrams_takes_nothing_else() -> None:
    with tenants(3) as made, contextlib.ExitStack() as load:
        for number, mbit in enumerate((50, 20, 10), 1):
            made.shape(f"t{number}", floor(mbit))
        load.enter_context(udp(made.netns("t3"), World.ADDRESS, SINK))
        alone = (rates(made.sent, 2)["t3"] for _ in range(5))  # it has to get as far as sending so much
        assert any(each >= LINK * 0.95 * 0.9 for each in alone), "alone it gets the link"
        load.enter_context(tcp(made.netns("t2"), World.ADDRESS6, SINK, connections=2))
        found = rates(made.sent, 3)
        assert found["t2"] >= 20 * MBIT * 0.97, found
        assert found["t2"] + found["t3"] >= LINK * 0.95 * 0.95, found
        load.enter_context(udp(made.netns("t1"), World.ADDRESS, SINK, size=22))  # 64 bytes on the wire
        found = rates(made.sent, 3)
        assert found["t2"] >= 20 * MBIT * 0.97, found


@isolated
def test_a_ceiling_holds_from_the_first_moment_in_both_directions_for_tcp_and_udp() -> None:
    with tenants(1) as made, contextlib.ExitStack() as load:
        ceiling = Rate(ceiling=20 * MBIT)
        made.shape("t1", Shaping(out=ceiling, in_=Rate(ceiling=10 * MBIT)))
        began = made.sent()["t1"]
        with udp(made.netns("t1"), World.ADDRESS, SINK):
            first = rates(made.sent, 0.2, settle=0)["t1"]
            assert made.sent()["t1"] > began
            assert first <= 20 * MBIT * 1.5, "the burst is a few milliseconds"
            assert 16 * MBIT <= rates(made.sent, 2)["t1"] <= 20.4 * MBIT
        load.enter_context(tcp(made.netns("t1"), World.ADDRESS6, SINK))
        assert 15 * MBIT <= rates(made.sent, 3)["t1"] <= 20.4 * MBIT
        load.enter_context(tcp(made.netns("t1"), World.ADDRESS, SINK, get=True))
        assert 7 * MBIT <= rates(lambda: made.sent("in"), 3)["t1"] <= 10.4 * MBIT


@isolated
def test_a_change_under_load_loses_no_packet_of_others_and_nothing_is_left_without_guarantees() -> None:
    with tenants(2) as made, contextlib.ExitStack() as load:
        assert made.host.index("lab-out") is None, "nothing is made before the first guarantee"
        made.shape("t1", floor(50))
        made.shape("t2", floor(20, ceiling=40 * MBIT))
        load.enter_context(udp(made.netns("t1"), World.ADDRESS, SINK, rate=10 * MBIT))
        load.enter_context(udp(made.netns("t2"), World.ADDRESS, SINK))
        before = {name: counters["out"].drops for name, counters in counted(made).items()}
        for mbit in (30, 10, 25) * 5:
            made.shape("t2", floor(mbit, ceiling=(mbit + 10) * MBIT))
        assert made.lab.fabric.installed(made.lab.tenants["t2"]).drift == []
        found, after = rates(made.sent, 2), counted(made)
        assert 29 * MBIT <= found["t2"] <= 35.7 * MBIT, found
        assert found["t1"] >= 9 * MBIT, found
        assert after["t1"]["out"].drops == before["t1"] == 0
        for name in made.lab.tenants:
            made.shape(name, None)
        assert made.host.index("lab-out") is made.host.index("lab-in") is None
        assert made.lab.instances["t1", "web"].pings(World.ADDRESS), "the way is open without shaping"


@isolated
def test_the_next_daemon_leaves_everything_in_force_as_it_is() -> None:
    """Classes, queues and filters are the same ones afterwards, as their counters and numbers tell."""
    with tenants(2) as made, contextlib.ExitStack() as load:
        lab, web = made.lab, made.lab.instances["t1", "web"].port
        own = PortRates(number=0, out=Rate(floor=10 * MBIT, ceiling=30 * MBIT), in_=Rate(ceiling=30 * MBIT))
        intents = {"t1": Shaping(link=LINK, out=Rate(floor=50 * MBIT), ports={web.index: own}), "t2": floor(20)}
        for name, shaping in intents.items():
            made.shape(name, shaping)
        load.enter_context(udp(made.netns("t1"), World.ADDRESS, SINK, rate=5 * MBIT))
        before = installed(made)
        lab.fabric.close()
        sent = made_again(lab).shaper.counters(made.host, lab.tenants["t1"].index)["out"].bytes
        for name, shaping in intents.items():
            made.shape(name, shaping)
            assert lab.fabric.installed(lab.tenants[name]).drift == []
        assert installed(made) == before
        after = lab.fabric.shaper.counters(made.host, lab.tenants["t1"].index)["out"]
        assert (after.bytes >= sent > 0, after.drops) == (True, 0)


def made_again(lab: Lab) -> LinuxFabric:
    lab.fabric = LinuxFabric(lab.run, "lab", resolvers=())
    lab.fabric.open()
    return lab.fabric


def installed(made: Tenants) -> list[object]:
    """The devices with their numbers, and what is on them: a new one has a new number."""
    found: list[object] = []
    for name in ("lab-out", "lab-in"):
        index = made.host.index(name)
        assert index is not None
        found += [index, sorted(tc.classes(made.host, index))]
    with call_in(made.lab.inside("t1"), Rtnl) as inside:
        found += [(index, kind) for index, kind in tc.kinds(inside) if kind in ("htb", "tbf", "clsact", "bfifo")]
    return found


@isolated
def test_what_somebody_else_has_changed_is_reported_and_repaired() -> None:
    with tenants(2) as made:
        for name in made.lab.tenants:
            made.shape(name, floor(20))
        tenant, host, fabric = made.lab.tenants["t1"], made.host, made.lab.fabric
        uplink, out = host.index(fabric.naming.uplink(tenant.index)), host.index("lab-out")
        assert uplink is not None
        assert out is not None
        wrong = tree.htb_class(tree.tenant(tenant.index), tree.root(), MBIT, MBIT, LINK)
        for harm in (
            tc.set_class(out, wrong),
            tc.delete_class(out, tree.rest(tenant.index)),
            tc.delete_clsact(uplink),
            tc.delete_root(out),
            netlink.delete_link(index=out),
        ):
            assert fabric.installed(tenant).drift == []
            host.execute(harm)
            assert fabric.installed(tenant).drift != [], harm
            for name in made.lab.tenants:
                made.shape(name, floor(20))
            assert made.lab.instances["t1", "web"].pings(World.ADDRESS)


@isolated
def test_a_tenant_that_is_removed_takes_its_classes_with_it() -> None:
    with tenants(2) as made:
        for name in made.lab.tenants:
            made.shape(name, floor(20))
        one, two = made.lab.tenants.values()
        made.lab.fabric.remove(one)
        assert set(made.sent()) == {"t1", "t2"}
        assert made.lab.fabric.shaper.counters(made.host, one.index) == {}
        assert made.lab.fabric.shaper.counters(made.host, two.index) != {}
        made.lab.fabric.sweep([])
        assert made.host.index("lab-out") is None


def counted(made: Tenants) -> dict[str, dict[str, ClassCounters]]:
    return {name: made.lab.fabric.shaper.counters(made.host, each.index) for name, each in made.lab.tenants.items()}


@isolated
def test_the_host_s_own_devices_see_nothing_of_the_classes() -> None:
    """A class of a guarantee is in the packet's priority, and a device of the host may have a class of that number."""
    spy = """
table inet spy {
    chain out {
        type filter hook postrouting priority 10
        oifname "wan" counter
        oifname "wan" meta priority != 0 counter
    }
}
"""
    with tenants(1) as made, Nft() as nft:
        made.shape("t1", floor(20))
        nft.run(spy)
        for address in (World.ADDRESS, World.ADDRESS6):
            assert made.lab.instances["t1", "web"].pings(address)
        seen, marked = (int(each) for each in re.findall(r"counter packets (\d+)", nft.run("list table inet spy")))
        assert (seen >= 2, marked) == (True, 0)


@isolated
def test_the_kernel_takes_the_program_of_many_instances() -> None:
    addresses = dict[str, int]()
    for number in range(MOST_FLOORS):
        addresses |= dict.fromkeys(("100.64.{}.{}".format(*divmod(number, 256)), f"fd00::{number:x}"), number + 1)
    for source in (True, False):
        with program.LoadedProgram(program.classifier(tree.rest(1), addresses, source=source)):
            pass
