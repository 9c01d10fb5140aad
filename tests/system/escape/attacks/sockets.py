"""Sockets that could reach beyond a network namespace."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import struct
import time
from collections.abc import Callable

NETLINK_AUDIT, NETLINK_CONNECTOR, NETLINK_NETFILTER, NETLINK_XFRM = 9, 11, 12, 6
RTM_NEWLINK = 16
NLM_F_REQUEST, NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL = 1, 4, 0x400, 0x200
TIOCSTI, TIOCLINUX = 0x5412, 0x541C
MARK = b"insula-escape-"


def devices() -> list[str]:
    """The network interfaces that there are."""
    return [name for _, name in socket.if_nameindex()]


def sniff(seconds: float, ready: str) -> list[str]:
    """Every mark in any frame on any interface, by a packet socket (packet(7)); meanwhile it sends one to itself."""
    seen = set()
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) as sniffer:
        open(ready, "w").close()
        sniffer.settimeout(0.2)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as own:
                own.sendto(MARK + b"own", ("127.0.0.1", 9))
            with contextlib.suppress(TimeoutError):
                frame = sniffer.recv(65536)
                if MARK in frame:
                    seen.add(frame[frame.index(MARK) :][:30].decode(errors="replace"))
    return sorted(seen)


def shout(mark: str, addresses: list[str]) -> list[str]:
    """Sends the mark in a datagram to each address; those to which it could be sent."""
    sent = []
    for address in addresses:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock, contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            sock.sendto(MARK + mark.encode(), (address, 9))
            sent.append(address)
    return sent


def abstract(name: str) -> str:
    """Connects to an abstract socket (unix(7)), whose name is in no file system; what it says."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(2)
        sock.connect("\0" + name)
        return sock.recv(100).decode()


def _netlink(protocol: int, kind: int, body: bytes, flags: int = NLM_F_ACK) -> bytes:
    """One request (netlink(7)) and its answer; raises the OSError that it holds."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol) as sock:
        sock.settimeout(2)
        sock.send(struct.pack("IHHII", 16 + len(body), kind, NLM_F_REQUEST | flags, 1, 0) + body)
        answer = sock.recv(65536)
        _, answered = struct.unpack_from("IH", answer)
        if answered == 2 and (error := struct.unpack_from("i", answer, 16)[0]):
            raise OSError(-error, os.strerror(-error), "netlink")
        return answer


def link_down(name: str) -> int:
    """RTM_NEWLINK: takes an interface down."""
    index = socket.if_nametoindex(name)
    _netlink(0, RTM_NEWLINK, struct.pack("BxHiII", 0, 0, index, 0, 1))
    return index


def new_link(name: str) -> int:
    """RTM_NEWLINK: a dummy interface."""
    attribute = struct.pack("HH", 4 + len(name) + 1, 3) + name.encode() + b"\0"
    attribute += bytes(-len(attribute) % 4)
    kind = struct.pack("HH", 9, 1) + b"dummy" + bytes(3)
    info = struct.pack("HH", 4 + len(kind), 18) + kind
    _netlink(0, RTM_NEWLINK, bytes(16) + attribute + info, NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL)
    return socket.if_nametoindex(name)


def netlink_families() -> dict[str, str]:
    """The answer of each family with the kernel's secrets or the host's firewall: an errno, or "" if it obeyed."""

    ways: dict[str, Callable[[], object]] = {
        "audit": lambda: _netlink(NETLINK_AUDIT, 1000, b""),  # AUDIT_GET
        "audit rules": lambda: _netlink(NETLINK_AUDIT, 1013, b""),  # AUDIT_LIST_RULES
        "xfrm": lambda: _netlink(NETLINK_XFRM, 0x1C, bytes(8)),  # XFRM_MSG_FLUSHSA
        "connection tracking": lambda: _netlink(NETLINK_NETFILTER, 1 << 8 | 2, bytes(4)),  # IPCTNL_MSG_CT_DELETE
        "process events": process_events,
    }
    found = {}
    for name, way in ways.items():
        try:
            way()
            found[name] = ""
        except OSError as error:
            found[name] = errno.errorcode.get(error.errno or 0, str(error))
    return found


def process_events() -> int:
    """The connector's notices of each fork, exec and change of user on the whole host (drivers/connector/cn_proc.c)."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, NETLINK_CONNECTOR) as sock:
        sock.bind((0, 1))
        sock.settimeout(0.5)
        listen = struct.pack("IIIIHHI", 1, 1, 0, 0, 4, 0, 1)  # CN_IDX_PROC, CN_VAL_PROC, PROC_CN_MCAST_LISTEN
        sock.send(struct.pack("IHHII", 16 + len(listen), 3, 0, 0, 0) + listen)
        for _ in range(3):
            if (child := os.fork()) == 0:
                os._exit(0)
            os.waitpid(child, 0)
        try:
            while struct.unpack_from("I", sock.recv(4096), 36)[0] == 0:  # PROC_EVENT_NONE, which acknowledges
                pass
        except TimeoutError:
            raise OSError(errno.EAGAIN, "nothing is told", "connector") from None
    return 1


def type_into_terminal(text: str) -> int:
    """TIOCSTI (ioctl_tty(2)): puts characters into the terminal's input, as if the user had typed them."""
    for character in text:
        fcntl.ioctl(0, TIOCSTI, character.encode())
    return len(text)


def paste_into_console() -> int:
    """TIOCLINUX: the virtual console's selection, another way to type (CVE-2023-28100 of Flatpak)."""
    return int(fcntl.ioctl(0, TIOCLINUX, bytearray(b"\x03" + bytes(15))))


def type_by_force(text: str) -> str:
    """TIOCSTI on standard input: how it ended."""
    try:
        type_into_terminal(text)
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return ""


if __name__ == "__main__":
    print("typed:", type_by_force("echo injected-$((40+2))\n") or "done")
