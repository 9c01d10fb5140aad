"""What an interpreter says about links: the hosts that frames go to, and the MAC addresses that packets are sent to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from insula.network.interpreter.delivery import NetworkPlace

UNKNOWN_MAC: Final = "00:00:00:00:00:00"
"""The entry of a VXLAN device for frames whose destination has none: they are flooded to its hosts."""


class TunnelEnd(NamedTuple):
    """Another host, by its underlay address, and the VXLAN network identifier of the frames that it gets (RFC 7348)."""

    host: str
    vni: int


class BridgePort(NamedTuple):
    """What a device on a bridge does (bridge(8)). It is on the bridge of `network`.

    It may send frames back (`hairpin`), have the bridge learn addresses from its frames, or as a VXLAN device learn
    hosts (`learning`), get the broadcasts and multicasts of others, be `isolated` from other isolated ports, and have
    the bridge answer for the neighbours behind it (`suppress`).
    """

    network: str
    hairpin: bool = False
    learning: bool = False
    broadcast: bool = False
    multicast: bool = False
    isolated: bool = False
    suppress: bool = False


@dataclass(frozen=True)
class LinkLayer:
    """`tunnels` are the hosts that frames of a network go to, by (network, destination MAC address); `neighbours` the
    MAC addresses that packets are sent to, by (network, IP address); `ports` what is on bridges. A peering is in the
    place of a network as "peering NAME"."""

    tunnels: Mapping[tuple[str, str], frozenset[TunnelEnd]] = field(default_factory=dict)
    neighbours: Mapping[tuple[str, str], str] = field(default_factory=dict)
    ports: Mapping[NetworkPlace, BridgePort] = field(default_factory=dict)
