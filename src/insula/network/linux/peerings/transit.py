"""Service endpoints: an address in a tenant's own network that is one port of an instance of another tenant.

They are for tenants whose networks have the same addresses. Neither knows the other's: between the two routers packets
have *transit* addresses. The consumer's router translates the endpoint's address to a transit address of the service,
and the client's to one of its own; the provider's router translates the service's to the instance's. Both translations
are elements of maps. The transit addresses of a peering follow from its index. No tenant's network can have them: they
lie in 240.0.0.0/4, which is reserved (RFC 1112), and in the second half of the uplinks' IPv6 range. The clients of each
host have one of their own, so that the provider's hosts know where answers go.

The rules are in a table of their own, which only tenants with endpoints have.

The provider's policies see the consumer's transit address. Its side of the peering has to allow the port.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from ipaddress import IPv6Network, ip_address
from socket import AF_INET, AF_INET6, inet_pton
from typing import Final

from insula.kernel.netlink import Request
from insula.kernel.netlink.conntrack import ConntrackSocket, to
from insula.kernel.netlink.maps import KeyInterval, change, read
from insula.kernel.netlink.nftables import IFNAME, NftablesSocket
from insula.kernel.netns import call_in
from insula.kernel.nftables import Nft
from insula.model.objects import Network
from insula.network.intent import ConsumedService, PeeringIntent
from insula.network.linux import naming, rules
from insula.network.linux.naming import Naming

RANGE4: Final = "240.0.0.0/4"
MAPS: Final = ("endpoints4", "endpoints6", "transit4", "transit6")
_FIRST4: Final = 240 << 24
_PER_PEERING: Final = 8  # bits
_CONSUMERS: Final = {True: 1, False: 2}  # the number of the address that a consumer has, of the first or second tenant
_PROTOCOLS: Final = {"tcp": 6, "udp": 17}

Translations = dict[str, dict[KeyInterval, bytes]]
"""The elements of maps by their names."""

_RULES: Final = """
table inet {table} {{
    map endpoints4 {{ type ifname . ipv4_addr . inet_proto . inet_service : ipv4_addr; }}
    map endpoints6 {{ type ifname . ipv6_addr . inet_proto . inet_service : ipv6_addr; }}
    map transit4 {{ type ifname : ipv4_addr; }}
    map transit6 {{ type ifname : ipv6_addr; }}

    chain prerouting {{
        type nat hook prerouting priority -100; policy accept;
        meta l4proto {{ tcp, udp }} dnat ip to iifname . ip daddr . meta l4proto . th dport map @endpoints4
        meta l4proto {{ tcp, udp }} dnat ip6 to iifname . ip6 daddr . meta l4proto . th dport map @endpoints6
    }}
    chain forward {{
        type filter hook forward priority -10; policy accept;
        oifname "{peering}*" ip daddr {range4} goto translated
        oifname "{peering}*" ip6 daddr {range6} goto translated
    }}
    chain translated {{
        ct status dnat accept
        drop
    }}
    chain postrouting {{
        type nat hook postrouting priority 90; policy accept;
        oifname "{peering}*" ip daddr {range4} snat ip to oifname map @transit4
        oifname "{peering}*" ip6 daddr {range6} snat ip6 to oifname map @transit6
    }}
}}
"""


def table(prefix: str) -> str:
    """Return the name of the table in the namespaces of tenants with service endpoints."""
    return f"{prefix}-endpoints"


def text(prefix: str, range6: IPv6Network) -> str:
    """Return the table's rules."""
    return _RULES.format(table=table(prefix), peering=naming.PEERING, range4=RANGE4, range6=range6)


def subnets(index: int, range6: IPv6Network) -> list[str]:
    """Return the transit addresses of a peering, IPv4 and IPv6."""
    return [f"{_address(4, index, 0, range6)}/24", f"{_address(6, index, 0, range6)}/120"]


def addresses_of(index: int, number: int, range6: IPv6Network) -> list[str]:
    """Return the transit addresses with a number of a peering, IPv4 and IPv6."""
    return [_address(version, index, number, range6) for version in (4, 6)]


def _address(version: int, index: int, number: int, range6: IPv6Network) -> str:
    offset = index << _PER_PEERING | number
    if version == 4:
        return str(ip_address(_FIRST4 + offset))
    return str(range6[(range6.num_addresses >> 1) + offset])


def hosts(peering: PeeringIntent, range6: IPv6Network) -> dict[str, str]:
    """Return the underlay addresses of the hosts where transit addresses of the peering are reached: those of the
    services that the tenant consumes, and those of the clients of what it provides."""
    found = {}
    for each in peering.consumes:
        for address in each.addresses if each.host else ():
            found[_address(_version(address), peering.index, each.number, range6)] = each.host or ""
    for number, host in peering.clients.items():
        found |= {_address(version, peering.index, number, range6): host for version in (4, 6)}
    return found


def clients(peering: PeeringIntent, range6: IPv6Network) -> list[str]:
    """Return the transit addresses that clients of other hosts have."""
    return [_address(version, peering.index, number, range6) for number in peering.clients for version in (4, 6)]


def addresses(networks: Mapping[str, Network], peerings: Iterable[PeeringIntent]) -> dict[int, list[str]]:
    """Return the addresses of endpoints by the index of their network's bridge: the bridge answers for them."""
    found: dict[int, list[str]] = {}
    for peering in peerings:
        for endpoint in peering.consumes:
            if network := networks.get(endpoint.network):
                found.setdefault(naming.bridge_index(network.index), []).extend(endpoint.addresses)
    return found


