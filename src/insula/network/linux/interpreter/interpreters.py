"""The interpreters of all tenants of this host, with their last results."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Final, Protocol

from insula.kernel.netlink import Rtnl
from insula.kernel.netlink.conntrack import ConnectionTable
from insula.kernel.netlink.nftables import NftablesSocket
from insula.kernel.nftables import Nft
from insula.model.objects import Tenant
from insula.network.intent import TenantIntent
from insula.network.interpreter.interpretation import Interpretation
from insula.network.interpreter.space import Boundaries, MakeBoundaries, NumberRange
from insula.network.interpreter.tracing import TracedPacket, TracedWay
from insula.network.linux import naming, sysctl
from insula.network.linux.interpreter.host import HostInterpreter, UplinkView
from insula.network.linux.interpreter.stack import Stack, StackReader
from insula.network.linux.interpreter.tenant import TenantInterpreter
from insula.network.linux.interpreter.tracer import trace_host, trace_tenant
from insula.network.linux.interpreter.view import DeviceNames, view
from insula.network.linux.naming import Naming

_LISTED: Final = 1 << 2 | 1 << 3 | 1 << 8 | 1 << 11
"""Flags of libnftables(3): a table with handles and numeric priorities, without elements and counters."""
_BRIDGED = dict(zip((4, 6), sysctl.BRIDGE_FILTERS, strict=False))

_DEVICES = DeviceNames(naming.port, naming.peering, naming.vxlan, naming.peering_vxlan, naming.bridge, naming.UPLINK)


class ReadNamespace(Protocol):
    """A tenant's namespace, as far as it is read: `linux.tenant.TenantNamespace`."""

    tenant: Tenant
    stack: StackReader
    tracked: ConnectionTable
    bridged: sysctl.OpenSettings
    nft: Nft


@dataclass(frozen=True)
class _Last:
    """The last result, and what it was computed from."""

    stack: Stack
    asked: object
    result: Interpretation


class Interpreters:
    def __init__(self, names: Naming, *, ipv6: bool) -> None:
        self._naming = names
        self._versions = (4, 6) if ipv6 else (4,)
        four, six = names.range4, names.range6
        self._translated = {
            4: NumberRange(int(four[0]), int(four[-1])),
            6: NumberRange(int(six[0]), int(six[-1])),
        }
        self._last: dict[str, _Last] = {}
        self._nftables: NftablesSocket | None = None
        self._reader: StackReader | None = None

    def open(self, host: Rtnl) -> None:
        """Open the host's namespace, which is the calling thread's."""
        self._nftables = NftablesSocket()
        self._reader = StackReader(host, self._nftables)

    def close(self) -> None:
        if self._nftables:
            self._nftables.close()
        self._nftables = self._reader = None
        self._last.clear()

    def tenant(
        self,
        namespace: ReadNamespace,
        intent: TenantIntent,
        running: Collection[int],
        cuts: MakeBoundaries,
    ) -> Interpretation:
        """Interpret a tenant's namespace; the last result is returned if nothing has changed."""
        name, asked = namespace.tenant.name, (intent, frozenset(running))
        stack = _read(namespace)
        last = self._last.get(name)
        if last is None or last.stack is not stack or last.asked != asked:
            boundaries = cuts()
            known = {version: boundaries[version] for version in self._versions}
            told = view(intent, running, known, _DEVICES, self._translated)
            last = self._last[name] = _Last(stack, asked, TenantInterpreter(stack, told).interpret())
        return last.result

    def host(self, tenants: Sequence[Tenant], offered: object, cuts: MakeBoundaries) -> Interpretation:
        """Interpret the host's namespace between these tenants; the last result is returned if nothing has changed."""
        assert self._reader is not None
        uplinks = self.uplinks(tenants)
        stack = self._reader.read(filters_bridged={})
        last, asked = self._last.get(""), (uplinks, offered)
        if last is None or last.stack is not stack or last.asked != asked:
            interpreter = HostInterpreter(stack, uplinks, cuts())
            inside = [interpreter.from_uplinks(version) for version in self._versions]
            above = [interpreter.from_others(version) for version in self._versions]
            unknown = set[str]().union(*(each.unknown for each in (*inside, *above)))
            last = self._last[""] = _Last(stack, asked, Interpretation("", inside, above, unknown=unknown))
        return last.result

    def trace(self, namespace: ReadNamespace, intent: TenantIntent, packet: TracedPacket) -> TracedWay:
        """Follow a packet through a tenant's namespace."""
        running = {port.index for port in intent.ports}
        stack = _read(namespace)
        known = {packet.version: Boundaries(packet.version)}
        told = view(intent, running, known, _DEVICES, self._translated)

        def listing(family: str, table: str) -> str:
            return namespace.nft.run(f"list table {family} {table}", _LISTED)

        return trace_tenant(TenantInterpreter(stack, told), packet, listing)

    def trace_host(self, tenant: Tenant, packet: TracedPacket) -> TracedWay:
        """Follow a packet from or to a tenant's uplink through the host's namespace."""
        assert self._reader is not None
        uplink = self._uplink(tenant)
        stack = self._reader.read(filters_bridged={})
        interpreter = HostInterpreter(stack, [uplink], {packet.version: Boundaries(packet.version)})
        if packet.source.place.kind == "tenant":
            own = int(ip_address(dict(uplink.addresses)[packet.version]))
            packet = packet._replace(source=packet.source._replace(address=NumberRange(own, own)))
        return trace_host(interpreter, uplink, packet)

    def guaranteed(self, numbers: Mapping[str, Sequence[int]]) -> dict[tuple[str, int], Sequence[str]]:
        """Return the addresses of instances with floors on the uplinks, by tenant and number of the guarantee."""
        return {(name, n): self._naming.guaranteed_addresses(n) for name, some in numbers.items() for n in some}

    def uplinks(self, tenants: Sequence[Tenant]) -> list[UplinkView]:
        """Return the uplinks of tenants, as they should be."""
        return [self._uplink(tenant) for tenant in tenants]

    def _uplink(self, tenant: Tenant) -> UplinkView:
        (_, four), (_, six) = self._naming.addresses(tenant.index)
        return UplinkView(tenant.name, self._naming.uplink(tenant.index), ((4, four), (6, six)))


def _read(namespace: ReadNamespace) -> Stack:
    values = namespace.bridged.read()
    return namespace.stack.read(filters_bridged={version: values[name] == "1" for version, name in _BRIDGED.items()})
