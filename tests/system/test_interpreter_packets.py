"""The interpreter and the kernel agree: random rules, and packets that meet them."""

from __future__ import annotations

import itertools

from hypothesis import HealthCheck, example, given, note, reject, settings
from hypothesis import strategies as st

from insula.network.interpreter.delivery import NetworkPlace, PacketSource
from insula.network.interpreter.space import TCP, UDP, NumberRange, Service
from insula.network.interpreter.tracing import TracedPacket
from insula.network.live import LivePacket, LiveTest
from insula.network.ranges import number_of
from tests.support.lab import Lab, isolated, two_tenants

WEB, DB, PORTS = "10.0.0.2", "10.0.0.3", (9, 22, 53, 80, 443)
NUMBERS = {"tcp": TCP, "udp": UDP}

numbers = st.sampled_from(PORTS)
addresses = st.sampled_from((WEB, DB, "10.0.0.0/30", "10.0.0.2-10.0.0.9", "10.0.0.128/25"))
marks = st.integers(0, 3)
conditions = st.one_of(
    st.builds("ip {} {}{}".format, st.sampled_from(("saddr", "daddr")), st.sampled_from(("", "!= ")), addresses),
    st.builds("ip daddr {{ {}, {} }}".format, st.just(DB), st.sampled_from(("10.0.1.0/24", "192.0.2.1"))),
    st.builds("th dport {}{}".format, st.sampled_from(("", "!= ", "< ", ">= ")), numbers),
    st.builds("th dport {}-{}".format, st.integers(1, 60), st.integers(61, 500)),
    st.builds("{} dport {{ {}, 1000-2000 }}".format, st.sampled_from(("tcp", "udp")), numbers),
    st.builds("meta l4proto {}{}".format, st.sampled_from(("", "!= ")), st.sampled_from(("tcp", "udp", "icmp"))),
    st.builds("ip daddr . th dport {{ {} . {}, {} . 22 }}".format, st.just(DB), numbers, st.just(WEB)),
    st.builds("meta l4proto . th dport @ports".format),
    st.builds("meta mark & {:#x} == {:#x}".format, st.integers(1, 3), marks),
    st.builds("meta mark {}{:#x}".format, st.sampled_from(("", "!= ")), marks),
    st.builds("ct state {}".format, st.sampled_from(("new", "established", "new,related", "invalid"))),
    st.builds("ct original ip daddr {}".format, st.sampled_from((WEB, DB))),
    st.builds("@th,16,16 {}".format, numbers),
    st.builds("iifname {}".format, st.sampled_from(('"br*"', '"br1"', '"uplink"'))),
)
actions = st.one_of(
    st.sampled_from(("accept", "drop", "return", "jump other", "goto other", "counter", "reject")),
    st.builds("meta mark set {:#x}".format, marks),
    st.builds("meta mark set th dport map {{ {} : {:#x}, 100-200 : 0x2 }}".format, numbers, marks),
    st.builds("th dport vmap {{ {} : drop, 1000-2000 : accept }}".format, numbers),
    st.builds("meta mark vmap {{ {:#x} : drop, 0x7 : accept }}".format, marks),
    st.builds("meta l4proto vmap {{ {} : jump other, icmp : drop }}".format, st.sampled_from(("tcp", "udp"))),
)
rules = st.lists(st.builds("{} {}".format, st.lists(conditions, max_size=3).map(" ".join), actions), max_size=5)
_sources = itertools.count(20000)


def table(main: list[str], other: list[str], policy: str) -> str:
    """The text of a table whose chain judges what is forwarded."""
    inner = [rule.replace("jump other", "accept").replace("goto other", "drop") for rule in other]
    return "\n".join(
        [
            "add table inet drawn",
            "delete table inet drawn",
            "table inet drawn {",
            "set ports { type inet_proto . inet_service; elements = { tcp . 80, udp . 53 }; }",
            "chain other {",
            *inner,
            "}",
            f"chain main {{ type filter hook forward priority 10; policy {policy};",
            *main,
            "}",
            "}",
        ]
    )


def interpreted(cloud: Lab, protocol: str, source_port: int, port: int) -> bool:
    """Whether a packet from web to db comes there, by the interpreter."""
    intent, web = cloud.intent("acme"), cloud.instances["acme", "web"].port
    sender = PacketSource(NetworkPlace("port", "web"), NumberRange(*[number_of(WEB)] * 2), web.mac)
    number = NUMBERS[protocol]
    service = Service(NumberRange(number, number), NumberRange(source_port, source_port), NumberRange(port, port))
    way = cloud.fabric.trace(intent.tenant, intent, TracedPacket(4, sender, number_of(DB), service))
    assert not way.unknown, way.unknown
    return NetworkPlace("port", "db") in way.ends


@isolated
def test_random_rules_do_what_the_interpreter_says() -> None:
    with two_tenants(subnet6=None) as cloud:
        tenant, ports = cloud.tenants["acme"], [i.port for (owner, _), i in cloud.instances.items() if owner == "acme"]
        points = cloud.fabric.probe_points(tenant, [cloud.networks["acme", "net"]], ports)
        station = next(each for each in points.stations if each.key == "acme/web")
        target = next(each for each in points.stations if each.key == "acme/db")
        nft = cloud.fabric._tenant(tenant).nft

        outcomes: set[bool] = set()

        @settings(max_examples=20, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(rules, rules, st.sampled_from(("accept", "drop")), st.sampled_from(("tcp", "udp")), numbers)
        @example([], [], "accept", "tcp", 80)
        @example(["th dport 80 drop"], [], "accept", "udp", 80)
        def agree(main: list[str], other: list[str], policy: str, protocol: str, port: int) -> None:
            text = table(main, other, policy)
            note(text)
            try:
                nft.run(text)
            except OSError:  # conditions of one rule contradict each other
                reject()
            source_port = next(_sources)
            says = interpreted(cloud, protocol, source_port, port)
            with LiveTest([points]) as test:
                seen = test.from_port(station, LivePacket(WEB, DB, protocol, source_port, port), [target.mac])
            outcomes.add(says)
            arrived = any((each.where, each.name) == ("arrived", "acme/db") for each in seen)
            assert says == arrived, f"{protocol}/{port}: interpreted {says}, arrived {arrived}\n{text}"

        agree()
        assert outcomes == {True, False}, "the positive control"
        points.close()
