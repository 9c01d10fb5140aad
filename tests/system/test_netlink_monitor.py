"""What the kernel tells of changes in a namespace, and what is kept from insulad there."""

from __future__ import annotations

import functools
import os
import socket
from collections.abc import Iterator

import pytest

from insula.kernel import netlink
from insula.kernel.netlink import Rtnl
from insula.kernel.netns import OWN, call_in, call_in_new
from insula.kernel.nftables import Nft
from insula.network.fabric import NamespaceChange
from insula.network.linux.monitor import NamespaceMonitor
from tests.support.wait import until

NOTHING, OWN_CHANGE, OTHERS = NamespaceChange(False, False), NamespaceChange(True, False), NamespaceChange(False, True)


@pytest.fixture
def space() -> Iterator[int]:
    """A new namespace."""
    fd = call_in_new(lambda: os.open(OWN, os.O_RDONLY))
    yield fd
    os.close(fd)


@pytest.fixture
def monitor(space: int) -> Iterator[NamespaceMonitor]:
    made = call_in(space, NamespaceMonitor)
    assert made.read() == NOTHING
    yield made
    made.close()


def other(space: int, *commands: str) -> None:
    """Run commands as another process."""
    for command in commands:
        assert call_in(space, functools.partial(os.system, command)) == 0, command


def test_changes_of_this_process_are_told_from_those_of_others(space: int, monitor: NamespaceMonitor) -> None:
    with call_in(space, Nft) as nft, call_in(space, Rtnl) as rtnl:
        nft.run("add table inet t\nadd set inet t s { type ipv4_addr; }")
        assert monitor.read() == OWN_CHANGE
        rtnl.execute(netlink.add_address(1, "192.0.2.1/32"))
        assert monitor.read() == OWN_CHANGE
        other(space, "nft add element inet t s '{ 192.0.2.7 }'")
        assert monitor.read() == OTHERS
        nft.run("add element inet t s { 192.0.2.8 }")
        other(space, "ip address add 192.0.2.2/32 dev lo")
        assert monitor.read() == NamespaceChange(own=True, other=True)


def test_what_is_lost_counts_as_a_change_of_others(space: int, monitor: NamespaceMonitor) -> None:
    with call_in(space, Rtnl) as rtnl:
        for number in range(4000):
            host = f"10.0.{number // 250}.{number % 250 + 1}/32"
            rtnl.execute(netlink.add_address(1, host), netlink.delete_address(1, host))
    told = set()
    while (each := monitor.read()) != NOTHING:
        told.add(each.other)
    assert True in told


def test_neighbours_of_packets_are_not_told_and_those_of_programs_are(space: int, monitor: NamespaceMonitor) -> None:
    other(space, "ip link add v0 type veth peer name v1", "ip link set v0 up", "ip link set v1 up")
    other(space, "ip address add 192.0.2.1/24 dev v0")
    until(lambda: monitor.read() == NOTHING, "everything was told")
    other(
        space,
        "ip neighbour show",
        'python3 -c "import socket; s = socket.socket(2, 2)\nfor n in range(5, 200):'
        " s.sendto(b'x', (f'192.0.2.{n}', 9))\"",
    )
    assert "192.0.2.77" in call_in(space, lambda: os.popen("ip neighbour show").read()), "there are neighbours"
    assert monitor.read() == NOTHING
    other(space, "ip neighbour add 192.0.2.250 lladdr 02:00:00:00:00:01 dev v0")
    assert monitor.read() == OTHERS


def test_forwarding_entries_that_are_learned_are_not_told(space: int, monitor: NamespaceMonitor) -> None:
    other(space, "ip link add sw0 type bridge mcast_snooping 0", "ip link set sw0 up")
    other(space, "ip link add v0 type veth peer name v1", "ip link set v0 master sw0 up", "ip link set v1 up")
    until(lambda: monitor.read() == NOTHING, "everything was told")
    learned = "02:00:00:00:00:77"
    frame = bytes.fromhex("ffffffffffff" + learned.replace(":", "")) + b"\x08\x06" + bytes(46)

    def send() -> None:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
            sock.bind(("v1", 0))
            sock.send(frame)

    def is_learned() -> bool:
        call_in(space, send)
        return learned in call_in(space, lambda: os.popen("bridge fdb show br sw0").read())

    until(is_learned, "the bridge has learned the address")
    until(lambda: monitor.read() == NOTHING, "nothing of it is told")
    other(space, "bridge fdb add 02:00:00:00:00:78 dev v0 master static")
    assert monitor.read() == OTHERS


def test_settings_of_bridge_ports_are_told_when_they_differ(space: int, monitor: NamespaceMonitor) -> None:
    """The kernel tells of a port also when only timers of it have changed; here, when nothing has."""
    other(space, "ip link add sw0 type bridge", "ip link add v0 type veth peer name v1", "ip link set v0 master sw0")
    until(lambda: monitor.read() == NOTHING, "everything was told")
    later = call_in(space, NamespaceMonitor)
    other(space, "bridge link set dev v0 learning on")
    assert (monitor.read(), later.read()) == (NOTHING, NOTHING), "it was on"
    other(space, "bridge link set dev v0 isolated on")
    assert (monitor.read(), later.read()) == (OTHERS, OTHERS)
    later.close()


def test_elements_that_rules_add_are_not_told(space: int, monitor: NamespaceMonitor) -> None:
    other(space, "ip link set lo up")
    with call_in(space, Nft) as nft:
        nft.run("add table inet t\nadd set inet t s { type inet_service; flags dynamic,timeout; timeout 1s; }")
        nft.run("add chain inet t o { type filter hook output priority 0; }\nadd rule inet t o update @s { udp dport }")
        until(lambda: monitor.read() == NOTHING, "everything was told")
        other(
            space,
            'python3 -c "import socket; s = socket.socket(2, 2)\nfor n in range(1000, 1100):'
            " s.sendto(b'x', ('127.0.0.1', n))\"",
        )
        assert nft.elements("inet", "t")["s"], "packets have added elements"
        assert monitor.read() == NOTHING
        until(lambda: not nft.elements("inet", "t")["s"], "they have ended")
        assert monitor.read() == NOTHING
