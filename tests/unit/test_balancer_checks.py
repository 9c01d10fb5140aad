"""Load balancers without a network: which backends they have, and what results of checks make of these."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from insula.control.networks.backends import backends_of, listeners_of
from insula.control.networks.balancer_checks import CheckedAddress, CheckedBackend
from insula.control.networks.check_probe import _judged
from insula.control.networks.load_balancers import check_spec
from insula.model.errors import Invalid
from insula.model.floating_ips import FloatingIp
from insula.model.load_balancers import BackendCheck, BalancerAddress, BalancerPort, LoadBalancer, LoadBalancerSpec
from insula.model.objects import Instance, InstanceSpec, Port
from insula.model.policies import Selector
from insula.model.rules import MAX_BACKENDS
from tests.support import objects

KEY = CheckedAddress("acme", "shop", 1, "id", "10.0.0.2")
GOOD, BAD = None, "no answer"


def results(threshold: int, *outcomes: str | None, passed: bool = False) -> list[bool]:
    """Whether a backend passes after each result."""
    backend = CheckedBackend(KEY, 80, BackendCheck(threshold=threshold), passed=passed)
    found = []
    for each in outcomes:
        before = backend.passes
        assert backend.judge(each) == (backend.passes != before)
        found.append(backend.passes)
    return found


def test_a_new_backend_is_out_until_its_first_success_which_is_enough() -> None:
    assert results(2, BAD, BAD, BAD, GOOD, GOOD) == [False, False, False, True, True]
    assert results(5, BAD, GOOD) == [False, True]


def test_two_of_the_last_three_decide() -> None:
    assert results(2, GOOD, BAD, GOOD, BAD, BAD) == [True, True, True, False, False]
    assert results(2, GOOD, BAD, BAD, GOOD, GOOD) == [True, True, False, False, True]
    assert results(1, GOOD, BAD, GOOD) == [True, False, True]
    assert results(3, GOOD, BAD, BAD, BAD, GOOD) == [True, True, True, False, False]


def test_one_that_passed_before_insulad_started_goes_on_until_checks_deny_it() -> None:
    assert results(2, BAD, BAD, passed=True) == [True, False]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"HTTP/1.1 200 OK\r\n", None),
        (b"HTTP/1.0 301 Moved\r\n", None),
        (b"HTTP/1.1 204\r\n", None),
        (b"HTTP/1.1 400 Bad\r\n", "it answers with status 400"),
        (b"HTTP/1.1 503 \x1b[2J\r\n", "it answers with status 503"),
        (b"HTTP/1.1 \xb2\xb2\xb2 x\r\n", "it does not answer by HTTP"),
        (b"HTTP/1.1 2000\r\n", None),
        (b"HTTP/1.1 20\r\n", "it does not answer by HTTP"),
        (b"HTTP/1.1 -12 x", "it does not answer by HTTP"),
        (b"SSH-2.0-x\r\n", "it does not answer by HTTP"),
        (b"", "it does not answer by HTTP"),
        (b"y\n" * 512, "it does not answer by HTTP"),
    ],
)
def test_the_status_of_an_answer_decides(answer: bytes, reason: str | None) -> None:
    assert _judged(answer) == reason


# -- backends --------------------------------------------------------------------------------------------------------


def balancer(**fields: Any) -> LoadBalancer:
    on = fields.pop("on", [BalancerAddress()])
    return LoadBalancer(
        **{"tenant": "acme", "name": "shop", "index": 1, "listen": [BalancerPort(port=80)], "port": 8080, "on": on}
        | {"reached": on, "created": 0.0}
        | fields
    )


def instance(name: str, *networks: str, labels: dict[str, str] | None = None) -> Instance:
    ports = [
        Port(tenant="acme", network=each, instance=name, index=n, mac="02:00:00:00:00:01", address=f"10.{n}.0.2")
        for n, each in enumerate(networks)
    ]
    spec = InstanceSpec(image="x", labels=labels or {})
    return msgspec.structs.replace(objects.instance(name=name, spec=spec), ports=ports, id=name)


def test_backends_are_those_named_and_those_selected() -> None:
    shop = {"app": "shop"}
    known = [
        (instance("a", "front", labels=shop), True),
        (instance("b", "front", labels=shop), False),
        (instance("c", "front"), True),
        (instance("d"), True),
    ]
    both = balancer(select=Selector(labels=shop), instances=["c", "d", "nobody"])
    found = backends_of(both, known)
    assert [(each.name, each.address, each.end is not None) for each in found] == [
        ("a", "10.0.0.2", True),
        ("b", "10.0.0.2", False),
        ("c", "10.0.0.2", True),
        ("d", None, False),
        ("nobody", None, False),
    ]
    assert backends_of(balancer(), known) == [], "without a selector nothing is selected"


def test_the_port_on_the_balancers_network_is_preferred() -> None:
    two = (instance("a", "front", "back"), True)
    assert backends_of(balancer(instances=["a"]), [two])[0].address == "10.0.0.2"
    inner = balancer(instances=["a"], on=[BalancerAddress(network="back", address="10.1.0.9")])
    assert backends_of(inner, [two])[0].address == "10.1.0.2"


def test_the_first_ones_count() -> None:
    many = [(instance(f"i{n:03}", "front"), True) for n in range(MAX_BACKENDS + 5)]
    found = backends_of(balancer(select=Selector()), many)
    assert [each.name for each in found] == [f"i{n:03}" for n in range(MAX_BACKENDS)]


def test_listeners_are_every_port_of_every_address() -> None:
    on = [BalancerAddress(floating_ip="front"), BalancerAddress(floating_ip="gone"), BalancerAddress()]
    made = balancer(on=on, listen=[BalancerPort(port=80), BalancerPort(port=53, protocol="udp")])
    floating = {"front": FloatingIp(tenant="acme", name="front", address="203.0.113.7", created=0.0)}
    assert [(each.address, each.port, each.protocol) for each in listeners_of(made, floating)] == [
        ("203.0.113.7", 80, "tcp"),
        ("203.0.113.7", 53, "udp"),
        (None, 80, "tcp"),
        (None, 53, "udp"),
    ]


# -- specs -----------------------------------------------------------------------------------------------------------


def spec(**fields: Any) -> LoadBalancerSpec:
    given = {"name": "shop", "listen": [BalancerPort(port=80)], "on": [BalancerAddress()], **fields}
    return LoadBalancerSpec(**given)


def test_defaults_follow_the_listeners() -> None:
    found = check_spec(spec())
    assert found.port == 80 and found.health == BackendCheck()
    udp = check_spec(spec(listen=[BalancerPort(port=53, protocol="udp")]))
    assert udp.port == 53 and udp.health == BackendCheck(kind="none")
    assert check_spec(spec(on=[BalancerAddress(address="0.0.0.0")])).on == [BalancerAddress()]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "Shop"}, "Shop"),
        ({"listen": []}, "needs a port and an address"),
        ({"on": []}, "needs a port and an address"),
        ({"listen": [BalancerPort(port=n) for n in range(1, 18)]}, "17 ports of a load balancer are too many"),
        ({"on": [BalancerAddress(network=f"n{n}") for n in range(17)]}, "17 addresses of a load balancer are too many"),
        ({"instances": [f"i{n}" for n in range(129)]}, "129 named backends"),
        ({"instances": ["../x"]}, "x"),
        ({"listen": [BalancerPort(port=0)]}, "is no port"),
        ({"port": 65536}, "is no port"),
        ({"on": [BalancerAddress(floating_ip="a", network="b")]}, "has no network and no other address"),
        ({"on": [BalancerAddress(address6="fd00::1")]}, "is `address`"),
        ({"on": [BalancerAddress(address="224.0.0.1")]}, "can't be published"),
        ({"health": BackendCheck(path="health")}, "is no path of a check"),
        ({"health": BackendCheck(path="/a b")}, "is no path of a check"),
        ({"health": BackendCheck(path="/\n")}, "is no path of a check"),
        ({"health": BackendCheck(path="/" + "x" * 256)}, "is no path of a check"),
        ({"health": BackendCheck(interval=0.5)}, "interval"),
        ({"health": BackendCheck(timeout=float("nan"))}, "timeout"),
        ({"health": BackendCheck(threshold=0)}, "threshold"),
        ({"health": BackendCheck(port=70000)}, "is no port"),
    ],
)
def test_bad_specs_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(Invalid, match=message):
        check_spec(spec(**fields))
