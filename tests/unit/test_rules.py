"""The loaded packet filter: existing rules, added and deleted elements, and repairs.

What the rules let through is shown by the system tests; here they are only loaded, in a namespace that is new.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from ipaddress import IPv4Network, IPv6Network
from typing import TypeVar

import pytest

from insula.kernel.netlink import NetlinkError, Request
from insula.kernel.netlink.nftables import NftablesSocket, add_elements, delete_elements
from insula.kernel.netns import call_in_new
from insula.kernel.nftables import Nft, NftError
from insula.model.objects import Network, Port
from insula.network.addresses import link_local
from insula.network.linux import host_rules, neighbours, routing, rules
from insula.network.linux.naming import Naming

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="nftables takes root")

TABLE, FAMILIES = "insula", ("bridge", "inet")
MAC, OTHER = "02:00:00:00:00:07", "02:00:00:00:00:08"
T = TypeVar("T")


def port(index: int = 7, mac: str = MAC, address: str = "10.0.0.2", address6: str | None = "fd00::2") -> Port:
    return Port(tenant="a", network="n", instance="i", index=index, mac=mac, address=address, address6=address6)


def network(gateway6: str | None = "fd00::1") -> Network:
    subnet6 = "fd00::/64" if gateway6 else None
    return Network(
        tenant="a",
        name="n",
        index=3,
        vni=1,
        subnet="10.0.0.0/24",
        gateway="10.0.0.1",
        subnet6=subnet6,
        gateway6=gateway6,
        created=0,
    )


def with_nft(function: Callable[[Nft], T]) -> T:
    """Call `function` with a handle in a new network namespace, and return its result."""

    def inside() -> T:
        with Nft() as nft:
            return function(nft)

    return call_in_new(inside)


def transact(requests: Sequence[Request]) -> None:
    with NftablesSocket() as nftables:
        nftables.transact(*requests)


def install(nft: Nft) -> None:
    rules.install(nft, TABLE, FAMILIES, rules.tenant_rules(TABLE))


def listed(nft: Nft) -> dict[str, str]:
    return {family: nft.rules(family, TABLE) for family in FAMILIES}


WANTED = rules.tenant_rules(TABLE)


def test_rules_are_loaded_and_loaded_again_without_a_change() -> None:
    def inside(nft: Nft) -> None:
        install(nft)
        found = listed(nft)
        assert found == rules.as_listed(WANTED, TABLE)
        assert all("policy drop" in text for text in found.values())
        transact(rules.add(TABLE, rules.of_port(port())))
        before = nft.run("list ruleset", 1 << 3)  # with handles: loading anything would give others
        install(nft)
        assert nft.run("list ruleset", 1 << 3) == before

    with_nft(inside)


@pytest.mark.parametrize("family", FAMILIES)
def test_foreign_changes_are_repaired_and_elements_stay(family: str) -> None:
    chain = {"bridge": "prerouting", "inet": "forward"}[family]

    def inside(nft: Nft) -> None:
        install(nft)
        transact(rules.add(TABLE, {**rules.of_port(port()), **rules.of_network(network())}))
        nft.run(f"insert rule {family} {TABLE} {chain} accept")
        before = {each: nft.elements(each, TABLE) for each in FAMILIES}
        assert listed(nft) != rules.as_listed(WANTED, TABLE)
        install(nft)
        assert listed(nft) == rules.as_listed(WANTED, TABLE)
        assert {each: nft.elements(each, TABLE) for each in FAMILIES} == before
        assert before["bridge"]["macs"] and before["inet"]["bridges"]

    with_nft(inside)


def test_a_set_of_another_version_does_not_stand_in_the_way() -> None:
    def inside(nft: Nft) -> None:
        nft.run(f"table bridge {TABLE} {{ set macs {{ type ipv4_addr; }}; }}\ntable inet other")
        with pytest.raises(NftError):  # the control: they can't be loaded over it
            nft.run(WANTED)
        install(nft)
        assert listed(nft) == rules.as_listed(WANTED, TABLE)
        assert ("inet", "other") in nft.tables()

    with_nft(inside)


def test_a_refused_rule_set_changes_nothing() -> None:
    def inside(nft: Nft) -> None:
        install(nft)
        before = listed(nft)
        with pytest.raises(NftError):
            rules.install(nft, TABLE, FAMILIES, WANTED + "no such command")
        assert listed(nft) == before

    with_nft(inside)


# -- elements ----------------------------------------------------------------------------------------------------------


def elements(nft: Nft) -> dict[str, set[tuple[str, ...]]]:
    found = {f"{family} {name}": of for family in FAMILIES for name, of in nft.elements(family, TABLE).items()}
    return {name: of for name, of in found.items() if of}


def test_the_elements_of_ports_and_networks_come_and_go() -> None:
    def inside(nft: Nft) -> None:
        install(nft)
        assert elements(nft) == {}
        some: list[rules.Elements] = [
            rules.OF_EGRESS,
            rules.of_network(network()),
            rules.of_port(port()),
            rules.of_port(port(8, OTHER, "10.0.0.3", None)),
        ]
        for each in some:
            transact(rules.add(TABLE, each))
            transact(rules.add(TABLE, each))  # what is there stays
        own = {"fd00::2", link_local(MAC)}
        found = elements(nft)
        ndp, sought = found.pop("bridge ndp"), found.pop("bridge sought6")
        assert found == {
            "bridge macs": {("p7", MAC), ("p8", OTHER)},
            "bridge ipv4": {("p7", MAC, "10.0.0.2"), ("p8", OTHER, "10.0.0.3")},
            "bridge ipv6": {("p7", MAC, address) for address in own},
            "bridge ndp_macs": {("p7", str(int(MAC.replace(":", ""), 16)))},
            "bridge sought4": {("p7", "10.0.0.2"), ("p8", "10.0.0.3")},
            "bridge sent": {("p7",), ("p8",)},
            "bridge received": {("p7",), ("p8",)},
            "bridge reflected": {("p7", "p7"), ("p8", "p8")},
            "inet bridges": {("br3",)},
            "inet paths": {("br3", "br3"), ("br3", "uplink")},
            "inet gateways4": {("br3", "10.0.0.1")},
            "inet gateways6": {("br3", "fd00::1")},
            "inet egress_sent": {("ipv4",)},
            "inet egress_received": {("ipv4",)},
        }
        assert {element[:2] for element in ndp} == {("p7", MAC)} and len(ndp) == 2
        assert sought == {(device, target) for device, _, target in ndp}
        of_routers = {*routing.SETS, "inet closed"}
        peerings = ("endpoints4", "endpoints6", "peer_protocols", "peer_ports", "visitors4", "visitors6")
        of_peerings = {f"inet {name}" for name in peerings}
        assert {*found, "bridge ndp", "bridge sought6", *of_routers, *of_peerings} == set(rules.SETS)
        transact(rules.delete(TABLE, some[2]))
        transact(rules.delete(TABLE, some[2]))  # no error where there is none
        assert elements(nft)["bridge macs"] == {("p8", OTHER)}
        for each in some:
            transact(rules.delete(TABLE, each))
        assert elements(nft) == {}

    with_nft(inside)


def test_a_network_gets_another_router_in_one_transaction() -> None:
    def inside(nft: Nft) -> None:
        install(nft)
        one, other = (rules.key(routing.ROUTERS, ("br3", number)) for number in ("7", "8"))

        def found() -> set[bytes]:
            with NftablesSocket() as nftables:
                return rules.read(nftables, TABLE, routing.ROUTERS)

        transact(rules.add(TABLE, {routing.ROUTERS: [("br3", "7"), ("br4", "9")]}))
        transact(rules.change(TABLE, {routing.ROUTERS: [other]}, {routing.ROUTERS: [one]}))
        assert {rules.element(routing.ROUTERS, key) for key in found()} == {("br3", "8"), ("br4", "9")}
        with pytest.raises(NetlinkError, match="exists"):  # it has another element than was thought
            transact(rules.change(TABLE, {routing.ROUTERS: [one]}, {}))
        transact(rules.delete(TABLE, {routing.ROUTERS: [("br3", "8"), ("br4", "9")]}))
        assert found() == set()

    with_nft(inside)


def test_a_transaction_is_applied_as_a_whole_or_not_at_all() -> None:
    key, missing = (rules.key("inet bridges", (name,)) for name in ("br3", "br4"))

    def inside(nft: Nft) -> None:
        install(nft)
        add = list(add_elements("inet", TABLE, "bridges", [key]))
        for wrong in (
            delete_elements("inet", TABLE, "bridges", [missing]),
            add_elements("inet", TABLE, "no-such-set", [key]),
            add_elements("inet", TABLE, "bridges", [key[:-1]]),
        ):
            refused = list(wrong)
            for requests in ([*add, *refused], [*refused, *add]):
                with pytest.raises(NetlinkError, match=refused[0].what):
                    transact(requests)
            assert elements(nft) == {}
        transact(add)  # the control
        assert elements(nft) == {"inet bridges": {("br3",)}}

    with_nft(inside)


def test_a_transaction_may_have_thousands_of_elements() -> None:
    def inside(nft: Nft) -> None:
        install(nft)
        names = [(f"br{number}", f"p{number}") for number in range(5000)]
        some = {"inet paths": names}
        transact(rules.add(TABLE, some))
        assert elements(nft) == {"inet paths": set(names)}
        transact(rules.delete(TABLE, some))
        assert elements(nft) == {}

    with_nft(inside)


def test_without_ipv6_there_is_nothing_of_it() -> None:
    found = {name for name, of in rules.of_port(port(address6=None)).items() if of}
    assert found == {"bridge macs", "bridge ipv4", "bridge sought4", "bridge reflected", *rules.COUNTED}
    assert not rules.of_network(network(None))["inet gateways6"]


# -- the host ----------------------------------------------------------------------------------------------------------


NAMES = Naming("insula", IPv4Network("100.64.0.0/16"), IPv6Network("fd5a::/64"))


def host(*servers: str, closed: dict[int, tuple[str, ...]] | None = None) -> str:
    """The host's table, as nft lists it."""

    def inside(nft: Nft) -> str:
        wanted = host_rules.host_rules(NAMES, servers, closed or {})
        rules.install(nft, "insula", ("inet",), wanted)
        return nft.rules("inet", "insula")

    return with_nft(inside)


