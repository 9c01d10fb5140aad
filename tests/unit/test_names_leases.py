"""Leases: what is leased, for how long, to whom, and what ends it. The kernel is a dictionary here."""

from __future__ import annotations

from hypothesis import example, given, settings
from hypothesis import strategies as st

from insula.network.names import leases as limits
from insula.network.names.elements import LeaseElement, comment_of, element_of
from insula.network.names.leases import LeaseChange, Leases
from insula.network.names.rules import ClientRules, Destination, DestinationRange, EgressRules, NameRule, OperatorRange

A4, A6, B4 = "10.0.0.2", "fd00::2", "10.0.0.3"
SITE, SITE6, OTHER = "93.184.216.1", "2606:2800::1", "93.184.216.2"
HTTPS = NameRule("api.example.com", "tcp", (443,))


class Kernel:
    """Sets with timeouts, at a clock of their own."""

    def __init__(self, *rules: NameRule, **more: object) -> None:
        self.now = 1000.0
        self.elements: dict[LeaseElement, tuple[float, list[str]]] = {}
        self.leases = Leases(lambda: self.now)
        self.rules = EgressRules(
            {"a": ClientRules((A4, A6), rules, **more), "b": ClientRules((B4,), rules)},  # type: ignore[arg-type]
            own=("10.0.0.0/24", "fd00::/64"),
        )
        self.leases.rules = self.rules

    def commit(self, change: LeaseChange | None) -> bool:
        if change is None:
            return False
        for element, seconds, names in change.refreshed:
            assert seconds > 0
            self.elements[element] = self.now + seconds, names
        for element in change.deleted:
            self.elements.pop(element, None)
        return True

    def grant(self, name: str = "api.example.com", *addresses: str, client: str = "a", ttl: float = 60) -> bool:
        return self.commit(self.leases.grant(client, [name], addresses or (SITE,), ttl))

    def live(self) -> dict[LeaseElement, float]:
        return {element: expires - self.now for element, (expires, _) in self.elements.items() if expires > self.now}

    def open(self) -> set[tuple[str, str, str, int | None]]:
        return {(e.source, e.address, e.destination.protocol, e.destination.port) for e in self.live()}


def test_a_lease_is_of_one_instance_and_the_ports_of_its_rule() -> None:
    kernel = Kernel(NameRule("api.example.com", "tcp", (443, 8443)), NameRule("*.example.org", "udp"))
    assert kernel.grant("api.example.com", SITE, SITE6)
    assert kernel.open() == {
        (A4, SITE, "tcp", 443), (A4, SITE, "tcp", 8443), (A6, SITE6, "tcp", 443), (A6, SITE6, "tcp", 8443)
    }  # fmt: skip
    assert {e.destination.checked for e in kernel.live() if e.destination.port == 443} == {True}
    assert {e.destination.checked for e in kernel.live() if e.destination.port == 8443} == {False}
    assert kernel.grant("x.example.org", OTHER)
    assert (A4, OTHER, "udp", None) in kernel.open()
    assert not any(source == B4 for source, *_ in kernel.open()), "b has asked for nothing"
    assert kernel.leases.covers("a", SITE, 443, "api.example.com")
    for wrong in (
        ("b", SITE, 443, "api.example.com"),
        ("a", OTHER, 443, "api.example.com"),
        ("a", SITE, 80, "api.example.com"),
    ):
        assert not kernel.leases.covers(*wrong)
    assert not kernel.leases.covers("a", OTHER, 443, "x.example.org"), "that rule is about UDP"


def test_what_no_rule_allows_is_not_leased() -> None:
    kernel = Kernel(HTTPS)
    for name, address in (
        ("example.com", SITE), ("x.api.example.com", SITE), ("api.example.com", "10.0.0.3"),
        ("api.example.com", "169.254.169.254"),  ("api.example.com", "x"),
    ):  # fmt: skip
        assert not kernel.grant(name, address)
    assert not kernel.grant("api.example.com", client="c") and not kernel.elements


def test_a_rule_of_all_ports_checks_those_of_http_and_tls() -> None:
    kernel = Kernel(
        NameRule("api.example.com", "tcp"), NameRule("api.example.com", "icmp"), NameRule("api.example.com", "icmpv6")
    )
    kernel.grant("api.example.com", SITE, SITE6)
    found = {(e.source, e.destination) for e in kernel.live()}
    for source, protocol in ((A4, "icmp"), (A6, "icmpv6")):
        assert {d for s, d in found if s == source} == {
            Destination("tcp", None, False), Destination("tcp", 80, True), Destination("tcp", 443, True),
            Destination(protocol, None, False),
        }  # fmt: skip


