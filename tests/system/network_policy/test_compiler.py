"""The compiler against the reference model: what the kernel's sets hold after random changes."""

from __future__ import annotations

from ipaddress import ip_address
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from insula.kernel.netlink.nftables import NftablesSocket
from insula.kernel.netns import call_in_new
from insula.kernel.nftables import Nft
from insula.model.errors import Conflict
from insula.model.objects import Port
from insula.model.policies import (
    AddressGroup,
    CidrPeer,
    GroupPeer,
    InstancePeer,
    LabelRequirement,
    Policy,
    PolicyRule,
    PortMatch,
    Selector,
)
from insula.network.intent import PolicyIntent, TenantIntent
from insula.network.linux.epoch import Epoch
from insula.network.linux.policy import chains, elements
from insula.network.linux.policy.compiler import MAX_PAIRS, Compiler, members_of
from insula.network.linux.policy.operator import compile_operator
from insula.network.linux.policy.state import InstalledPolicy
from insula.network.reference.policy_model import is_inside, judge
from tests.support import policies

TABLE = "t"
GUARD = f"table bridge {TABLE} {{ set guarded {{ typeof oifname; }}\n }}\n"


def compiled(intent: TenantIntent) -> elements.SetContents:
    compiler = Compiler(intent.policy, intent.networks, members_of(intent.ports, intent.remotes))
    return elements.contents(compiler.run(), compile_operator(intent.policy.operator))


def in_new_table(worlds: list[TenantIntent]) -> list[elements.SetContents]:
    """Change one table to each of the intents in turn, and return what the kernel has after each."""

    def work() -> list[elements.SetContents]:
        found = []
        with Nft() as nft:
            nft.run(GUARD + f"table inet {TABLE} {{ {chains.sets()} {chains.chains()} chain by_name {{ }}\n }}")
            socket = NftablesSocket()
            try:
                for intent in worlds:
                    have, wanted = elements.read(socket, TABLE), compiled(intent)
                    socket.transact(*elements.changes(TABLE, have, wanted))
                    now = elements.read(socket, TABLE)
                    assert now == wanted
                    assert elements.changes(TABLE, now, wanted) == []
                    found.append(now)
            finally:
                socket.close()
        return found

    return call_in_new(work)


def addresses(intent: TenantIntent) -> list[str]:
    own = [address for port in intent.ports for address in (port.address, port.address6) if address]
    return [*own, *policies.OUTSIDE, "10.0.0.99", "fd00:1::99"]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(worlds=st.lists(policies.intents(), min_size=1, max_size=3), seed=st.integers(0, 1 << 32))
def test_sets_in_the_kernel_mean_what_the_model_says(worlds: list[TenantIntent], seed: int) -> None:
    random = Random(seed)
    for intent, sets in zip(worlds, in_new_table(worlds), strict=True):
        check(intent, sets, random, 200)


def check(intent: TenantIntent, sets: elements.SetContents, random: Random, rounds: int) -> None:
    """Compare what sets mean with the reference model, for random connections."""
    tiers = {"address": "unknown", "operator": "operator", "out": "out", "in": "in"}
    every = addresses(intent)
    for _ in range(rounds):
        source, destination = random.choice(every), random.choice(every)
        inside = is_inside(intent, source), is_inside(intent, destination)
        if ip_address(source).version != ip_address(destination).version or inside == (False, False):
            continue
        crossing = {(True, False): "out", (False, True): "in"}.get(inside, "")
        protocol = random.choice(("tcp", "udp", "icmp", "icmpv6", "sctp"))
        port = random.choice((8, 13, 128) if "icmp" in protocol else (*policies.PORTS, 2, 5000, 65534))
        wanted = judge(intent, source, destination, protocol, port)
        found = policies.judged(sets, source, destination, protocol, port, crossing)
        assert found == ("" if wanted.allowed else tiers[wanted.tier]), (source, destination, protocol, port)


def policy(name: str, app: str, *ports: int) -> Policy:
    return Policy(
        tenant="acme",
        name=name,
        select=Selector(labels={"app": app}),
        directions=["in"],
        rules=[
            PolicyRule(
                direction="in",
                peers=[InstancePeer(select=Selector(labels={"app": "client"}))],
                ports=[PortMatch(protocol="tcp", port=port) for port in ports],
            )
        ],
        created=0,
    )


