"""The credentials of a client on a unix socket, from the kernel (unix(7), SO_PEERCRED).

The operator's socket already excludes other users by its mode and owner (0660 root:insula); the users' socket is for
all. Each connection is checked, in case a mode was changed, or a socket was mounted into a container: root in a
container has another user ID on the host, which is the one that the kernel reports.
"""

from __future__ import annotations

import asyncio
import grp
import os
import socket
import struct
from collections import Counter
from http import HTTPStatus
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from insula.api.framing import StrictConnection
from insula.api.patience import PunctualProtocol
from insula.api.problems import encoded
from insula.api.tls.record import split
from insula.model.errors import Failed, InsulaError, Invalid, TooManyRequests
from insula.settings import OPERATORS

SO_PEERGROUPS = 59  # asm-generic/socket.h, since Linux 4.13; Python has no name for it
MAX_CONNECTIONS = 128
"""Connections at a time of one user of the host, except root and members of the group."""
BACKLOG = 1024  # connections that wait to be accepted (listen(2))
_GROUPS_SIZE = 1024  # the maximum of Python's getsockopt: 256 groups
_UCRED = struct.Struct("iII")


class Peer(NamedTuple):
    """The credentials of a client when it connected. `groups` are the supplementary ones."""

    pid: int
    uid: int
    gid: int
    groups: tuple[int, ...] = ()


def peer_of(sock: socket.socket) -> Peer:
    """Return the credentials of the process that connected `sock`."""
    pid, uid, gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    try:
        raw = sock.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, _GROUPS_SIZE)
    except OSError:  # ERANGE: it has more groups; then only its user and its primary group count
        raw = b""
    return Peer(pid, uid, gid, struct.unpack(f"{len(raw) // 4}I", raw))


def group_id() -> int | None:
    """Return the ID of the group `insula`; None if it doesn't exist, and only root may connect."""
    try:
        return grp.getgrnam(OPERATORS).gr_gid
    except KeyError:
        return None


def allowed(peer: Peer, group: int | None) -> bool:
    """Whether a client may use the daemon: root, and members of the group."""
    return peer.uid == 0 or (group is not None and (peer.gid == group or group in peer.groups))


class ProblemProtocol(PunctualProtocol):
    """uvicorn's HTTP protocol; what is not clearly HTTP is answered as every other error is, and told to the function
    "malformed" of the state, which the audit log has it from."""

    conn: StrictConnection

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn = StrictConnection()

    def send_400_response(self, msg: str) -> None:
        if told := self.app_state.get("malformed"):
            told(self.app_state.get("peer"), self.app_state.get("client"))
        status, why = self.conn.refused
        if self.conn.in_body and self.cycle.response_started:  # a second answer would be taken for one to the next
            self.transport.close()
        else:
            self.close_with(Invalid(f"this is not a valid HTTP request: {why}", "see RFC 9112"), status)

    def close_with(self, error: InsulaError, status: int | None = None) -> None:
        """Send an error that belongs to no request, and close the connection."""
        status, headers, body = encoded(error, status)
        first = b"HTTP/1.1 %d %b" % (status, HTTPStatus(status).phrase.encode())
        self.transport.write(b"\r\n".join((first, *(b"%b: %b" % field for field in headers), b"", body)))
        self.transport.close()


class PeerProtocol(ProblemProtocol):
    """HTTP from a process of the host; each request's state has the connection's credentials as "peer"."""

    _connections: ClassVar[Counter[int]] = Counter()  # of users that are not the operator

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        peer = peer_of(transport.get_extra_info("socket"))
        self.app_state = {**self.app_state, "peer": peer}
        self._user = None if allowed(peer, self.app_state.get("group")) else peer.uid
        if self._user is not None:
            self._connections[self._user] += 1
            if self._connections[self._user] > MAX_CONNECTIONS:
                self.close_with(TooManyRequests(f"you have {MAX_CONNECTIONS} connections open already"))

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._user is not None:
            self._connections[self._user] -= 1
            if not self._connections[self._user]:
                del self._connections[self._user]


class GateProtocol(ProblemProtocol):
    """HTTP from the gate of HTTPS: a record of the client, then its requests. Each request's state has the record as
    "client". A connection of another user than the gate's is closed."""

    _head: bytes | None = b""  # what has come of the record; None once it is whole

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if peer_of(transport.get_extra_info("socket")).uid != self.app_state["gate"]:
            transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._head is not None:
            try:
                found = split(self._head + data)
            except (ValueError, KeyError, TypeError):
                self.transport.abort()
                return
            if found is None:
                self._head += data
                return
            record, data = found
            self._head, self.app_state = None, {**self.app_state, "client": record}
            if not data:  # which h11 would take for the end of the connection
                return
        super().data_received(data)


def listen(path: Path, *, everybody: bool = False, owner: int | None = None) -> socket.socket:
    """Listen on a socket at `path`, which has mode 0660 root:insula (0600 without that group) from the start; 0666 if
    it is for `everybody`, and 0600 if it is for the user `owner`.

    It replaces an existing socket atomically: the caller holds the daemon's lock, so the old one is not in use.
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
        if everybody:
            temporary.chmod(0o666)
        elif owner is not None:
            os.chown(temporary, owner, owner)
        elif group is not None:
            os.chown(temporary, -1, group)
            temporary.chmod(0o660)
        sock.listen(BACKLOG)
        temporary.rename(path)
    except OSError as error:
        sock.close()
        temporary.unlink(missing_ok=True)
        raise Failed(f"{path} can't be made: {error.strerror or error}", "choose another with INSULA_SOCKET") from None
    return sock
