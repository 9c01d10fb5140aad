"""Addresses: allocated ones are free, inside the subnet, and not the gateway's."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from insula.model.errors import Conflict, Invalid
from insula.network import addresses


@st.composite
def subnets(draw: st.DrawFn, version: int | None = None) -> addresses.Subnet:
    """Subnets that a tenant may have, small ones more often."""
    if (version or draw(st.sampled_from([4, 6]))) == 4:
        prefix = draw(st.integers(8, 30))
        number = (10 << 24) | draw(st.integers(0, (1 << 24) - 1))
        return IPv4Network((number >> (32 - prefix) << (32 - prefix), prefix))
    prefix = draw(st.integers(16, 126))
    number = (0xFD << 120) | draw(st.integers(0, (1 << 120) - 1))
    return IPv6Network((number >> (128 - prefix) << (128 - prefix), prefix))


@given(subnets())
def test_a_subnet_is_read_back_as_it_was_written(subnet: addresses.Subnet) -> None:
    assert addresses.parse_subnet(str(subnet), subnet.version) == subnet


@given(subnets(), st.integers(0, 40))
def test_allocation_never_repeats_and_stays_inside(subnet: addresses.Subnet, count: int) -> None:
    taken: set[str] = set()
    room = subnet.num_addresses - (3 if subnet.version == 4 else 2)
    for _ in range(min(count, room)):
        given_out = addresses.allocate(subnet, taken)
        assert given_out not in taken
        assert ip_address(given_out) in subnet
        assert given_out not in {str(subnet.network_address), addresses.gateway_of(subnet)}
        assert subnet.version == 6 or given_out != str(subnet.broadcast_address)
        assert addresses.allocate(subnet, taken, given_out) == given_out
        taken.add(given_out)
    if count > room:
        with pytest.raises(Conflict, match="no free address"):
            addresses.allocate(subnet, taken)


@given(subnets(), st.sets(st.integers(0, 30), max_size=12))
def test_the_lowest_free_address_is_given(subnet: addresses.Subnet, gaps: set[int]) -> None:
    top = min(30, subnet.num_addresses - (2 if subnet.version == 4 else 1))
    usable = [str(subnet[i]) for i in range(2, top + 1)]
    taken = {a for i, a in enumerate(usable) if i not in gaps}
    free = [a for a in usable if a not in taken]
    if free:
        assert addresses.allocate(subnet, taken) == free[0]


@given(subnets(), st.sets(st.integers(0, 30), max_size=12), st.integers(0, 30))
def test_the_next_free_address_is_given_and_the_one_before_last_of_all(
    subnet: addresses.Subnet, used: set[int], last: int
) -> None:
    whole = IPv4Network if subnet.version == 4 else IPv6Network
    small = whole((int(subnet.network_address) >> 5 << 5, subnet.max_prefixlen - 5))
    usable = [str(small[i]) for i in range(2, 31 if subnet.version == 4 else 32)]
    taken = {a for i, a in enumerate(usable) if i in used}
    circle = usable[last + 1 :] + usable[: last + 1]
    after = usable[min(last, len(usable) - 1)]
    free = [a for a in circle if a not in taken]
    given_out = set(taken)
    for address in free:
        after = addresses.allocate(small, given_out, None, after)
        assert after == address
        given_out.add(after)
    with pytest.raises(Conflict, match="no free address"):
        addresses.allocate(small, given_out, None, after)


def test_an_address_that_was_given_back_is_given_again_when_all_others_were() -> None:
    subnet, last = ip_network("10.0.0.0/29"), None
    given_out = []
    for _ in range(7):
        last = addresses.allocate(subnet, (), None, last)
        given_out.append(last)
    assert given_out == [*(f"10.0.0.{n}" for n in range(2, 7)), "10.0.0.2", "10.0.0.3"]


@given(subnets(), st.one_of(st.ip_addresses(), subnets().map(lambda s: s.network_address)))
def test_a_wanted_address_is_given_exactly_when_it_may_be(
    subnet: addresses.Subnet, wanted: IPv4Address | IPv6Address
) -> None:
    forbidden = {subnet.network_address, subnet[1]} | ({subnet.broadcast_address} if subnet.version == 4 else set())
    if wanted.version == subnet.version and wanted in subnet and wanted not in forbidden:
        assert addresses.allocate(subnet, (), str(wanted)) == str(wanted)
        with pytest.raises(Conflict, match="taken"):
            addresses.allocate(subnet, {str(wanted)}, str(wanted))
    else:
        with pytest.raises((Invalid, Conflict)):
            addresses.allocate(subnet, (), str(wanted))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "CIDR"),
        ("10.0.0.0", "CIDR"),
        ("10.0.0.0/33", "CIDR"),
        ("ten/8", "CIDR"),
        ("10.0.0.1/24", "the network is 10.0.0.0/24"),
        ("fd00::/64", "not an IPv4"),
        ("10.0.0.0/31", "size"),
        ("10.0.0.0/7", "size"),
        ("0.0.0.0/0", "size"),
        ("127.0.0.0/8", "loopback"),
        ("169.254.0.0/24", "link-local"),
        ("240.0.0.0/8", "multicast"),
        ("192.0.2.0/25", "outside"),
        ("100.64.3.0/24", "uplinks"),
        ("10.0.0.0/24\nx", "CIDR"),
    ],
)
def test_bad_subnets_are_refused_in_one_line(text: str, says: str) -> None:
    with pytest.raises(Invalid, match=says) as refused:
        addresses.parse_subnet(text, 4, reserved=["100.64.0.0/10"])
    assert "\n" not in str(refused.value)
    assert refused.value.hint


@pytest.mark.parametrize(("version", "shortest", "longest"), [(4, 8, 30), (6, 16, 126)])
def test_the_shortest_and_the_longest_prefix(version: int, shortest: int, longest: int) -> None:
    start = "10.0.0.0" if version == 4 else "fd00::"
    for prefix in (shortest, longest):
        subnet = addresses.parse_subnet(f"{start}/{prefix}", version)
        assert subnet.prefixlen == prefix
        assert addresses.allocate(subnet, ()) == str(subnet[2]), "it has room for an instance"
    for prefix in (*range(shortest - 7, shortest), *range(longest + 1, 33 if version == 4 else 129)):
        base = ip_network(f"{start}/{prefix}", strict=False)
        with pytest.raises(Invalid, match="size"):
            addresses.parse_subnet(str(base), version)


def cidrs() -> st.SearchStrategy[str]:
    """Networks as text, most of them right or nearly, and any text at all."""
    written = st.builds("{}/{}".format, st.ip_addresses(), st.integers(-1, 130))
    return st.one_of(written, subnets().map(str), st.text(max_size=30), st.text("0123456789abcdef.:/% \n", max_size=24))


@given(cidrs(), st.sampled_from([4, 6]))
def test_any_text_is_a_subnet_that_may_be_used_or_invalid(text: str, version: int) -> None:
    try:
        subnet = addresses.parse_subnet(text, version)
    except Invalid as error:
        assert "\n" not in str(error) and error.hint
        return
    assert subnet == ip_network(text) and subnet.version == version
    assert (8 if version == 4 else 16) <= subnet.prefixlen <= (30 if version == 4 else 126)
    for special in (subnet.network_address, subnet.broadcast_address):
        assert not (special.is_loopback or special.is_link_local or special.is_multicast or special.is_unspecified)
    for reserved in map(ip_network, addresses.RESERVED):
        assert reserved.version != version or not subnet.overlaps(reserved)


@given(subnets(), st.one_of(st.ip_addresses().map(str), subnets().map(lambda s: str(s[2])), st.text(max_size=30)))
def test_any_text_is_an_address_of_the_subnet_or_refused(subnet: addresses.Subnet, text: str) -> None:
    try:
        given_out = addresses.allocate(subnet, (), text)
    except (Invalid, Conflict) as error:
        assert "\n" not in str(error) and error.hint
        return
    address = ip_address(given_out)
    assert given_out == str(address) == str(ip_address(text)) and address in subnet
    assert address not in (subnet.network_address, subnet[1])
    assert subnet.version == 6 or address != subnet.broadcast_address


@pytest.mark.parametrize("reserved", addresses.RESERVED)
def test_no_subnet_within_or_around_a_reserved_range_may_be_used(reserved: str) -> None:
    whole = ip_network(reserved)
    longest = 30 if whole.version == 4 else 126
    make = IPv4Network if whole.version == 4 else IPv6Network
    first = make((int(whole.network_address), max(whole.prefixlen, 8 if whole.version == 4 else 16)))
    ends = make((int(whole.broadcast_address) >> 2 << 2, longest))
    for subnet in (first, ends, make((int(whole.network_address), longest))):
        with pytest.raises(Invalid, match="can't be used"):
            addresses.parse_subnet(str(subnet), whole.version)


def test_overlap_is_a_conflict_that_names_the_network() -> None:
    others = [("front", "10.0.0.0/16"), ("back", None), ("six", "fd00::/64")]
    with pytest.raises(Conflict, match="front"):
        addresses.check_disjoint(ip_network("10.0.4.0/24"), others)
    for six in ("fd00::/64", "fd00::/16", "fd00::8000:0:0:0/65", "fd00::/126"):
        with pytest.raises(Conflict, match=r"overlaps fd00::/64 of network six"):
            addresses.check_disjoint(ip_network(six), others)
    for four in ("10.0.0.0/16", "10.0.0.0/8", "10.0.255.252/30"):
        with pytest.raises(Conflict, match=r"overlaps 10.0.0.0/16 of network front"):
            addresses.check_disjoint(ip_network(four), others)
    addresses.check_disjoint(ip_network("fd00:0:0:1::/64"), others)
    addresses.check_disjoint(ip_network("10.1.0.0/16"), others)
    addresses.check_disjoint(ip_network("fd00:1::/64"), others)


@given(st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 32) - 1))
def test_macs_of_gateways_and_uplinks_are_unique_unicast_and_local(a: int, b: int) -> None:
    macs = {make(i) for i in (a, b) for make in (addresses.gateway_mac, host_end, tenant_end)}
    assert len(macs) == (3 if a == b else 6)
    assert all(int(mac[:2], 16) & 3 == 2 for mac in macs)


def host_end(index: int) -> str:
    return addresses.uplink_mac(index, host=True)


def tenant_end(index: int) -> str:
    return addresses.uplink_mac(index, host=False)


@given(st.text(max_size=20), st.ip_addresses().map(str), st.integers(0, 3))
def test_the_mac_of_a_port_follows_from_its_network_and_its_address(network: str, address: str, attempt: int) -> None:
    mac = addresses.port_mac(network, address, attempt)
    assert mac == addresses.port_mac(network, address, attempt)
    assert mac not in {
        addresses.port_mac(network + "x", address, attempt),
        addresses.port_mac(network, address + "1", attempt),
        addresses.port_mac(network, address, attempt + 1),
    }
    assert mac[:2] == "02" and int(mac[3:5], 16) >= 0x10, "none of a gateway's or an uplink's"
    assert addresses.parse_mac(mac) == mac


def test_macs_of_ports_are_those_of_earlier_releases() -> None:
    """Neighbours cache them, and a new owner of an address must be reachable at the same MAC address."""
    assert addresses.port_mac("acme/net/1.5", "10.0.0.2") == "02:d5:bf:4f:5b:dc"
    assert addresses.port_mac("acme/net/1.5", "10.0.0.2", 1) == "02:1a:14:50:38:3d"
    assert addresses.port_mac("acme/net/1.5", "fd00::2") == "02:b1:4c:5e:ea:3a"
    assert (addresses.gateway_mac(7), host_end(7), tenant_end(7)) == (
        *("02:01:00:00:00:07", "02:02:00:00:00:07", "02:03:00:00:00:07"),
    )


def test_macs_of_ports_do_not_collide() -> None:
    """40 bits less a sixteenth: a thousand of them collide once in two million tries."""
    assert len({addresses.port_mac("a/b/1.5", f"10.0.{i >> 8}.{i & 255}") for i in range(1000)}) == 1000


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not a MAC address"),
        ("02:42:ac:11:00", "not a MAC address"),
        ("02:42:ac:11:00:02:03", "not a MAC address"),
        ("02:42:ac:11:00:0g", "not a MAC address"),
        ("0242ac110002", "not a MAC address"),
        ("02:42:ac:11:00:02\n", "not a MAC address"),
        ("01:00:5e:00:00:01", "group"),
        ("ff:ff:ff:ff:ff:ff", "group"),
        ("33:33:00:00:00:01", "group"),
        ("00:00:00:00:00:00", "reserved"),
        ("02:00:00:00:00:01", "reserved"),
        ("02:01:00:00:00:01", "reserved"),
        ("02:02:00:00:00:01", "reserved"),
        ("02:03:00:00:00:01", "reserved"),
    ],
)
def test_what_is_no_mac_of_a_port_is_refused(text: str, says: str) -> None:
    with pytest.raises(Invalid, match=says) as refused:
        addresses.parse_mac(text)
    assert "\n" not in str(refused.value)


def test_macs_are_read_in_the_usual_notations() -> None:
    assert addresses.parse_mac("02-42-AC-11-00-02") == "02:42:ac:11:00:02"
    assert addresses.parse_mac("00:1A:2b:00:00:00") == "00:1a:2b:00:00:00"


@given(st.integers(0, (1 << 32) - 1))
def test_link_local_follows_the_mac(index: int) -> None:
    address = IPv6Address(addresses.link_local(addresses.gateway_mac(index)))
    assert address.is_link_local
    assert int(address) & 0xFFFFFF == index & 0xFFFFFF


def test_link_local_example_of_the_rfc() -> None:
    assert addresses.link_local("34:56:78:9a:bc:de") == "fe80::3656:78ff:fe9a:bcde"


@given(st.binary(min_size=6, max_size=6))
def test_a_link_local_address_tells_its_mac(octets: bytes) -> None:
    assert addresses.mac_of(addresses.link_local(octets.hex(":"))) == octets.hex(":")
    assert addresses.mac_of("fe80::1") is addresses.mac_of("fd00::3656:78ff:fe9a:bcde") is None