def world(policies_: list[Policy], instances: int) -> TenantIntent:
    plugged = [policies.port_of(f"i{n}", policies.NETWORKS[0], 2 + n) for n in range(instances)]
    labels = {port.instance: {"app": "client" if n == 0 else f"app{n % 10}"} for n, port in enumerate(plugged)}
    intent = PolicyIntent(policies=policies_, labels=labels)
    return TenantIntent(tenant=policies.TENANT, networks=policies.NETWORKS, ports=plugged, policy=intent)


def test_a_policy_more_renumbers_nobody_whom_it_does_not_concern() -> None:
    some = [policy(f"p{n}", f"app{n}", 80 + n) for n in range(1, 5)]
    before, after = compiled(world(some, 100)), compiled(world([*some, policy("p9", "app9", 443)], 100))
    changed = {key for key in after["subjects4"] if before["subjects4"][key] != after["subjects4"][key]}
    assert len(changed) == 10, "those that it selects"
    assert before["ports"].items() <= after["ports"].items()
    assert before["pairs_in"].items() <= after["pairs_in"].items()


def test_an_instance_more_is_two_elements_for_each_address_whatever_the_number_of_policies() -> None:
    for number in (1, 9):
        some = [policy(f"p{n}", f"app{n}", 80) for n in range(number)]
        before, after = compiled(world(some, 50)), compiled(world(some, 51))
        more = {name: len(after[name]) - len(before[name]) for name in after if after[name] != before[name]}
        assert more.pop("guarded", 1) == 1
        assert more == {"subjects4": 1, "peers4": 1, "subjects6": 2, "peers6": 2}, "the link-local address too"


def test_narrowing_a_policy_changes_one_entry_of_the_two_classes() -> None:
    before, after = (compiled(world([policy("p", "app1", *ports)], 50)) for ports in ((80, 81), (80,)))
    assert {name for name in after if after[name] != before[name]} == {"ports", "pairs_in"}


def after_changes(
    intent: TenantIntent, later: list[PolicyIntent], plugged: list[list[Port]]
) -> list[elements.SetContents]:
    """Have an intent installed, then other policies, each with other ports; what the kernel has after each change."""

    def work() -> list[elements.SetContents]:
        found = []
        with Nft() as nft:
            own = "set judged { type mark; }\nmap epoch { type nf_proto : mark; }\n"
            nft.run(GUARD + f"table inet {TABLE} {{ {own} {chains.sets()} {chains.chains()} chain by_name {{ }}\n }}")
            socket = NftablesSocket()
            try:
                installed = InstalledPolicy(socket, TABLE, Epoch(socket, TABLE))
                installed.commit((), installed.whole(intent, intent.ports))
                now = intent.ports
                for policy_, ports in zip(later, plugged, strict=True):
                    for port in now:
                        if port not in ports:
                            installed.withdraw(port, ())
                    for port in ports:
                        if port not in now:
                            installed.admit(port, policy_.labels.get(port.instance, {}), ())
                    now = ports
                    installed.replace(policy_)
                    found.append(elements.read(socket, TABLE))
                    assert installed.drift() == []
            finally:
                socket.close()
        return found

    return call_in_new(work)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(intent=policies.intents(), data=st.data(), seed=st.integers(0, 1 << 32))
def test_changes_of_single_policies_labels_and_groups(intent: TenantIntent, data: st.DataObject, seed: int) -> None:
    """All mean what the model says, while ports come and go. Most take the way that looks at some classes only."""
    random, now, later = Random(seed), {each.name: each for each in intent.policy.policies}, list[PolicyIntent]()
    last = intent.policy
    plugged = [random.sample(intent.ports, random.randrange(len(intent.ports) + 1)) for _ in range(4)]
    for number in range(4):
        name = f"p{random.randrange(5)}"
        if random.random() < 0.3:
            now.pop(name, None)
        else:
            drawn = data.draw(policies.policies(name), label=f"change {number}")
            known = random.choice([*now.values()]) if now and random.random() < 0.7 else drawn
            now[name] = replace(known, name=name, audit=drawn.audit, dns=drawn.dns)
        last = data.draw(policies.others(replace(last, policies=[*now.values()])), label=f"others {number}")
        later.append(last)
    for policy_, ports, sets in zip(later, plugged, after_changes(intent, later, plugged), strict=True):
        changed = replace(intent, ports=ports, policy=policy_)
        check(changed, sets, random, 100)