def test_each_name_server_has_a_port_of_its_own() -> None:
    text = " ".join(host("9.9.9.9", "2620:fe::fe").split())
    first = host_rules.FIRST_DNS_PORT
    four = f'iifname "insula-u*" ip daddr 100.64.0.0/16 meta l4proto {{ tcp, udp }} th dport {first}'
    six = f'iifname "insula-u*" ip6 daddr fd5a::/64 meta l4proto {{ tcp, udp }} th dport {first + 1}'
    assert f"{four} dnat ip to 9.9.9.9:53 {six} dnat ip6 to [2620:fe::fe]:53" in text
    assert "dnat ip" not in host()


def test_between_closed_devices_nothing_is_forwarded() -> None:
    text = " ".join(host(closed={4: ("eth0", "eth1"), 6: ()}).split())
    assert 'meta nfproto ipv4 iifname { "eth0", "eth1" } oifname { "eth0", "eth1" } drop' in text
    assert "nfproto ipv6" not in text
    assert "nfproto" not in host()


def test_the_limit_of_neighbours_allows_all_ports_of_a_bridge() -> None:
    """The kernel's tables hold 65,536 entries at least: that takes dozens of instances."""

    def listed(gateways: list[str]) -> str:
        def inside() -> str:
            assert neighbours.bound(TABLE, gateways)
            assert not neighbours.bound(TABLE, ["10.0.0.9"])  # of another port
            neighbours.release(TABLE, ["10.0.0.8", "10.0.0.9"])
            with Nft() as nft:
                return nft.run(f"list table inet {TABLE}")

        return call_in_new(inside)

    assert (neighbours.MOST4, neighbours.MOST6) == (1023, 2046)
    both, four = listed(["10.0.0.1", "fd00::1"]), listed(["10.0.0.1"])
    for text in (both, four):
        assert re.findall(r"size (\d+)", text) == ["1023", "2046"]
        assert 'oifname != "eth*" accept' in text
        assert "rt ip nexthop @gateways4 accept" in text and "elements = { 10.0.0.1 }" in text
        assert text.split()[-3:] == ["drop", "}", "}"]
        assert "10.0.0.9" not in text and "10.0.0.8" not in text
    assert "elements = { fd00::1 }" in both
    assert "fd00" not in four