def test_what_another_rule_opens_anyway_is_not_checked() -> None:
    kernel = Kernel(HTTPS, open=(DestinationRange("93.184.216.1/32", "tcp", (1, 1000)),))
    kernel.grant("api.example.com", SITE, OTHER)
    assert {(e.address, e.destination.checked) for e in kernel.live()} == {(SITE, False), (OTHER, True)}


def test_leases_last_longer_than_answers_are_kept() -> None:
    for ttl, lasts in ((0, 360), (1, 360), (300, 360), (86_400, 86_460)):
        kernel = Kernel(HTTPS)
        kernel.grant(ttl=ttl)
        assert list(kernel.live().values()) == [lasts]
        kernel.now += lasts - 1
        assert kernel.live() and kernel.leases.covers("a", SITE, 443, "api.example.com")
        kernel.now += 1
        assert not kernel.live() and not kernel.leases.covers("a", SITE, 443, "api.example.com")


def test_a_lease_that_has_ended_is_not_renewed_by_other_rules() -> None:
    kernel = Kernel(HTTPS, NameRule("*.example.com", "tcp", (443,)))
    kernel.grant(ttl=0)
    kernel.now += 100
    kernel.grant("www.example.com", ttl=0)
    kernel.now += limits.LEAST + limits.GRACE - 100
    wider = ClientRules((A4,), (NameRule("api.example.com", "tcp", (443, 22)), NameRule("*.example.com", "tcp", (80,))))
    kernel.rules = EgressRules({"a": wider})
    kernel.commit(kernel.leases.replace(kernel.rules))
    assert kernel.open() == {(A4, SITE, "tcp", 80)}, "www is leased for 100 s more, api has ended"
    [(_, names)] = [kernel.elements[element] for element in kernel.live()]
    assert names == ["www.example.com"]
    kernel.now += 100
    change = kernel.leases.replace(EgressRules({"a": ClientRules((A4,), (*wider.rules, HTTPS))}))
    assert not change.refreshed


def test_an_element_that_would_never_end_is_not_taken_over() -> None:
    kernel, element = Kernel(HTTPS), LeaseElement(A4, SITE, Destination("tcp", 443, True))
    change = kernel.leases.restore([(element, 0.0, ["api.example.com"])])
    assert change.deleted == [element] and not change.refreshed and not list(kernel.leases.listed())


def test_a_shorter_lease_ends_no_longer_one_and_repetitions_write_nothing() -> None:
    kernel = Kernel(HTTPS)
    kernel.grant(ttl=86_400)
    kernel.grant(ttl=1)
    assert list(kernel.live().values()) == [86_460]
    again = kernel.leases.grant("a", ["api.example.com"], [SITE], 86_400)
    assert again is not None and not again.refreshed
    kernel.now += 100
    kernel.grant(ttl=86_400)
    assert list(kernel.live().values()) == [86_460]


def test_a_name_that_is_asked_for_after_its_lease_is_leased_again() -> None:
    kernel = Kernel(HTTPS)
    for _ in range(3):
        assert kernel.grant() and (A4, SITE, "tcp", 443) in kernel.open()
        kernel.now += limits.LEAST + limits.GRACE + 1
        assert not kernel.open()


def test_an_idle_connection_is_made_again_without_a_look_up() -> None:
    """As a channel of gRPC does, after 370 seconds without a packet."""
    kernel = Kernel(HTTPS)
    kernel.grant(ttl=1)
    for _ in range(6):
        kernel.now += 60
        kernel.commit(kernel.leases.renew({(A4, SITE)}))
    kernel.now += 10
    assert (A4, SITE, "tcp", 443) in kernel.open() and kernel.leases.covers("a", SITE, 443, "api.example.com")


def test_a_connection_keeps_its_lease_and_others_end() -> None:
    kernel = Kernel(HTTPS)
    kernel.grant("api.example.com", SITE, OTHER)
    for _ in range(120):  # two hours
        kernel.now += 60
        kernel.commit(kernel.leases.renew({(A4, SITE), (B4, OTHER), ("10.0.0.99", OTHER)}))
        assert (A4, SITE, "tcp", 443) in kernel.open()
    assert {address for _, address, *_ in kernel.open()} == {SITE}
    assert [each[1] for each in kernel.leases.listed()] == [SITE], "the other is forgotten"


