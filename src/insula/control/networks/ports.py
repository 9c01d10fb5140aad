"""Ports: connections of instances to networks. A port is plugged in when its instance starts, or while it runs."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack, suppress
from ipaddress import ip_network
from itertools import count
from typing import NamedTuple

from insula.control.allocation.reservations import Allocator, Reservation
from insula.control.context import Context
from insula.control.keys import NETWORKS
from insula.control.networks.controller import NetworkController
from insula.control.networks.intents import addresses
from insula.model.errors import Conflict, Failed, InsulaError, Invalid, NotFound, Unavailable
from insula.model.objects import Instance, Network, NetworkAttachment, Port, Tenant
from insula.network.addresses import allocate, parse_mac, parse_range, port_mac
from insula.network.fabric import Nic
from insula.store.protocol import Entry

_PORT = "port-index"
_MAX_INDEX = 1 << 24


WantedPort = tuple[Network, NetworkAttachment]


class Place(NamedTuple):
    """A port and its network."""

    network: Network
    port: Port


class Ports:
    def __init__(self, context: Context, networks: NetworkController) -> None:
        self.context = context
        self.networks = networks
        self._last: dict[tuple[str, str, str], str] = {}  # tenant, network, subnet → the address given out last

    # -- allocation; ports are committed together with their instance ----------------------------------------------

    async def allocate(self, instance: str, wanted: Sequence[WantedPort], beside: Sequence[Port] = ()) -> list[Port]:
        """Ports with the addresses of the attachments, or free ones, taken in their allocators. `beside` are those that
        the instance has already. Invalid, Conflict."""
        made: list[Port] = []
        async with AsyncExitStack() as undo:
            for (network, attachment), interface in zip(wanted, free_interfaces(beside), strict=False):
                made.append(await self._allocate(network, attachment, instance, interface))
                undo.callback(self.context.allocators.release, port_reservations(made[-1]))
            undo.pop_all()
        return made

    async def _allocate(self, network: Network, wanted: NetworkAttachment, instance: str, interface: str) -> Port:
        check_versions(network, wanted)
        async with AsyncExitStack() as undo:
            address = await self._address(network, network.subnet, wanted.address)
            undo.callback(self._addresses(network).release, address)
            address6 = None
            if network.subnet6:
                address6 = await self._address(network, network.subnet6, wanted.address6)
                undo.callback(self._addresses(network).release, address6)
            mac = await self._mac(network, address, wanted.mac)
            undo.callback(self.context.allocators.of(_mac_kind(network.tenant, network.name)).release, mac)
            await self._check_pairs(network, wanted)
            index = await self.context.allocators.of(_PORT).random(_MAX_INDEX, "places for ports")
            undo.pop_all()
        return Port(
            tenant=network.tenant,
            network=network.name,
            instance=instance,
            index=index,
            interface=interface,
            mac=mac,
            address=address,
            address6=address6,
            allowed_pairs=wanted.allowed_pairs,
        )

    async def check(self, network: Network, wanted: NetworkAttachment, instead_of: Sequence[Port]) -> None:
        """Check that there would be addresses for an attachment if these ports were gone. None is taken. Invalid,
        Conflict."""
        check_versions(network, wanted)
        own = [port for port in instead_of if port.network == network.name]
        taken = await self._addresses(network).taken() - {each for port in own for each in addresses(port)}
        address = allocate(_parsed(network.subnet), taken, wanted.address, None)
        if network.subnet6:
            allocate(_parsed(network.subnet6), taken, wanted.address6, None)
        macs = await self.context.allocators.of(_mac_kind(network.tenant, network.name)).taken()
        _pick_mac(network, address, wanted.mac, macs - {port.mac for port in own})
        await self._check_pairs(network, wanted)

    async def _check_pairs(self, network: Network, wanted: NetworkAttachment) -> None:
        """Raise Conflict if a pair has the gateway's address, or the MAC address of another port, Invalid if its range
        is one of the uplinks."""
        macs = await self.context.allocators.of(_mac_kind(network.tenant, network.name)).taken()
        for pair in wanted.allowed_pairs:
            parse_range(pair.address, reserved=self.context.fabric.reserved)
            if pair.address in (network.gateway, network.gateway6):
                raise Conflict(f"address {pair.address} is the gateway of {network.name}", "allow another one")
            if pair.mac and pair.mac != wanted.mac and pair.mac in macs:
                raise Conflict(f"MAC address {pair.mac} is that of another port", "allow another one")

    def _addresses(self, network: Network) -> Allocator:
        return self.context.allocators.of(_address_kind(network.tenant, network.name))

    async def _address(self, network: Network, subnet: str, wanted: str | None) -> str:
        parsed, place = _parsed(subnet), (network.tenant, network.name, subnet)
        last = self._last.get(place)
        chosen = await self._addresses(network).choose(lambda taken: allocate(parsed, taken, wanted, last))
        if wanted is None:
            self._last[place] = chosen
        return chosen

    async def _mac(self, network: Network, address: str, wanted: str | None) -> str:
        allocator = self.context.allocators.of(_mac_kind(network.tenant, network.name))
        return await allocator.choose(lambda taken: _pick_mac(network, address, wanted, taken))

    def forget(self, network: Network) -> None:
        """Drop the state that is kept for a network that was removed."""
        for subnet in (network.subnet, network.subnet6 or ""):
            self._last.pop((network.tenant, network.name, subnet), None)
        for kind in (_address_kind(network.tenant, network.name), _mac_kind(network.tenant, network.name)):
            self.context.allocators.drop(kind)

    # -- on this host ---------------------------------------------------------------------------------------------

    async def places(self, instance: Instance) -> list[Place]:
        """The instance's wanted ports with their networks. NotFound if one of these was removed."""
        return [Place(await self._network(port), port) for port in instance.plugged]

    async def _network(self, port: Port) -> Network:
        found = await NETWORKS.get(self.context.store, port.tenant, port.network)
        if found is None:
            raise NotFound(f"network {port.network} of tenant {port.tenant} is gone", "create it again")
        return found.value

    def plug(self, tenant: Tenant, places: Sequence[Place], nic: Nic, beside: Sequence[Place] = ()) -> Awaitable[None]:
        """Connect an instance to networks, beside those that it is connected to, add its name to the resolver, and
        close the nic. The future of that.

        It runs to its end even if the caller is cancelled. Else its thread would go on with a descriptor that may
        already mean another nic.
        """
        return asyncio.shield(asyncio.ensure_future(self._plug(tenant, places, nic, beside)))

    async def _plug(self, tenant: Tenant, places: Sequence[Place], nic: Nic, beside: Sequence[Place]) -> None:
        fabric = self.context.fabric
        try:
            for before, (network, port) in enumerate(places):
                labels = self.networks.intents.labels(tenant.name).get(port.instance, {})
                work = functools.partial(fabric.plug, tenant, network, port, nic, [*beside, *places[:before]], labels)
                try:
                    await self.context.fabric_turn(tenant.name, work)
                except (Conflict, Unavailable):  # the network is full, or the nic is of another kind
                    raise
                except InsulaError:  # parts of the network are missing: repair it, and try once more
                    await self.networks.converged(tenant.name)
                    await self.context.fabric_turn(tenant.name, work)
            if any(port.allowed_pairs for _, port in places):  # the router learns who has them
                self.networks.nudge(tenant.name)
        finally:
            nic.close()

    async def withdraw(self, tenant: Tenant, port: Port, nic: Nic, beside: Sequence[Place]) -> None:
        """Disconnect an instance that runs from one of its networks, and close the nic. `beside` are its other ports.
        The port's counters stay until `unplug`."""
        await asyncio.shield(asyncio.ensure_future(self._withdraw(tenant, port, nic, beside)))

    async def _withdraw(self, tenant: Tenant, port: Port, nic: Nic, beside: Sequence[Place]) -> None:
        try:
            network, fabric = await self._network(port), self.context.fabric
            await self.context.fabric_turn(tenant.name, fabric.unplug, tenant, network, port, nic, beside)
        finally:
            nic.close()

    async def unplug(self, tenant: Tenant, ports: Sequence[Port]) -> None:
        """Remove ports and their addresses from the instance's name; nothing happens if they are not there."""
        for port in ports:
            network = None
            with suppress(NotFound, Failed):  # its record is gone, or damaged
                network = await self._network(port)
            if network:
                await self.context.fabric_call(tenant.name, self.context.fabric.unplug, tenant, network, port)


