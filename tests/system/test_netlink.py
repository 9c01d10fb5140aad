"""Netlink sockets against the kernel: batches, errors, dumps of many packets, and the keys of nftables' sets."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TypeVar

import pytest

from insula.kernel import netlink, syscalls
from insula.kernel.netlink import NetlinkError, Rtnl
from insula.kernel.netlink.nftables import NftablesSocket
from insula.kernel.nftables import Nft
from tests.forked import forked

T = TypeVar("T")

MANY = 1500


def elsewhere(function: Callable[[], T]) -> T:
    """Run `function` in a child with a network namespace of its own."""

    def child() -> T:
        syscalls.unshare(syscalls.CLONE_NEWNET)
        return function()

    return forked(child)


def test_a_dump_of_many_packets_is_whole() -> None:
    def neighbours() -> tuple[int, str | None]:
        with Rtnl() as rtnl:
            rtnl.execute(netlink.bridge("br0", mac="02:00:00:00:00:01", mtu=1500))
            link = rtnl.link("br0")
            assert link
            addresses = [f"10.0.{number >> 8}.{number & 255}" for number in range(MANY)]
            for start in range(0, MANY, 100):
                batch = addresses[start : start + 100]
                rtnl.execute(*(netlink.add_neighbour(link.index, each, "02:00:00:00:00:02") for each in batch))
            found = [each.address for each in rtnl.neighbours(2) if each.permanent]  # AF_INET
            assert set(found) == set(addresses)
            return len(found), found[0]

    assert elsewhere(neighbours)[0] == MANY


def test_the_first_failure_of_a_batch_is_raised_and_the_rest_is_done() -> None:
    def batch() -> tuple[int | None, str, list[str]]:
        with Rtnl() as rtnl:
            again = netlink.bridge("a", mac="02:00:00:00:00:01", mtu=1500)
            last = netlink.bridge("b", mac="02:00:00:00:00:02", mtu=1500)
            with pytest.raises(NetlinkError) as failure:
                rtnl.execute(again, again, netlink.delete_link(name="missing"), last)
            return failure.value.errno, str(failure.value), sorted(link.name for link in rtnl.links())

    number, text, names = elsewhere(batch)
    assert (number, names) == (errno.EEXIST, ["a", "b", "lo"])
    assert text == "[Errno 17] add bridge a: File exists"


def test_an_error_has_the_words_of_the_kernel() -> None:
    def refused() -> str:
        with Rtnl() as rtnl, pytest.raises(NetlinkError) as failure:
            rtnl.execute(netlink.bridge("b", mac="02:00:00:00:00:02", mtu=1 << 30))
        return str(failure.value)

    assert "mtu" in elsewhere(refused).lower()


def test_the_keys_of_a_set_are_read_as_bytes() -> None:
    def keys() -> list[list[bytes]]:
        elements = ", ".join(f'"port{number}" . 10.0.0.{number}' for number in range(200))
        names = f"set names {{ type ifname . ipv4_addr; elements = {{ {elements} }}; }}"
        Nft().run(f"table inet t {{ {names}; set none {{ type ipv4_addr; }}; }}")
        with NftablesSocket() as nftables:
            return [nftables.keys("inet", "t", name) for name in ("names", "none", "absent")]

    names, none, absent = elsewhere(keys)
    assert set(names) == {f"port{each}".encode().ljust(16, b"\0") + bytes((10, 0, 0, each)) for each in range(200)}
    assert (len(names), none, absent) == (200, [], [])
