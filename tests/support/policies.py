"""Strategies of hypothesis for policies, and the judgement of chains.py by the sets that the kernel has."""

from __future__ import annotations

import struct
from ipaddress import ip_address

from hypothesis import strategies as st
from msgspec.structs import replace

from insula.kernel.netlink.maps import KeyInterval
from insula.model.objects import Network, Port, Tenant
from insula.model.policies import (
    AddressGroup,
    AnyPeer,
    CidrPeer,
    Direction,
    GroupPeer,
    InstancePeer,
    LabelRequirement,
    NamePeer,
    OperatorPolicy,
    OperatorRule,
    Policy,
    PolicyRule,
    PortMatch,
    Selector,
)
from insula.network.intent import PolicyIntent, TenantIntent
from insula.network.linux.policy.elements import SetContents

PROTOCOLS = {"icmp": 1, "tcp": 6, "udp": 17, "sctp": 132, "icmpv6": 58}
TENANT = Tenant(name="acme", index=1, id_base=1 << 16, created=0)
CIDRS = ("10.0.0.0/8", "10.0.0.0/24", "10.0.0.2/32", "10.1.0.0/16", "203.0.113.0/24", "203.0.113.7/32", "0.0.0.0/0",
         "fd00::/8", "fd00:1::/64", "fd00::2/128", "::/0", "2001:db8::/32")  # fmt: skip
OUTSIDE = ("203.0.113.7", "203.0.113.200", "198.51.100.1", "2001:db8::1", "2001:db9::1")
PORTS = (1, 22, 80, 81, 443, 1024, 1039, 1040, 30000, 65535)

NETWORKS = [
    Network(tenant="acme", name=name, index=index, vni=index, subnet=f"10.{index - 1}.0.0/24",
            gateway=f"10.{index - 1}.0.1", subnet6=f"fd00:{index - 1}::/64", gateway6=f"fd00:{index - 1}::1", created=0)
    for index, name in ((1, "front"), (2, "back"))
]  # fmt: skip


def port_of(instance: str, network: Network, number: int) -> Port:
    """Return the port of an instance on a network, with the network's `number`th addresses."""
    index = network.index * 1000 + number
    return Port(
        tenant="acme",
        network=network.name,
        instance=instance,
        index=index,
        mac=f"02:42:00:{network.index:02x}:{number >> 8:02x}:{number & 255:02x}",
        address=str(ip_address(network.subnet.partition("/")[0]) + number),
        address6=str(ip_address((network.subnet6 or "").partition("/")[0]) + number),
    )


# -- strategies --------------------------------------------------------------------------------------------------------

KEYS, VALUES = ("app", "tier"), ("a", "b")
labels = st.dictionaries(st.sampled_from(KEYS), st.sampled_from(VALUES))
requirements = st.builds(
    LabelRequirement,
    key=st.sampled_from(KEYS),
    operator=st.sampled_from(("In", "NotIn", "Exists", "DoesNotExist")),
    values=st.lists(st.sampled_from(VALUES), min_size=1, max_size=2),
)
selectors = st.builds(Selector, labels=labels, expressions=st.lists(requirements, max_size=1))
cidrs = st.sampled_from(CIDRS)
peers = st.one_of(
    st.builds(AnyPeer),
    st.builds(InstancePeer, select=selectors, network=st.sampled_from((None, "front", "back"))),
    st.builds(CidrPeer, cidr=cidrs, exceptions=st.lists(cidrs, max_size=2)),
    st.builds(GroupPeer, group=st.sampled_from(("office", "gone"))),
    st.builds(NamePeer, name=st.just("example.com")),
)
port_matches = st.one_of(
    st.builds(PortMatch, protocol=st.sampled_from(("tcp", "udp", "icmp", "icmpv6"))),
    st.builds(PortMatch, protocol=st.sampled_from(("tcp", "udp")), port=st.sampled_from(PORTS)),
    st.builds(lambda p, a, b: PortMatch(protocol=p, port=min(a, b), end_port=max(a, b)),
              st.sampled_from(("tcp", "udp")), st.sampled_from(PORTS), st.sampled_from(PORTS)),
    st.builds(PortMatch, protocol=st.sampled_from(("icmp", "icmpv6")), icmp_type=st.sampled_from((8, 13, 128))),
)  # fmt: skip
ports = st.lists(port_matches, max_size=3)
directions: st.SearchStrategy[list[Direction]] = st.sampled_from((["in"], ["out"], ["in", "out"]))


@st.composite
def policies(draw: st.DrawFn, name: str) -> Policy:
    chosen = draw(directions)
    rule = st.builds(
        PolicyRule, direction=st.sampled_from(chosen), peers=st.lists(peers, min_size=1, max_size=2), ports=ports
    )
    return Policy(
        tenant="acme",
        name=name,
        select=draw(selectors),
        directions=chosen,
        rules=draw(st.lists(rule, max_size=3)),
        audit=draw(st.integers(0, 4)) == 0,
        dns=draw(st.booleans()),
        created=0,
    )


