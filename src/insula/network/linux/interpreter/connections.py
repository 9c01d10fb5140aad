"""Read the open connections of a network namespace."""

from __future__ import annotations

from collections.abc import Collection

from insula.kernel.netlink.conntrack import ConntrackSocket
from insula.kernel.netns import call_in
from insula.network.interpreter.connections import OpenConnection


def open_connections(netns: int, marks: Collection[int]) -> list[OpenConnection]:
    """Return those with one of these marks (ct mark). NetlinkError."""
    with call_in(netns, ConntrackSocket) as conntrack:
        return [
            OpenConnection(*each.original[:3], *each.original[3:], each.reply.source, each.reply.source_port, each.mark)
            for each in conntrack.every()
            if each.mark in marks
        ]