def test_rules_that_go_take_their_leases_with_them() -> None:
    kernel = Kernel(NameRule("*.example.com", "tcp", (443,)), NameRule("api.example.com", "tcp", (8443,)))
    kernel.grant("api.example.com")
    kernel.grant("www.example.com", OTHER)
    assert len(kernel.open()) == 3
    narrowed = EgressRules({"a": ClientRules((A4, A6), (NameRule("api.example.com", "tcp", (8443, 22)),))})
    kernel.commit(kernel.leases.replace(narrowed))
    assert kernel.open() == {(A4, SITE, "tcp", 8443), (A4, SITE, "tcp", 22)}, "a port more is open at once"
    kernel.commit(
        kernel.leases.replace(EgressRules({"a": ClientRules((A4,), narrowed.clients["a"].rules)}, own=("93.0.0.0/8",)))
    )
    assert not kernel.open()


def test_the_operator_decides_before_the_check() -> None:
    kernel = Kernel(HTTPS)
    https = DestinationRange("93.184.216.0/24", "tcp", (1, 500), ("93.184.216.2/32",))
    decided = [OperatorRange("deny", https), OperatorRange("accept", DestinationRange("93.184.216.2/32"))]
    kernel.leases.rules = EgressRules(kernel.rules.clients, operator=tuple(decided))
    kernel.grant("api.example.com", SITE, OTHER, "93.184.217.1")
    found = {e.address: e.destination.checked for e in kernel.live()}
    assert found == {OTHER: False, "93.184.217.1": True}, "SITE is denied, and OTHER open without a check"
    assert not kernel.leases.covers("a", SITE, 443, "api.example.com")


def test_an_address_that_an_instance_gets_or_loses() -> None:
    kernel = Kernel(HTTPS)
    kernel.grant()
    kernel.commit(kernel.leases.replace(EgressRules({"a": ClientRules((A4, "10.1.0.2"), (HTTPS,))})))
    assert {source for source, *_ in kernel.open()} == {A4, "10.1.0.2"}
    kernel.commit(
        kernel.leases.replace(
            EgressRules({"a": ClientRules(("10.1.0.2",), (HTTPS,)), "b": ClientRules((A4,), (HTTPS,))})
        )
    )
    assert {source for source, *_ in kernel.open()} == {"10.1.0.2"}, "the next owner of an address has nothing of it"


def test_sixty_addresses_in_turn_are_each_leased() -> None:
    kernel = Kernel(HTTPS)
    pool = [f"93.184.216.{n}" for n in range(60)]
    for turn in range(60):
        told = [pool[(turn + k) % 60] for k in range(4)]
        assert kernel.grant("api.example.com", *told)
        assert {(A4, each, "tcp", 443) for each in told} <= kernel.open()
    assert len(kernel.open()) == 60


def test_the_oldest_leases_of_a_name_and_of_an_instance_go_first() -> None:
    kernel = Kernel(NameRule("*.example.com", "tcp", (443,)))
    pool = [f"93.{n >> 8}.{n & 255}.7" for n in range(limits.PER_CLIENT + 500)]
    for at in range(0, 1500, 500):
        assert kernel.grant("a.example.com", *pool[at : at + 500])
    assert {address for _, address, *_ in kernel.open()} == set(pool[1500 - limits.PER_NAME : 1500])
    for at in range(1500, len(pool), 500):
        assert kernel.grant(f"n{at}.example.com", *pool[at : at + 500])
    assert {address for _, address, *_ in kernel.open()} == set(pool[-limits.PER_CLIENT :])


def test_leases_are_taken_over_from_the_kernel() -> None:
    kernel = Kernel(NameRule("*.example.com", "tcp", (443,)), NameRule("*.example.com", "udp"))
    kernel.grant("a.example.com", SITE, SITE6)
    kernel.grant("b.example.com")
    other = Leases(lambda: kernel.now)
    other.rules = kernel.rules
    found = [(element, left, kernel.elements[element][1]) for element, left in kernel.live().items()]
    strange = LeaseElement("10.0.0.77", SITE, Destination("tcp", 443, True))
    denied = LeaseElement(A4, SITE, Destination("tcp", 22, False))
    change = other.restore([*found, (strange, 10, ["a.example.com"]), (denied, 10, ["a.example.com"])])
    assert change.deleted == [strange, denied] and not change.refreshed
    assert other.names_of("a", SITE) == {"a.example.com", "b.example.com"} and other.names_of("a", SITE6) == {
        "a.example.com"
    }
    assert sorted(other.listed()) == sorted(kernel.leases.listed())


