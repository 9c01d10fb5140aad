"""Who is at the other end of a unix socket: credentials that the kernel vouches for (unix(7), SO_PEERCRED).

The socket's mode and owner already keep others away (0660 root:insula). The check of each connection guards against
a socket whose mode somebody has loosened, and against one that was handed into a container: there, root is not
root on the host, and the kernel reports the host's number.
"""

from __future__ import annotations

import asyncio
import grp
import os
import socket
import struct
from pathlib import Path
from typing import NamedTuple

from uvicorn.protocols.http.h11_impl import H11Protocol

from insula.model.errors import Failed

GROUP = "insula"
SO_PEERGROUPS = 59  # asm-generic/socket.h, since Linux 4.13; Python has no name for it
BACKLOG = 1024  # connections that wait to be accepted (listen(2))
_GROUPS_SIZE = 1024  # the most that getsockopt of Python reads: 256 groups
_UCRED = struct.Struct("iII")


class Peer(NamedTuple):
    """The process that connected, at the moment it did. `groups` are the supplementary ones."""

    pid: int
    uid: int
    gid: int
    groups: tuple[int, ...] = ()


def peer_of(sock: socket.socket) -> Peer:
    """The credentials of the process that connected `sock`."""
    pid, uid, gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    try:
        raw = sock.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, _GROUPS_SIZE)
    except OSError:  # ERANGE: it has more groups, and only its own user and group count
        raw = b""
    return Peer(pid, uid, gid, struct.unpack(f"{len(raw) // 4}I", raw))


def group_id() -> int | None:
    """The number of the group `insula`; None where there is none, and only root may connect."""
    try:
        return grp.getgrnam(GROUP).gr_gid
    except KeyError:
        return None


def allowed(peer: Peer, group: int | None) -> bool:
    """root, and members of the group."""
    return peer.uid == 0 or (group is not None and (peer.gid == group or group in peer.groups))


class PeerProtocol(H11Protocol):
    """uvicorn's HTTP protocol, with the connection's credentials in each request's state as "peer"."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.app_state = {**self.app_state, "peer": peer_of(transport.get_extra_info("socket"))}


def listen(path: Path) -> socket.socket:
    """A listening socket at `path`, 0660 root:insula (0600 without that group) from the moment it has that name.

    It replaces what is there, atomically: the caller holds the daemon's lock, so nobody listens on the old one.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.unlink(missing_ok=True)
        before = os.umask(0o177)
        try:
            sock.bind(str(temporary))
        finally:
            os.umask(before)
        group = group_id()
        if group is not None:
            os.chown(temporary, -1, group)
            temporary.chmod(0o660)
        sock.listen(BACKLOG)
        temporary.rename(path)
    except OSError as error:
        sock.close()
        temporary.unlink(missing_ok=True)
        raise Failed(f"{path} can't be made: {error.strerror or error}", "choose another with INSULA_SOCKET") from None
    return sock