_parsed = functools.lru_cache(maxsize=1024)(ip_network)


def _address_kind(tenant: str, network: str) -> str:
    return f"address/{tenant}/{network}"


def by_interface(ports: Iterable[Port]) -> list[Port]:
    """Sort ports by their interfaces."""
    return sorted(ports, key=lambda port: (len(port.interface), port.interface))


def free_interfaces(beside: Sequence[Port]) -> Iterator[str]:
    """Yield the names of interfaces that none of these ports has."""
    taken = {port.interface for port in beside}
    return (name for number in count() if (name := f"eth{number}") not in taken)


def check_versions(network: Network, wanted: NetworkAttachment) -> None:
    """Raise Invalid for an IPv6 address on a network that has none."""
    if network.subnet6:
        return
    if wanted.address6:
        raise Invalid(f"network {network.name} has no IPv6", "leave the IPv6 address out")
    if any(":" in pair.address for pair in wanted.allowed_pairs):
        raise Invalid(f"network {network.name} has no IPv6", "leave the pair with an IPv6 address out")


def _pick_mac(network: Network, address: str, wanted: str | None, taken: set[str]) -> str:
    """Return `wanted`, or the first free one of the MAC addresses that `port_mac` derives from the IP address."""
    if wanted is None:
        identity = f"{network.tenant}/{network.name}/{network.created!r}"
        return next(mac for n in count() if (mac := port_mac(identity, address, n)) not in taken)
    if (mac := parse_mac(wanted)) in taken:
        raise Conflict(f"MAC address {mac} is taken", "leave it out to get a free one")
    return mac


def _mac_kind(tenant: str, network: str) -> str:
    return f"mac/{tenant}/{network}"


def port_reservations(port: Port) -> list[Reservation]:
    """The reservations of this port: its index, addresses and MAC address."""
    owner = f"{port.tenant}/{port.instance}"
    return [
        Reservation(_PORT, str(port.index), owner),
        Reservation(_mac_kind(port.tenant, port.network), port.mac, owner),
        *(Reservation(_address_kind(port.tenant, port.network), address, owner) for address in addresses(port)),
    ]


def is_port_reservation(entry: Entry, tenant: str, instance: str) -> bool:
    """Whether this entry of the store, below /claims, was made by `port_reservations` for that instance."""
    kind = entry.key.removeprefix("/claims/").split("/")[0]
    return kind in (_PORT, "address", "mac") and entry.value == f"{tenant}/{instance}".encode()