operator_rules = st.builds(
    OperatorRule,
    action=st.sampled_from(("accept", "deny", "pass")),
    direction=st.sampled_from(("in", "out")),
    peers=st.lists(st.one_of(st.builds(AnyPeer), st.builds(CidrPeer, cidr=cidrs)), min_size=1, max_size=2),
    ports=ports,
)


@st.composite
def intents(draw: st.DrawFn) -> TenantIntent:
    """A tenant with two networks, six instances, up to five policies, a group and some rules of the operator."""
    number = draw(st.integers(0, 5))
    office = draw(st.lists(cidrs, min_size=1, max_size=3))
    groups = [AddressGroup(tenant="acme", name="office", cidrs=office, created=0)]
    tier = [OperatorPolicy(name="o", rules=draw(st.lists(operator_rules, min_size=1, max_size=4)), created=0)]
    plugged = [port_of(f"i{n}", NETWORKS[n % 2], 2 + n // 2) for n in range(6)]
    return TenantIntent(
        tenant=TENANT,
        networks=NETWORKS,
        ports=plugged,
        policy=PolicyIntent(
            policies=[draw(policies(f"p{n}")) for n in range(number)],
            groups=groups,
            labels={port.instance: draw(labels) for port in plugged},
            operator=tier if draw(st.booleans()) else [],
        ),
    )


@st.composite
def others(draw: st.DrawFn, policy: PolicyIntent) -> PolicyIntent:
    """The same policies with some other labels, or another group."""
    changed = draw(st.dictionaries(st.sampled_from([*policy.labels]), labels, max_size=2))
    office = draw(st.lists(cidrs, min_size=1, max_size=3)) if draw(st.booleans()) else policy.groups[0].cidrs
    groups = [AddressGroup(tenant="acme", name="office", cidrs=office, created=0)]
    return replace(policy, labels={**policy.labels, **changed}, groups=groups)


connections = st.tuples(
    st.sampled_from(("tcp", "udp", "icmp", "icmpv6", "sctp")),
    st.one_of(st.sampled_from(PORTS), st.sampled_from((8, 13, 128, 2, 5000, 65534))),
)

# -- judgement by sets -------------------------------------------------------------------------------------------------


def judged(sets: SetContents, source: str, destination: str, protocol: str, port: int, crossing: str = "") -> str:
    """Judge a connection as chains.py does, by the entries of sets. `crossing` is "out" or "in" for one that crosses
    the uplink. Returns "unknown", "operator", "out", "in", or "" for one that passes."""
    none = struct.pack("=I", 0)

    def exact(name: str, key: bytes) -> bytes | None:
        return sets[name].get(KeyInterval(key))

    def within(name: str, key: bytes) -> bytes | None:
        return next((value for (first, last), value in sets[name].items() if first <= key <= last), None)

    def packed(address: str) -> tuple[int, bytes]:
        one = ip_address(address)
        return one.version, one.packed

    def subject(address: str) -> bytes:
        version, key = packed(address)
        return exact(f"subjects{version}", key) or none

    def peer(address: str) -> bytes:
        version, key = packed(address)
        return exact(f"peers{version}", key) or within(f"ranges{version}", key) or none

    number = PROTOCOLS[protocol]
    asked = port << 8 if protocol in ("icmp", "icmpv6") else port

    def granted(ports: bytes | None) -> bool:
        if ports is None:
            return False
        head, tail = ports + bytes((number, 0, 0, 0)), asked.to_bytes(2, "big") + b"\0\0"
        found = exact("everything", ports) is not None or exact("protocols", head) is not None
        if protocol in ("tcp", "udp"):
            found = found or within("port_ranges", head + tail) is not None
        if protocol != "sctp":
            found = found or exact("ports", head + tail) is not None
        return found

    if exact("unknown", peer(source)) is not None:
        return "unknown"
    if crossing:
        version, key = packed(destination if crossing == "out" else source)
        of_ports = none if protocol == "sctp" else within(f"operator_{protocol}", asked.to_bytes(2, "big")) or none
        cell = (within(f"operator{version}", key) or none) + of_ports
        if exact(f"operator_accept_{crossing}", cell) is not None:
            return ""
        if exact(f"operator_deny_{crossing}", cell) is not None:
            return "operator"
    for direction, mine, other in (("out", source, destination), ("in", destination, source)):
        one = subject(mine)
        if exact(f"isolated_{direction}", one) is None:
            continue
        grants = exact(f"pairs_{direction}", one + peer(other)), exact(f"to_all_{direction}", one)
        if not any(map(granted, grants)):
            return direction
    return ""
