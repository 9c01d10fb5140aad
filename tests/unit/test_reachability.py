"""Intent: reachability is computed from the desired state, and from the installed state."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from insula.model.objects import Network, Port
from insula.network import endpoints
from insula.network.addresses import link_local, port_mac
from insula.network.fabric import Installed, InstalledNetwork, InstalledPort
from insula.network.proof import reachability


def network(tenant: str, index: int, nth: int = 0) -> Network:
    """The nth network of a tenant: all tenants have the same ranges."""
    return Network(
        tenant=tenant, name=f"n{index}", index=index, vni=index, subnet=f"10.{nth}.0.0/24", gateway=f"10.{nth}.0.1",
        subnet6=f"fd0{nth}::/64", gateway6=f"fd0{nth}::1", created=0.0,
    )  # fmt: skip


def port(net: Network, index: int) -> Port:
    return Port(
        tenant=net.tenant, network=net.name, instance=f"i{index}", index=index, mac=port_mac(net.name, str(index)),
        address=f"{net.gateway[:-1]}{index + 2}", address6=f"{str(net.gateway6)[:-1]}{index + 2:x}",
    )  # fmt: skip


@st.composite
def clouds(draw: st.DrawFn) -> tuple[list[Network], list[Port]]:
    """Up to three tenants with networks that have the same addresses in each, and instances on them."""
    owners = draw(st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=5))
    networks = [network(tenant, i + 1, owners[:i].count(tenant)) for i, tenant in enumerate(owners)]
    places = draw(st.lists(st.integers(0, len(networks) - 1), max_size=8))
    return networks, [port(networks[place], i) for i, place in enumerate(places)]


def as_installed(networks: list[Network], ports: list[Port]) -> list[Installed]:
    """The read-back of a fabric that has done its work."""
    index = {(n.tenant, n.name): n.index for n in networks}
    return [
        Installed(
            tenant=tenant,
            namespace=True,
            networks=[
                InstalledNetwork(
                    index=n.index,
                    device=f"br{n.index}",
                    gateways=[f"{n.gateway}/24", f"{n.gateway6}/64"],
                    mtu=1500,
                    up=True,
                    reaches=[n.index],
                    outbound=True,
                    routes={},
                )
                for n in networks
                if n.tenant == tenant
            ],
            ports=[
                InstalledPort(
                    index=p.index, device=f"p{p.index}", network=index[p.tenant, p.network], macs=[p.mac],
                    addresses=[p.address], addresses6=[str(p.address6), link_local(p.mac)], up=True,
                )
                for p in ports
                if p.tenant == tenant
            ],
            rules="",
            drift=[],
        )
        for tenant in sorted({n.tenant for n in networks})
    ]  # fmt: skip


def all_endpoints(networks: list[Network], ports: list[Port]) -> list[endpoints.Endpoint]:
    by_name = {(n.tenant, n.name): n for n in networks}
    found = [e for p in ports for e in endpoints.of_port(p, by_name[p.tenant, p.network])]
    found += [e for n in networks for e in endpoints.of_gateway(n)]
    for tenant in {n.tenant for n in networks}:
        found += [*endpoints.outside(tenant), endpoints.Endpoint("host", tenant, 0, "host", "100.64.0.2")]
    return found


@given(clouds())
def test_tenants_and_networks_are_not_connected(cloud: tuple[list[Network], list[Port]]) -> None:
    for source, target in reachability.pairs(all_endpoints(*cloud)):
        wanted = reachability.WantedReachability(cloud[0])(source, target)
        if source.kind != "instance" or target.kind == "host":
            assert not wanted
        elif target.kind == "outside":
            assert wanted
        else:
            assert wanted == (source.tenant == target.tenant and source.network == target.network)


@given(clouds())
def test_the_installed_state_permits_the_desired_paths(cloud: tuple[list[Network], list[Port]]) -> None:
    permitted = reachability.InstalledReachability(as_installed(*cloud), cloud[1])
    wanted = reachability.WantedReachability(cloud[0])
    for pair in reachability.pairs(all_endpoints(*cloud)):
        assert permitted(*pair) == wanted(*pair), pair
    for one in as_installed(*cloud):
        assert reachability.differences(one, *cloud) == []


@given(clouds())
def test_every_pair_of_instances_is_compared(cloud: tuple[list[Network], list[Port]]) -> None:
    asked = {(s.label, t.label) for s, t in reachability.pairs(all_endpoints(*cloud))}
    labels = [f"{p.tenant}/{p.instance}" for p in cloud[1]]
    assert asked >= {(a, b) for a in labels for b in labels if a != b}
    assert asked >= {(end, a) for a in labels for end in ("host", "outside")}
    assert asked >= {(a, end) for a in labels for end in ("host", "outside")}


def test_a_port_on_the_wrong_bridge_is_seen() -> None:
    networks = [network("a", 1), network("a", 2, 1)]
    ports = [port(networks[0], 1), port(networks[0], 2)]
    moved = [Port(**{**{f: getattr(p, f) for f in p.__struct_fields__}, "network": "n2"}) for p in ports[1:]]
    installed = as_installed(networks, [ports[0], *moved])
    one, two = (endpoints.of_port(p, networks[0])[0] for p in ports)
    assert reachability.WantedReachability(networks)(one, two)
    assert not reachability.InstalledReachability(installed, ports)(one, two)
    assert reachability.differences(installed[0], networks, ports) == ["port of i2 is not on network n1"]


def test_missing_and_foreign_parts_are_named() -> None:
    networks = [network("a", 1)]
    installed = as_installed([*networks, network("a", 2, 1)], [port(networks[0], 1)])[0]
    assert reachability.differences(installed, networks, [port(networks[0], 2)]) == [
        "port of i2 is missing",
        "br2 belongs to no network",
        "p1 belongs to no instance",
    ]
    empty = Installed(tenant="a", namespace=True, networks=[], ports=[], rules="", drift=[])
    assert reachability.differences(empty, networks, []) == ["network n1 is missing"]


@pytest.mark.parametrize(
    ("part", "change", "says"),
    [
        ("networks", {"gateways": ["10.0.0.1/24"]}, "network n1: gateways are ['10.0.0.1'], not"),
        ("networks", {"gateways": ["10.0.0.9/24", "fd00::1/64"]}, "network n1: gateways are ['10.0.0.9',"),
        ("networks", {"mtu": 1400}, "network n1: MTU is 1400, not 1500"),
        ("ports", {"network": 2}, "port of i1 is not on network n1"),
        ("ports", {"network": None}, "port of i1 is not on network n1"),
        ("ports", {"macs": []}, "port of i1: MAC addresses are [], not"),
        ("ports", {"macs": ["02:10:00:00:00:01"]}, "port of i1: MAC addresses are ['02:10:00:00:00:01'], not"),
        ("ports", {"addresses": ["10.0.0.3", "10.0.0.4"]}, "port of i1: IPv4 addresses are ['10.0.0.3',"),
        ("ports", {"addresses6": ["fd00::3"]}, "port of i1: IPv6 addresses are ['fd00::3'], not"),
    ],
)  # fmt: skip
def test_every_difference_is_named(part: str, change: dict[str, object], says: str) -> None:
    networks = [network("a", 1)]
    ports = [port(networks[0], 1)]
    installed = as_installed(networks, ports)[0]
    assert reachability.differences(installed, networks, ports) == [], "the positive control"
    (one,) = getattr(installed, part)
    drifted = msgspec.structs.replace(installed, **{part: [msgspec.structs.replace(one, **change)]})
    (said,) = reachability.differences(drifted, networks, ports)
    assert said.startswith(says)


def test_a_network_without_ipv6_has_no_ipv6_address_installed() -> None:
    both = network("a", 1)
    four = msgspec.structs.replace(both, subnet6=None, gateway6=None)
    plugged = msgspec.structs.replace(port(both, 1), address6=None)
    installed = as_installed([both], [port(both, 1)])[0]
    (net,), (there,) = installed.networks, installed.ports
    bare = msgspec.structs.replace(
        installed,
        networks=[msgspec.structs.replace(net, gateways=net.gateways[:1])],
        ports=[msgspec.structs.replace(there, addresses6=[])],
    )
    assert reachability.differences(bare, [four], [plugged]) == []
    (said,) = reachability.differences(msgspec.structs.replace(bare, ports=[there]), [four], [plugged])
    assert said.startswith("port of i1: IPv6 addresses are")
    assert [e.version for e in endpoints.of_port(plugged, four)] == [4]
    assert [e.version for e in endpoints.of_gateway(both)] == [4, 6]


@pytest.mark.parametrize(
    "what", ["the port is down", "its network is down", "it is not plugged in", "it has another address"]
)
def test_missing_or_down_devices_permit_nothing(what: str) -> None:
    """`wanted` computes the desired reachability, `InstalledReachability` the one of the installed state."""
    networks = [network("a", 1)]
    ports = [port(networks[0], 1), port(networks[0], 2)]
    installed = as_installed(networks, ports)[0]
    one, two = installed.ports
    match what:
        case "the port is down":
            installed = msgspec.structs.replace(installed, ports=[msgspec.structs.replace(one, up=False), two])
        case "its network is down":
            down = [msgspec.structs.replace(n, up=False) for n in installed.networks]
            installed = msgspec.structs.replace(installed, networks=down)
        case "it is not plugged in":
            installed = msgspec.structs.replace(installed, ports=[two])
        case "it has another address":
            moved = msgspec.structs.replace(one, addresses=["10.0.0.99"], addresses6=[])
            installed = msgspec.structs.replace(installed, ports=[moved, two])
    permitted = reachability.InstalledReachability([installed], ports)
    (source, *_), (other, *_) = (endpoints.of_port(p, networks[0]) for p in ports)
    gateway, outside = endpoints.of_gateway(networks[0])[0], endpoints.outside("a")[0]
    network_only = what == "its network is down"
    assert permitted(source, other) == permitted(other, source) == network_only, "a bridge's own state is its gateway's"
    assert not permitted(source, gateway)
    assert permitted(other, gateway) != network_only, "the positive control"
    assert permitted(source, outside) == network_only
    assert permitted(other, outside)


def test_labels() -> None:
    made = all_endpoints([network("a", 1)], [port(network("a", 1), 1)])
    assert {e.label for e in made} == {"a/i1", "a/gateway:n1", "outside", "host"}