def test_recorded_rules_are_those_that_nft_loads() -> None:
    """Rules that are loaded into an instance's namespace were recorded in another one."""

    def listed(load: Callable[[], object]) -> tuple[str, str]:
        def inside(nft: Nft) -> tuple[str, str]:
            load()
            return nft.run("list ruleset"), re.sub(r'"handle": \d+', "", nft.run("list ruleset", 1 << 4))  # text, JSON

        return with_nft(inside)

    def load_text() -> None:
        with Nft() as nft:
            nft.run(neighbours.text(TABLE))

    loaded, replayed = listed(load_text), listed(lambda: neighbours.bound(TABLE, []))
    assert "gateways6" in loaded[0] and "gc-interval" in loaded[0]  # the control
    assert replayed == loaded


def test_recorded_rules_are_loaded_as_a_whole_or_not_at_all() -> None:
    def record(nft: Nft) -> Sequence[Request]:
        nft.run(neighbours.text(TABLE))
        with NftablesSocket() as nftables:
            return nftables.recorded()

    requests = with_nft(record)

    def inside(nft: Nft) -> None:
        with pytest.raises(NetlinkError):
            transact([*requests, *delete_elements("inet", TABLE, "ipv4", [bytes(4)])])
        assert nft.run("list ruleset") == ""
        transact(requests)  # the control
        assert TABLE in nft.run("list ruleset")

    with_nft(inside)
