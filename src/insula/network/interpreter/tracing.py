"""The question and the answer of a trace: the way of one packet through what is installed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from insula.network.interpreter.delivery import NetworkPlace, PacketSource
from insula.network.interpreter.space import Service


class TracedPacket(NamedTuple):
    """One packet: where it comes from, its destination, and its service, of one port or type."""

    version: int
    source: PacketSource
    target: int
    service: Service


class TracedRule(NamedTuple):
    """A rule that the packet has matched, with what it did; `text` is the rule as nft(8) lists it, if it is known."""

    where: str
    verdict: str
    text: str


class TracedWay(NamedTuple):
    """Where the packet may end, the devices by which it leaves routers, and the rules that it matches on the way.

    Without an end it is dropped: the last rule tells where, if one did.
    """

    ends: Sequence[NetworkPlace]
    devices: Sequence[str]
    rules: Sequence[TracedRule]
    unknown: Sequence[str]
