"""The part of the reference model about datagrams to everybody: broadcasts and multicasts of a network.

They come to all other instances of their network that run, whatever the group, and nowhere else. Policies that select
the sender in direction out have to allow the group's address. An instance that a policy selects in direction in gets
none but messages of neighbor discovery.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from insula.model.objects import Port
from insula.network.interpreter.delivery import NetworkPlace, PacketSource
from insula.network.interpreter.space import TCP, UDP, NumberRange, Space
from insula.network.reference.expectation import Expectation, is_untracked, is_usual
from insula.network.reference.policies import PolicyReference
from insula.network.reference.ranges import is_group

_DNS = 53


def of_groups(
    ports: Mapping[NetworkPlace, Port],
    running: Collection[int],
    broadcasts: Mapping[str, int],
    policies: PolicyReference,
    version: int,
    space: Space,
    senders: Sequence[PacketSource],
) -> Expectation:
    """Return what packets of ports to groups should reach. `broadcasts` are the broadcast addresses of networks."""
    found = Expectation()
    services = [*enumerate(space.services)]
    usual = sum(is_usual(each, version) << number for number, each in services)
    neighbours = sum(is_untracked(each) << number for number, each in services)
    queries = sum(
        1 << n for n, each in services if each.protocol in ((TCP, TCP), (UDP, UDP)) and each.target == (_DNS, _DNS)
    )
    closed = {place for place, port in ports.items() if policies.is_closed_to_groups(port.address)}
    for number, sender in enumerate(senders):
        assert sender.address is not None
        mine, source = ports[sender.place], sender.address.low
        permitted = required = permitted_if_closed = 0
        for cell, target in zip(space.row_cells(), space.targets, strict=True):
            if not _is_of(mine, target, broadcasts, version):
                continue
            passing = policies.to_group(source, target)
            permitted |= (passing | neighbours) << cell
            permitted_if_closed |= neighbours << cell
            required |= (passing & usual & ~(queries if policies.named(source) else 0)) << cell
        at = space.cell(number, 0)
        for place, port in ports.items():
            if port.network != mine.network or place == sender.place or port.index not in running:
                continue
            found.permit(place, (permitted_if_closed if place in closed else permitted) << at)
            if place not in closed:
                found.require(place, required << at)
    return found


def _is_of(port: Port, target: NumberRange, broadcasts: Mapping[str, int], version: int) -> bool:
    """Whether addresses are a group of a port's network: everybody's, or its own broadcast address."""
    own = broadcasts.get(port.network)
    return is_group(version, target) or (own is not None and target == (own, own))
