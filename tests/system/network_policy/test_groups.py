"""Broadcast and multicast: an instance that a policy in direction in selects gets none of its neighbours, and is found.

Frames are sent by web, to db, which a policy selects, and to third, which none selects: the control.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from functools import partial

from insula.model.objects import AddressPair
from insula.network.addresses import gateway_mac
from tests.support.frames import BROADCAST, ethernet, ipv6, solicitation, udp
from tests.support.lab import SOON, Instance, isolated
from tests.support.policy_lab import SHORT, address, policy, policy_lab, reaches

IP, IPV6 = 0x0800, 0x86DD
Make = Callable[[Instance, bytes], bytes]
FRAMES: dict[str, Make] = {
    "broadcast": lambda to, mark: ethernet(BROADCAST, "", IP, udp("10.0.0.2", "255.255.255.255", mark)),
    "broadcast of the subnet": lambda to, mark: ethernet(BROADCAST, "", IP, udp("10.0.0.2", "10.0.0.255", mark)),
    "multicast": lambda to, mark: ethernet("01:00:5e:00:00:fb", "", IP, udp("10.0.0.2", "224.0.0.251", mark)),
    "multicast of IPv6": lambda to, mark: ethernet("33:33:00:00:00:fb", "", IPV6, udp("fd00::2", "ff02::fb", mark)),
    "all nodes": lambda to, mark: ethernet("33:33:00:00:00:01", "", IPV6, udp("fd00::2", "ff02::1", mark)),
    "another protocol": lambda to, mark: ethernet("33:33:00:00:00:01", "", IPV6, ipv6("fd00::2", "ff02::1", 103, mark)),
    "broadcast to its MAC address": lambda to, mark: ethernet(
        to.port.mac, "", IP, udp("10.0.0.2", "255.255.255.255", mark)
    ),
    "multicast to its MAC address": lambda to, mark: ethernet(to.port.mac, "", IP, udp("10.0.0.2", "224.0.0.1", mark)),
    "multicast of IPv6 to its MAC address": lambda to, mark: ethernet(
        to.port.mac, "", IPV6, udp("fd00::2", "ff02::1", mark)
    ),
    "an address that it does not have": lambda to, mark: ethernet(
        to.port.mac, "", IP, udp("10.0.0.2", "198.51.100.1", mark)
    ),
    "an address of IPv6 that it does not have": lambda to, mark: ethernet(
        to.port.mac, "", IPV6, udp("fd00::2", "2001:db8::1", mark)
    ),
}


def hears(sender: Instance, to: Instance, make: Make, timeout: float) -> bool:
    """Whether an instance gets a frame of another one."""
    mark, sniffer = os.urandom(8), to.sniffer()
    frame = make(to, mark)
    sender.send_frame(frame[:6] + bytes.fromhex(sender.port.mac.replace(":", "")) + frame[6:])
    found = sniffer.sees(mark, timeout)
    sniffer.socket.close()
    return found


@isolated
def test_instances_that_a_policy_selects_hear_nothing_of_it() -> None:
    with policy_lab() as lab:
        web, db, third = lab["web"], lab["db"], lab.instance("third")
        assert [kind for kind, make in FRAMES.items() if not hears(web, db, make, SOON)] == [], "nothing is selected"
        lab.enforce(policy("db", {"app": "db"}, "in app=other udp/5000"))
        assert [kind for kind, make in FRAMES.items() if hears(web, db, make, 0.1)] == []
        assert [kind for kind, make in FRAMES.items() if not hears(web, third, make, SOON)] == []
        another = lab.instance("another", labels={"app": "db"})
        assert not hears(web, another, FRAMES["broadcast"], SHORT), "from its first packet on"
        other = lab.instance("other")
        for family in (socket.AF_INET, socket.AF_INET6):
            for to in (db, another):  # they have to be found first, and are
                assert reaches(other, to, family, 5000, socket.SOCK_DGRAM)
                assert reaches(to, third, family, 80), "and find others"
                assert not reaches(web, to, family, 5000, socket.SOCK_DGRAM)
        lab.cloud.apply("acme")
        assert lab.cloud.fabric.installed(lab.cloud.tenants["acme"]).drift == []
        assert not hears(web, db, FRAMES["multicast"], SHORT)
        lab.remove("db")
        assert hears(web, db, FRAMES["multicast"], SOON) and hears(web, another, FRAMES["multicast of IPv6"], SOON)


@isolated
def test_only_policies_in_force_in_direction_in_count() -> None:
    with policy_lab() as lab:
        web, db = lab["web"], lab["db"]
        for each in (
            policy("db", {"app": "db"}, audit=True),
            policy("db", {"app": "db"}, directions=("out",)),
            policy("db", {"app": "no such"}),
        ):
            lab.enforce(each)
            assert hears(web, db, FRAMES["multicast"], SOON) and hears(web, db, FRAMES["all nodes"], SOON)
        lab.labels["db"] = {"app": "no such"}
        lab.enforce()
        assert not hears(web, db, FRAMES["multicast"], SHORT) and not hears(web, db, FRAMES["all nodes"], SHORT)


@isolated
def test_neighbor_discovery_is_not_routed() -> None:
    """It passes policies, and so may not leave its network."""
    with policy_lab() as lab:
        lab.cloud.network("acme", "10.9.0.0/24", "fd09::/64", name="back")
        lab.cloud.router("acme", "net", "back")
        far, web = lab.instance("far", "back"), lab["web"]
        to = address(far, socket.AF_INET6)
        assert web.pings(to), "the router has found it"
        frames: tuple[tuple[Make, bool], ...] = (
            (lambda _, mark: ethernet(gateway_mac(1), "", IPV6, udp("fd00::2", to, mark)), True),
            (lambda _, mark: ethernet(gateway_mac(1), "", IPV6, solicitation("fd00::2", to, to, mark)), False),
        )
        for make, arrives in frames:
            sniffer, mark = far.sniffer(), os.urandom(4)
            frame = make(far, mark)
            web.send_frame(frame[:6] + bytes.fromhex(web.port.mac.replace(":", "")) + frame[6:])
            assert sniffer.sees(mark, SOON if arrives else SHORT) == arrives
            sniffer.socket.close()


@isolated
def test_an_instance_behind_which_others_are_gets_packets_for_them() -> None:
    """Those to ranges that it may use, if its policy allows them."""
    with policy_lab() as lab:
        pairs = [AddressPair(address="10.0.0.96/28"), AddressPair(address="fd00::90/124")]
        web, gate = lab["web"], lab.instance("gate", pairs=pairs)
        lab.enforce(policy("gate", {"app": "gate"}, "in app=web udp/9"))
        destinations = (
            (IP, "10.0.0.2", "10.0.0.99", True),
            (IP, "10.0.0.2", "10.0.0.112", False),
            (IPV6, "fd00::2", "fd00::99", True),
            (IPV6, "fd00::2", "fd00::a0", False),
        )
        for kind, source, target, arrives in destinations:
            make: Make = partial(_to, kind=kind, source=source, target=target)
            assert hears(web, gate, make, SOON if arrives else SHORT) == arrives, target


def _to(to: Instance, mark: bytes, kind: int, source: str, target: str) -> bytes:
    return ethernet(to.port.mac, "", kind, udp(source, target, mark))
