"""Sockets that receive what the kernel tells of changes: the multicast groups of netlink(7) and rtnetlink(7).

A namespace's neighbour tables and forwarding entries change with its packets. A filter in the kernel (bpf(4),
SO_ATTACH_FILTER) drops what is told of these, so packets, however many, neither wake the reader nor fill the buffer.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import socket
import struct
from typing import Final, NamedTuple, Self

from insula.kernel import descriptors
from insula.kernel.netlink import attributes
from insula.kernel.netlink import messages as rt
from insula.kernel.netlink.socket import parts_of

# linux/rtnetlink.h, nfnetlink.h, nf_tables.h
_LINK, _TC, _ROUTE4, _RULE4, _ROUTE6, _RULE6, _VLAN = 1, 4, 7, 8, 11, 19, 33  # RTNLGRP_
_NEIGHBOUR, _ADDRESS4, _ADDRESS6, _CONF4, _CONF6 = 3, 5, 9, 24, 25
_NFTABLES: Final = 7  # NFNLGRP_NFTABLES
_SOL_NETLINK, _ADD_MEMBERSHIP = 270, 1
_NETLINK_NETFILTER: Final = 12
_NEW_ELEMENT, _DELETE_ELEMENT, _NEW_GENERATION = (10 << 8 | number for number in (12, 14, 15))
_SET, _THREAD = 2, 3  # NFTA_SET_ELEM_LIST_SET, NFTA_GEN_PROC_NAME
_SO_RCVBUFFORCE, _SO_ATTACH_FILTER = 33, 26
_BUFFER: Final = 1 << 20  # bytes; what does not fit is lost, and `read` says so
_LARGEST: Final = 1 << 16
_AT_ONCE: Final = 256  # datagrams that are read in one go
_HEADER: Final = 16  # bytes of nlmsghdr


class Change(NamedTuple):
    """What the kernel tells: a message's type, the port id of the socket whose request it was (0: of none), and its
    body."""

    type: int
    port: int
    body: bytes


class Transaction(NamedTuple):
    """A change of the rules: the port id of the socket and the name of the thread that made it, and the names of the
    sets that it changed the elements of; None if it changed anything else."""

    port: int
    thread: str
    sets: frozenset[str] | None


class _Monitor:
    """A non-blocking socket in the network namespace of the calling thread."""

    def __init__(self, protocol: int, groups: tuple[int, ...], accept: bytes = b"") -> None:
        kind = socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, protocol
        number = descriptors.move_above_select_limit(socket.socket(*kind).detach())
        self.socket = socket.socket(*kind, fileno=number)
        self.socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER)
        if accept:
            program = ctypes.create_string_buffer(accept, len(accept))
            packed = struct.pack("HxxxxxxP", len(accept) // 8, ctypes.addressof(program))
            self.socket.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, packed)
        self.socket.bind((0, 0))
        for group in groups:
            with contextlib.suppress(OSError):  # a kernel without bridges' VLANs, or without IPv6
                self.socket.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, group)

    def fileno(self) -> int:
        return self.socket.fileno()

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self) -> tuple[list[Change], bool]:
        """Return what has been told since the last time, or a part if it is much; and whether something was lost."""
        found, lost = list[Change](), False
        for _ in range(_AT_ONCE):
            try:
                data = self.socket.recv(_LARGEST)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                lost = True
                continue
            found += [Change(type_, port, body) for type_, port, body in parts_of(data)]
        return found, lost


class RouteMonitor(_Monitor):
    """Changes of links, addresses, routes, routing rules, queueing disciplines, bridges' VLANs, settings of devices,
    and permanent neighbours and forwarding entries."""

    def __init__(self) -> None:
        groups = _LINK, _TC, _ROUTE4, _RULE4, _ROUTE6, _RULE6, _VLAN, _NEIGHBOUR, _ADDRESS4, _ADDRESS6, _CONF4, _CONF6
        super().__init__(socket.NETLINK_ROUTE, groups, _not_by_packets())


class RulesMonitor(_Monitor):
    """Transactions of nftables. Elements that rules add for packets, and that end by themselves, are none."""

    def __init__(self) -> None:
        super().__init__(_NETLINK_NETFILTER, (_NFTABLES,))
        self._sets: set[str] | None = set()

    def transactions(self) -> tuple[list[Transaction], bool]:
        """Return the transactions that have ended since the last time, and whether some were lost."""
        changes, lost = self.read()
        found = []
        for change in changes:
            if change.type == _NEW_GENERATION:
                thread = attributes.string(attributes.parse(change.body[4:]).get(_THREAD, b""))
                sets = None if self._sets is None else frozenset(self._sets)
                found.append(Transaction(change.port, thread, sets))
                self._sets = set()
            elif change.type not in (_NEW_ELEMENT, _DELETE_ELEMENT):
                self._sets = None
            elif self._sets is not None:
                self._sets.add(attributes.string(attributes.parse(change.body[4:])[_SET]))
        return found, lost


def _not_by_packets() -> bytes:
    """A filter that drops what is told of neighbours and forwarding entries which the kernel has learned.

    Of the kernel's own making are neighbours and routes without a port id, and forwarding entries that are neither
    permanent nor static. Routes without one follow from changes of devices and addresses, which are told as well.
    """
    load16, load32, equal, bits, answer = 0x28, 0x20, 0x15, 0x45, 0x06  # BPF_LD|BPF_ABS, BPF_JMP, BPF_RET
    load8 = 0x30
    kinds = rt.RTM_NEWNEIGH, rt.RTM_DELNEIGH, rt.RTM_NEWROUTE, rt.RTM_DELROUTE
    new, gone, route, unroute = map(socket.htons, kinds)  # a filter reads big-endian, and netlink is of the host's
    static = socket.htons(rt.NUD_PERMANENT | rt.NUD_NOARP)
    code = [
        (load16, 0, 0, 4),  # nlmsg_type
        (equal, 3, 0, new),
        (equal, 2, 0, gone),
        (equal, 5, 0, route),
        (equal, 4, 7, unroute),
        (load8, 0, 0, _HEADER),  # ndm_family
        (equal, 0, 2, socket.AF_BRIDGE),
        (load16, 0, 0, _HEADER + 8),  # ndm_state
        (bits, 3, 2, static),
        (load32, 0, 0, 12),  # nlmsg_pid
        (equal, 0, 1, 0),
        (answer, 0, 0, 0),
        (answer, 0, 0, 0xFFFFFFFF),
    ]
    return b"".join(struct.pack("=HBBI", *each) for each in code)
