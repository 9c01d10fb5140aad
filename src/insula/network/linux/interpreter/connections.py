"""Read the open connections of a network namespace."""

from __future__ import annotations

from collections.abc import Collection

from insula.kernel.netlink.conntrack import ConnectionTable
from insula.network.interpreter.connections import OpenConnection


def open_connections(tracked: ConnectionTable, marks: Collection[int]) -> list[OpenConnection]:
    """Return those with one of these marks (ct mark). NetlinkError."""
    return [
        OpenConnection(*each.original[:3], *each.original[3:], each.reply.source, each.reply.source_port, each.mark)
        for each in tracked.read()
        if each.mark in marks
    ]
