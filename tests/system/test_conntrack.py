"""Listing and deleting tracked connections, and elements of maps, on a real kernel."""

from __future__ import annotations

import contextlib
import socket

from insula.kernel import netlink
from insula.kernel.netlink import Rtnl, maps
from insula.kernel.netlink.conntrack import ConnectionTable, ConntrackSocket, Match, to
from insula.kernel.netlink.maps import KeyInterval
from insula.kernel.netlink.nftables import NftablesSocket
from insula.kernel.nftables import Nft
from tests.support.lab import isolated

_RULES = """
table inet t {
    map single { type ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service; }
    map ranges { type ipv4_addr . inet_proto . inet_service : ipv4_addr; flags interval; }
    map short { type nf_proto : mark; }
    map wide { type ipv4_addr . inet_service : nf_proto; }
    chain output { type nat hook output priority -100; ct state new counter; }
}
"""


def _up() -> None:
    with Rtnl() as rtnl:
        rtnl.execute(netlink.set_link(1, up=True))


@isolated
def test_entries_are_found_by_destination_and_only_those_are_deleted() -> None:
    _up()
    with Nft() as nft, ConntrackSocket() as conntrack:
        nft.run(_RULES)
        assert conntrack.count() == 0 and conntrack.every() == []
        for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
            with socket.socket(family, socket.SOCK_DGRAM) as sender:
                for port in (5000, 5001, 5002, 6000):
                    sender.sendto(b"x", (address, port))
                ours = sender.getsockname()[1]
            found = conntrack.connections(to(address, "udp", (5001, 5001)))
            assert [each.original.destination_port for each in found] == [5001]
            assert found[0].original.source == address and found[0].original.source_port == ours
            assert len(conntrack.connections(to(address, "udp", (5000, 5002)))) == 3
            assert len(conntrack.connections(to(address))) >= 4
            assert not conntrack.connections(to(address, "tcp"))
            assert len(conntrack.connections(Match(address, reply=True, version=6 if ":" in address else 4))) >= 4
            assert conntrack.delete([to(address, "udp", (5000, 5001)), to(address, "udp", (5001, 5001))]) == 2
            left = {each.original.destination_port for each in conntrack.connections(to(address, "udp"))}
            assert left == {5002, 6000}
            assert conntrack.delete([to(address, "udp", (7000, 7000))]) == 0
        every = conntrack.every()
        assert len(every) == conntrack.count()
        assert {each.original.destination for each in every} == {"127.0.0.1", "::1"}


@isolated
def test_a_table_that_is_read_again_has_what_changed_meanwhile() -> None:
    _up()
    with Nft() as nft, NftablesSocket() as nftables, ConntrackSocket() as conntrack, contextlib.ExitStack() as senders:
        nft.run(_RULES)
        table = ConnectionTable(nftables)

        def opened(port: int, mark: int = 0) -> socket.socket:
            sender = senders.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            nft.run(f"flush chain inet t output; add rule inet t output ct state new ct mark set {mark}")
            sender.sendto(b"x", ("127.0.0.1", port))
            return sender

        def listed() -> set[tuple[int, int]]:
            found = table.read()
            assert sorted(found) == sorted(ConnectionTable(nftables).read()), "what a new one reads"
            return {(each.original.destination_port, each.mark) for each in found}

        assert listed() == set()
        for port in range(5000, 5100):  # more than are asked for at once
            opened(port)
        usual = {(port, 0) for port in range(5000, 5100)}
        assert listed() == usual and listed() == usual, "read, and asked for one by one"
        conntrack.delete([to("127.0.0.1", "udp", (5001, 5001))])
        opened(6000)
        changed = usual - {(5001, 0)} | {(6000, 0)}
        assert listed() == changed, "as many, and another one"
        conntrack.delete([to("127.0.0.1", "udp", (6000, 6000))])
        opened(6000, mark=7)
        assert listed() == changed - {(6000, 0)} | {(6000, 7)}, "the same with another mark"
        opened(6001)
        assert len(listed()) == 101, "one more"
        conntrack.delete([to("127.0.0.1", "udp", (5000, 6001))])
        assert listed() == set()


@isolated
def test_elements_of_maps_are_added_read_and_changed() -> None:
    with Nft() as nft, NftablesSocket() as nftables:
        nft.run(_RULES)
        key = KeyInterval(socket.inet_aton("192.0.2.1") + b"\6\0\0\0" + b"\0\x50\0\0")
        one, other = (socket.inet_aton(each) + b"\x1f\x90\0\0" for each in ("10.0.0.2", "10.0.0.3"))
        nftables.transact(*maps.change("inet", "t", "single", {}, {key: one}))
        assert maps.read(nftables, "inet", "t", "single") == {key: one}
        assert "192.0.2.1 . tcp . 80 : 10.0.0.2 . 8080" in nft.run("list map inet t single")
        nftables.transact(*maps.change("inet", "t", "single", {key: one}, {key: other}))
        assert maps.read(nftables, "inet", "t", "single") == {key: other}
        nftables.transact(*maps.change("inet", "t", "single", {key: other}, {}))
        assert maps.read(nftables, "inet", "t", "single") == {}

        head = socket.inet_aton("192.0.2.1") + b"\x11\0\0\0"
        many = KeyInterval(head + (20000).to_bytes(2, "big") + b"\0\0", head + (39999).to_bytes(2, "big") + b"\0\0")
        nftables.transact(*maps.change("inet", "t", "ranges", {}, {many: one[:4]}))
        assert maps.read(nftables, "inet", "t", "ranges") == {many: one[:4]}
        for name, short in (
            ("short", {KeyInterval(b"\x02"): b"\1\0\0\0", KeyInterval(b"\x0a"): b"\2\0\0\0"}),
            ("wide", {KeyInterval(socket.inet_aton("192.0.2.1") + b"\0\x50\0\0"): b"\x02"}),
        ):
            nftables.transact(*maps.change("inet", "t", name, {}, short))
            assert maps.read(nftables, "inet", "t", name) == short, "values that are padded"
            nftables.transact(*maps.change("inet", "t", name, short, {}))
            assert maps.read(nftables, "inet", "t", name) == {}
        assert maps.read(nftables, "inet", "t", "none") == {}
        assert "192.0.2.1 . udp . 20000-39999 : 10.0.0.2" in nft.run("list map inet t ranges")
        nftables.transact(*maps.change("inet", "t", "ranges", {many: one[:4]}, {many: other[:4]}))
        assert maps.read(nftables, "inet", "t", "ranges") == {many: other[:4]}


@isolated
def test_twenty_thousand_elements_are_one_transaction() -> None:
    with Nft() as nft, NftablesSocket() as nftables:
        nft.run(_RULES)
        head, to_ = socket.inet_aton("192.0.2.1") + b"\6\0\0\0", socket.inet_aton("10.0.0.2")
        wanted = {
            KeyInterval(head + port.to_bytes(2, "big") + b"\0\0"): to_ + (port - 1000).to_bytes(2, "big") + b"\0\0"
            for port in range(20000, 40000)
        }
        nftables.transact(*maps.change("inet", "t", "single", {}, wanted))
        assert maps.read(nftables, "inet", "t", "single") == wanted
        nftables.transact(*maps.change("inet", "t", "single", wanted, {}))
        assert maps.read(nftables, "inet", "t", "single") == {}