def test_a_change_that_the_kernel_refused_is_made_the_next_time() -> None:
    kernel = Kernel(HTTPS)
    change = kernel.leases.grant("a", ["api.example.com"], [SITE], 60)
    assert change is not None
    kernel.leases.undo(change)
    assert kernel.grant() and kernel.open()


def test_elements_and_keys() -> None:
    for element, set_ in (
        (LeaseElement(A4, SITE, Destination("tcp", 443, True)), "checked4"),
        (LeaseElement(A6, SITE6, Destination("udp", 53, False)), "leases6"),
        (LeaseElement(A4, SITE, Destination("icmp", None, False)), "lease_protocols4"),
    ):
        assert element.set == set_ and element_of(set_, element.key) == element
    assert element_of("leases4", bytes(8) + b"\x84\0\0\0" + bytes(4)) is None
    names = [f"n{n}.example.com" for n in range(50)]
    assert len(comment_of(names)) <= 240 and names[0] in comment_of(names).split()


RULES = st.lists(
    st.builds(
        NameRule,
        st.sampled_from(["a.test", "b.test", "*.test"]),
        st.sampled_from(["tcp", "udp"]),
        st.sampled_from([(), (443,), (22, 80)]),
    ),
    max_size=3,
).map(tuple)
STEPS = st.one_of(
    st.tuples(
        st.just("grant"),
        st.sampled_from(["a", "b"]),
        st.sampled_from(["a.test", "b.test", "c.test"]),
        st.integers(1, 4),
    ),
    st.tuples(st.just("rules"), RULES, RULES),
    st.tuples(st.just("wait"), st.integers(1, 400)),
    st.tuples(st.just("renew"), st.integers(1, 4)),
    st.tuples(st.just("restart")),
)


@settings(max_examples=200, deadline=None)
@example(
    [
        ("rules", (NameRule("a.test", "tcp"),), ()),
        ("grant", "a", "a.test", 1),
        ("wait", 360),
        ("rules", (NameRule("a.test", "udp"),), ()),
    ]
)
@given(st.lists(STEPS, max_size=25))
def test_nothing_is_open_that_was_not_asked_for_and_allowed(steps: list[tuple[object, ...]]) -> None:
    """Every element is of a name that was asked for within the time of its lease, and of a rule in force."""
    kernel, asked = Kernel(), set[tuple[str, str, str]]()
    for what, *rest in steps:
        if what == "grant":
            client, name, n = rest
            allowed = kernel.grant(str(name), f"93.0.0.{n}", client=str(client))
            assert allowed == bool(kernel.rules.clients[str(client)].matching(str(name)))
            if allowed:
                asked.add((str(client), str(name), f"93.0.0.{n}"))
                assert kernel.leases.names_of(str(client), f"93.0.0.{n}") >= {name}
        elif what == "rules":
            one, other = rest
            kernel.rules = EgressRules({"a": ClientRules((A4,), one), "b": ClientRules((B4,), other)})  # type: ignore[arg-type]
            kernel.commit(kernel.leases.replace(kernel.rules))
        elif what == "wait":
            kernel.now += float(str(rest[0]))
        elif what == "renew":
            kernel.commit(kernel.leases.renew({(A4, f"93.0.0.{rest[0]}")}))
        else:
            found = [(element, left, kernel.elements[element][1]) for element, left in kernel.live().items()]
            kernel.leases = Leases(lambda: kernel.now)
            kernel.leases.rules = kernel.rules
            kernel.commit(kernel.leases.restore(found))
        for source, address, protocol, port in kernel.open():
            client = "a" if source == A4 else "b"
            names = [name for c, name, where in asked if (c, where) == (client, address)]
            rules = [rule for name in names for rule in kernel.rules.clients[client].matching(name)]
            assert any(rule.protocol == protocol and (port in rule.ports or not rule.ports) for rule in rules), (
                source,
                address,
                protocol,
                port,
            )
