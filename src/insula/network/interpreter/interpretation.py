"""What the interpreter of a fabric says about one tenant, or about the host between tenants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from insula.network.interpreter.delivery import Delivery
from insula.network.interpreter.links import LinkLayer
from insula.network.interpreter.space import NumberRange


class Forgery(NamedTuple):
    """Packets that a port may send although their source is not its own: from a MAC address that is not the port's
    (`mac`), an IP address that is not, or with such an address in ARP or neighbor discovery (`protocol`)."""

    port: str
    protocol: str
    mac: bool
    version: int
    address: NumberRange


class Overheard(NamedTuple):
    """Frames that a port receives although they are not for it, as text, and one destination MAC address of them."""

    sender: str
    receiver: str
    mac: str
    why: str


@dataclass
class Interpretation:
    """The installed state of one tenant, interpreted. `inside` are runs from its ports, `above` those from its uplink,
    one for each version of IP, and `groups` those from its ports to everybody in their networks."""

    tenant: str
    inside: Sequence[Delivery] = ()
    above: Sequence[Delivery] = ()
    groups: Sequence[Delivery] = ()
    forgeries: Sequence[Forgery] = ()
    overheard: Sequence[Overheard] = ()
    links: LinkLayer = field(default_factory=LinkLayer)
    judged: frozenset[int] = frozenset()
    """The marks of open connections that rules let pass without judging them again."""
    unknown: set[str] = field(default_factory=set)