def pinged(networks: Mapping[str, Network], peerings: Iterable[PeeringIntent]) -> dict[str, list[tuple[str, ...]]]:
    """Return the set elements by which the router answers pings to endpoints, whether the service runs or not."""
    found: dict[str, list[tuple[str, ...]]] = {"inet endpoints4": [], "inet endpoints6": []}
    for each in [endpoint for peering in peerings for endpoint in peering.consumes]:
        if network := networks.get(each.network):
            for address in each.addresses:
                found[f"inet endpoints{_version(address)}"].append((naming.bridge(network.index), address))
    return found


def paths(networks: Mapping[str, Network], peering: PeeringIntent) -> list[tuple[str, ...]]:
    """Return the paths from networks with endpoints to the peering that they use."""
    used = [(networks[each.network], each) for each in peering.consumes if each.network in networks]
    return [(naming.bridge(network.index), device(peering, each)) for network, each in used]


def device(peering: PeeringIntent, service: ConsumedService) -> str:
    """Return the device by which a service is reached."""
    return naming.peering_vxlan(peering.index) if service.host else naming.peering(peering.index)


def wanted(
    tenant: str, networks: Mapping[str, Network], peerings: Iterable[PeeringIntent], range6: IPv6Network
) -> Translations:
    """Return the elements of a tenant's maps, for what it consumes and what it provides."""
    found: Translations = {name: {} for name in MAPS}
    for peering in peerings:
        index = peering.index
        consumer = peering.client or _CONSUMERS[tenant < peering.peer.name]
        for endpoint in peering.consumes:
            network = networks.get(endpoint.network)
            for address in endpoint.addresses if network else ():
                assert network is not None
                version = _version(address)
                key = _key(naming.bridge(network.index), address, endpoint.protocol, endpoint.port)
                found[f"endpoints{version}"][key] = _packed(_address(version, index, endpoint.number, range6))
                own = _packed(_address(version, index, consumer, range6))
                found[f"transit{version}"][KeyInterval(_device(device(peering, endpoint)))] = own
        for service in peering.provides:
            for address in service.addresses:
                version = _version(address)
                there = _address(version, index, service.number, range6)
                for name in (naming.peering(index), *([naming.peering_vxlan(index)] if peering.clients else [])):
                    key = _key(name, there, service.protocol, service.port)
                    found[f"endpoints{version}"][key] = _packed(address)
    return found


def apply(nft: Nft, nftables: NftablesSocket, prefix: str, want: Translations, range6: IPv6Network) -> list[str]:
    """Change the maps to these elements, and remove the table when there are none; returns the addresses whose
    translation has changed or is gone."""
    name = table(prefix)
    if any(want.values()):
        rules.install(nft, name, ("inet",), text(prefix, range6))
    elif ("inet", name) not in nft.tables():
        return []
    requests: list[Request] = []
    changed: set[str] = set()
    for each in MAPS:
        have = read(nftables, "inet", name, each)
        requests += change("inet", name, each, have, want[each])
        if each.startswith("endpoints"):
            gone = (key for key, value in have.items() if want[each].get(key) != value)
            changed |= {_address_of(key) for key in gone}
    nftables.transact(*requests)
    if not any(want.values()):
        nft.run(f"delete table inet {name}\n")
    return sorted(changed)


class ServiceState:
    """The installed endpoints of the namespace `netns`. `nft` is a handle there."""

    def __init__(self, netns: int, nft: Nft, names: Naming) -> None:
        self._nft = nft
        self._names = names
        self._is_there = ("inet", table(names.prefix)) in nft.tables()
        self._maps: Translations = {}
        if self._is_there:
            with call_in(netns, NftablesSocket) as nftables:
                self._maps = {each: read(nftables, "inet", table(names.prefix), each) for each in MAPS}

    def endpoints(self) -> dict[str, set[str]]:
        """Return the addresses of endpoints by device: those of the tenant's bridges, and those of peerings."""
        found: dict[str, set[str]] = {}
        for key in [key for name, some in self._maps.items() if name.startswith("endpoints") for key in some]:
            device = key.first[:IFNAME].rstrip(b"\0").decode(errors="replace")
            found.setdefault(device, set()).add(_address_of(key))
        return found

    def drift(self) -> Iterator[str]:
        """Yield differences of the rules from those that belong there, as text."""
        name = table(self._names.prefix)
        if self._is_there:
            wanted = rules.as_listed(text(self._names.prefix, self._names.range6), name)["inet"]
            if self._nft.rules("inet", name) != wanted:
                yield f"the rules of table inet {name} differ"


def _address_of(key: KeyInterval) -> str:
    size = 16 if len(key.first) > IFNAME + 12 else 4
    return str(ip_address(key.first[IFNAME : IFNAME + size]))


def cut(destinations: Iterable[str]) -> None:
    """Delete tracked connections to these addresses: their translation lasts as long as they. Runs in the tenant's
    namespace."""
    with ConntrackSocket() as conntrack:
        conntrack.delete(to(each) for each in destinations)


def _version(address: str) -> int:
    return 6 if ":" in address else 4


def _packed(address: str) -> bytes:
    return inet_pton(AF_INET6 if ":" in address else AF_INET, address)


def _device(name: str) -> bytes:
    return name.encode().ljust(IFNAME, b"\0")


def _key(device: str, address: str, protocol: str, port: int) -> KeyInterval:
    service = bytes((_PROTOCOLS[protocol], 0, 0, 0)) + port.to_bytes(2, "big") + b"\0\0"
    return KeyInterval(_device(device) + _packed(address) + service)