def test_a_selector_or_a_range_more_is_found_without_looking_at_everything() -> None:
    """The work of a change doesn't grow with the number of policies and ports: it is counted, not timed."""
    counts = []
    for instances in (20, 200):
        some = [policy(f"p{n}", f"app{n % 10}", 80 + n) for n in range(instances)]
        intent = world(some, instances)
        compiler = Compiler(intent.policy, intent.networks, members_of(intent.ports))
        before = compiler.run()
        rule = PolicyRule(direction="in", peers=[CidrPeer(cidr="172.16.0.0/12")], ports=[])
        select = Selector(labels={"app": "client"}, expressions=[LabelRequirement(key="app", operator="Exists")])
        new = Policy(tenant="acme", name="new", select=select, directions=["in"], rules=[rule], created=0)
        found = compiler.change(before, replace(intent.policy, policies=[*some, new]))
        assert found
        after, changes = found
        have, wanted = elements.difference(before, after, changes)
        differing = {name: len(have.get(name, {}).items() ^ some.items()) for name, some in wanted.items()}
        counts.append((len(changes.subjects), {name: number for name, number in differing.items() if number}))
    assert counts[0] == counts[1]
    assert {"ranges4", "subjects4", "isolated_in", "pairs_in", "guarded"} <= {*counts[0][1]}


def test_other_labels_and_groups_are_found_without_looking_at_everything() -> None:
    counts = []
    for instances in (20, 200):
        some = [policy(f"p{n}", f"app{n % 10}", 80 + n) for n in range(instances)]
        rule = PolicyRule(direction="in", peers=[GroupPeer(group="office")], ports=[])
        some.append(replace(policy("office", "app3"), rules=[rule]))
        office = AddressGroup(tenant="acme", name="office", cidrs=["172.16.0.0/12"], created=0)
        intent = world(some, instances)
        whole = replace(intent.policy, groups=[office])
        compiler = Compiler(whole, intent.networks, members_of(intent.ports))
        compiled_ = compiler.run()
        for other in (
            replace(whole, labels={**whole.labels, "i5": {"app": "client"}}),
            replace(whole, groups=[replace(office, cidrs=["172.16.0.0/13", "192.0.2.0/24"])]),
        ):
            found = compiler.change(compiled_, other)
            assert found
            after, changes = found
            have, wanted = elements.difference(compiled_, after, changes)
            differing = {name: len(have.get(name, {}).items() ^ some.items()) for name, some in wanted.items()}
            counts.append((len(changes.subjects), {name: number for name, number in differing.items() if number}))
            compiled_, whole = after, other
    assert counts[:2] == counts[2:]
    assert "subjects4" in counts[0][1] and "ranges4" in counts[1][1]


def test_too_many_pairs_of_classes_are_refused_and_nothing_has_changed() -> None:
    """By an instance more, and by a policy more: they would fill the kernel's memory."""
    intent = world([], 70)
    labels = {port.instance: {"app": f"a{n}"} for n, port in enumerate(intent.ports)}
    apart = [replace(policy(f"p{n}", f"a{n}"), rules=[]) for n in range(70)]
    first, second = (
        replace(
            policy(f"ranges{k}", "any"),
            select=Selector(),
            rules=[
                PolicyRule(direction="in", peers=[CidrPeer(cidr=f"172.{k}.{n >> 8}.{n & 255}/32") for n in range(1024)])
            ],
        )
        for k in (16, 17)
    )
    intent = replace(intent, policy=PolicyIntent(policies=[*apart, first], labels=labels))

    def work() -> None:
        with Nft() as nft:
            own = "set judged { type mark; }\nmap epoch { type nf_proto : mark; }\n"
            nft.run(GUARD + f"table inet {TABLE} {{ {own} {chains.sets()} {chains.chains()} chain by_name {{ }}\n }}")
            with NftablesSocket() as socket:
                installed = InstalledPolicy(socket, TABLE, Epoch(socket, TABLE))
                installed.commit((), installed.whole(intent, intent.ports[:63]))
                before = elements.read(socket, TABLE)
                installed.admit(intent.ports[63], labels["i63"], ())
                full = elements.read(socket, TABLE)
                assert (len(before["pairs_in"]), len(full["pairs_in"])) == (63 * 1024, MAX_PAIRS)
                with pytest.raises(Conflict, match="pairs of kinds"):
                    installed.admit(intent.ports[64], labels["i64"], ())
                installed.withdraw(intent.ports[64], ())  # as whoever plugs it does then
                with pytest.raises(Conflict, match="pairs of kinds"):
                    installed.replace(replace(intent.policy, policies=[*apart, first, second]))
                assert elements.read(socket, TABLE) == full and installed.drift() == []
                installed.replace(replace(intent.policy, policies=apart))
                assert not elements.read(socket, TABLE)["pairs_in"]

    call_in_new(work)
