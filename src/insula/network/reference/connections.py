"""The reference model of open connections: which of them a tenant's intent allows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from ipaddress import ip_address
from typing import Final

from insula.network.intent import TenantIntent
from insula.network.interpreter.connections import OpenConnection
from insula.network.interpreter.delivery import NetworkPlace, PacketSource
from insula.network.interpreter.space import ECHO, ICMP, ICMPV6, TCP, UDP, NumberRange, Service, Space
from insula.network.reference import policy_model
from insula.network.reference.links import remotes
from insula.network.reference.model import ReferenceModel

_NAMES: Final = {TCP: "tcp", UDP: "udp", ICMP: "icmp", ICMPV6: "icmpv6"}
_MOST: Final = 2048
"""Connections that the model is asked about at a time; further ones the next time."""


class ConnectionReference:
    """Which connections the intent allows; `models` are those of the tenant by version of IP."""

    def __init__(self, intent: TenantIntent, models: Mapping[int, ReferenceModel]) -> None:
        self._intent = intent
        self._models = models
        self._elsewhere = {a: remote.network for remote in remotes(intent) for a in remote.addresses}
        self._allowed: dict[OpenConnection, bool] = {}

    def forbidden(self, connections: Iterable[OpenConnection]) -> list[OpenConnection]:
        """Return those that should not be there, one for each service."""
        alike = {each._replace(source_port=0, mark=0): each for each in connections}
        self._allowed = {key: known for key, known in self._allowed.items() if key in alike}
        for key in [key for key in alike if key not in self._allowed][:_MOST]:
            self._allowed[key] = self._is_allowed(alike[key])
        return [each for key, each in alike.items() if not self._allowed.get(key, True)]

    def _is_allowed(self, asked: OpenConnection) -> bool:
        version = 6 if ":" in asked.source else 4
        model, service = self._models[version], _service(version, asked)
        if self._is_nobodys(model, asked.to):
            return True
        source, target = (NumberRange(*[int(ip_address(each))] * 2) for each in (asked.source, asked.target))
        space = Space(1, [target], [service])
        if (owner := model.owners().get(source.low)) is not None:
            found = model.of_ports(space, [PacketSource(model.place_of(owner), source)])
        elif asked.source in self._elsewhere:
            return self._from_another_host(asked)
        elif (peer := model.peer_at(source)) is not None:
            found = model.of_peer(space, [PacketSource(NetworkPlace("peer", peer), source)])
        elif self._is_provided(asked):
            return True
        else:
            found = model.of_uplink(space, [PacketSource(NetworkPlace("uplink"), source)])
        return any(found.permitted.values())

    def _is_nobodys(self, model: ReferenceModel, address: str) -> bool:
        """Whether an address in a network of the tenant is free: packets to it are tracked, and come nowhere."""
        number, networks = int(ip_address(address)), self._intent.networks
        here = any(subnet.low <= number <= subnet.high for subnet in map(model.subnet, networks) if subnet)
        taken = number in model.owners() or number in map(model.gateway, networks) or address in self._elsewhere
        return here and not taken

    def _from_another_host(self, asked: OpenConnection) -> bool:
        """Whether an instance on another host may have opened it: there is a path, and policies allow it."""
        network = self._elsewhere[asked.source]
        beside = {network, *(n for r in self._intent.routers if network in r.networks for n in r.networks)}
        target = policy_model.port_of(self._intent, asked.target)
        name = _NAMES.get(asked.protocol, str(asked.protocol))
        port = asked.port or None
        return (
            target is not None
            and target.network in beside
            and policy_model.permits(self._intent, asked.source, asked.target, name, port)
        )

    def _is_provided(self, asked: OpenConnection) -> bool:
        """Whether it leads to a port that a service endpoint of a peer is for."""
        provided = [each for peering in self._intent.peerings for each in peering.provides]
        return any(
            asked.to in each.addresses and (_NAMES.get(asked.protocol), asked.to_port) == (each.protocol, each.port)
            for each in provided
        )


def _service(version: int, asked: OpenConnection) -> Service:
    number = NumberRange(asked.protocol, asked.protocol)
    if asked.protocol in (TCP, UDP):
        source, target = (NumberRange(each, each) for each in (asked.source_port, asked.port))
        return Service(number, source, target)
    if asked.protocol in (ICMP, ICMPV6):  # of these only echo requests are connections
        return Service(number, None, NumberRange(ECHO[version], ECHO[version]), NumberRange(0, 0))
    return Service(number)
