"""What of the host's ports is in use by programs of the host itself, from /proc/net (proc_pid_net(5))."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Final

from insula.network.fabric import HostService

_LISTENS, _UNCONNECTED = "0A", "07"
_EPHEMERAL: Final = 32768  # UDP sockets from here up are those of clients, which come and go


def services() -> list[HostService]:
    """Return the ports on which programs in the calling thread's network namespace listen."""
    found = []
    for name, protocol, state in (("tcp", "tcp", _LISTENS), ("udp", "udp", _UNCONNECTED)):
        for version in ("", "6"):
            found += [HostService(protocol, port, address) for address, port in _sockets(f"{name}{version}", state)]
    return [each for each in found if each.protocol == "tcp" or each.port < _EPHEMERAL]


def _sockets(name: str, state: str) -> Iterator[tuple[str | None, int]]:
    with contextlib.suppress(FileNotFoundError):  # no IPv6
        for line in Path(f"/proc/thread-self/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if len(fields) > 3 and fields[3] == state:
                address, _, port = fields[1].partition(":")
                yield _address(address), int(port, 16)


def _address(text: str) -> str | None:
    """Parse an address: words of 32 bits in the byte order of the machine. None is every address."""
    packed = b"".join(int(text[at : at + 8], 16).to_bytes(4, "little") for at in range(0, len(text), 8))
    address = IPv4Address(packed) if len(packed) == 4 else IPv6Address(packed).ipv4_mapped or IPv6Address(packed)
    return None if address.is_unspecified else str(address)
