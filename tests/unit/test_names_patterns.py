"""The names of egress rules, and the addresses that names may lead to."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from insula.model.errors import Invalid
from insula.network.names.patterns import normalise, parse_pattern
from insula.network.names.public import is_public
from insula.network.names.rates import RateLimit


@pytest.mark.parametrize(
    ("pattern", "matched", "unmatched"),
    [
        ("api.example.com", ["api.example.com", "API.Example.COM."], ["x.api.example.com", "example.com"]),
        (
            "*.a.test",
            ["b.a.test", "b.c.a.test", "_dmarc.a.test", "B.A.TEST."],
            ["a.test", "xa.test", "b.xa.test", "a.test.evil.test", "b.a.test.x"],
        ),
        ("bücher.example", ["xn--bcher-kva.example", "BÜCHER.example"], ["bucher.example"]),
        ("*.XN--BCHER-KVA.example.", ["a.bücher.example"], ["bücher.example"]),
    ],
)  # fmt: skip
def test_what_patterns_match(pattern: str, matched: list[str], unmatched: list[str]) -> None:
    parsed = parse_pattern(pattern)

    def matches(name: str) -> bool:
        normal = normalise(name)
        return normal is not None and parsed.matches(normal)

    assert [name for name in matched if not matches(name)] == []
    assert [name for name in unmatched if matches(name)] == []
    assert parse_pattern(str(parsed)) == parsed


@pytest.mark.parametrize(
    "wrong",
    [
        "", ".", "*", "*.", "*.com", "com", "localhost", "web.acme.internal", "*.internal", "a..b", "-a.test",
        "a-.test",
        "*.*.test", "a.*.test", "*a.test", "a b.test", "a.test/", "http://a.test", "a.test:443", "1.2.3.4", "*.1.2.3.4",
        "127.1.0x7f", "::1", "fd00::1", "a" * 64 + ".test", ".".join(["a" * 60] * 5), "faß.example", "a\u200db.test",
        "a.test\n", "ä" * 300,
    ],
)  # fmt: skip
def test_what_is_no_pattern_is_refused_in_one_line(wrong: str) -> None:
    with pytest.raises(Invalid) as refused:
        parse_pattern(wrong)
    assert "\n" not in str(refused.value) and refused.value.hint


@given(st.text(max_size=80))
def test_normalising_is_done_once(text: str) -> None:
    name = normalise(text)
    assert name is None or (normalise(name) == name and name.isascii() and name == name.lower())


PRIVATE = """
    0.0.0.0 10.0.0.1 10.255.255.255 100.64.0.1 100.127.255.255 127.0.0.1 127.8.8.8 168.63.129.16 169.254.169.254
    172.16.0.1 172.31.255.255 192.0.0.192 192.0.2.1 192.168.1.1 198.18.0.1 224.0.0.251 239.1.1.1 240.0.0.1
    255.255.255.255 100.100.100.200
    :: ::1 ::ffff:10.0.0.1 ::ffff:8.8.8.8 ::10.0.0.1 64:ff9b::a00:1 64:ff9b::169.254.169.254 64:ff9b:1::1
    2002:a00:1:: 2002:7f00:1::1 2001:0:a00:1:: 2001::f5ff:fffe 2001:db8::1 fc00::1 fd00:ec2::254 fd20:ce::254 fe80::1
    feb0::1 fec0::1 ff02::1 2606:2800::5efe:a00:1 2606:2800::200:5efe:c0a8:1
"""
PUBLIC = """
    1.1.1.1 9.9.9.9 93.184.216.34 100.63.0.1 100.128.0.1 172.32.0.1 192.169.0.1
    2606:2800::1 2620:fe::fe 64:ff9b::808:808
"""


@pytest.mark.parametrize("address", PRIVATE.split())
def test_names_lead_to_no_private_address(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", PUBLIC.split())
def test_names_lead_to_the_internet_except_for_ranges_of_the_tenant_s_own(address: str) -> None:
    assert is_public(address) and is_public(address, ("10.0.0.0/8", "fd00::/8"))
    assert not is_public(address, (f"{address}/{128 if ':' in address else 32}",))


@pytest.mark.parametrize("wrong", ["", "x", "1.2.3", "01.2.3.4", "2606:2800::1%eth0", "2606:2800:0::1", "1.1.1.1/32"])
def test_an_address_is_taken_in_one_form_only(wrong: str) -> None:
    assert not is_public(wrong)


def test_a_rate_is_limited_for_each_client() -> None:
    now = [0.0]
    limit = RateLimit(50, 100, lambda: now[0])
    assert sum(limit.allows("a") for _ in range(200)) == 100
    assert limit.allows("b", 5) and not limit.allows("a")
    now[0] = 1.0
    assert sum(limit.allows("a") for _ in range(200)) == 50
    now[0] = 10.0
    assert limit.allows("c") and set(limit._buckets) == {"c"}, "who is idle is forgotten"
