"""What a guest says of itself is read as a stranger's word."""

from __future__ import annotations

import json

import pytest

from insula.control.instances.drivers.machine.guest_report import read

INTERFACES = [
    {
        "name": "eth0",
        "hardware-address": "52:54:00:12:34:56",
        "ip-addresses": [
            {"ip-address-type": "ipv4", "ip-address": "10.0.0.2", "prefix": 24},
            {"ip-address-type": "ipv6", "ip-address": "fe80::1%eth0", "prefix": 64},
        ],
    },
    {"name": "wg0"},
]


def test_what_an_agent_says_is_shown() -> None:
    found = read(
        {
            "guest-get-host-name": {"host-name": "web"},
            "guest-get-osinfo": {"pretty-name": "Debian 12", "kernel-release": "6.1.0"},
            "guest-network-get-interfaces": INTERFACES,
        }
    )
    assert (found.answered, found.hostname, found.system, found.kernel) == (True, "web", "Debian 12", "6.1.0")
    assert [each.name for each in found.interfaces] == ["eth0", "wg0"]
    assert found.interfaces[0].addresses == ["10.0.0.2/24", "fe80::1/64"] and found.interfaces[1].mac is None


def test_a_machine_without_an_agent_says_nothing() -> None:
    assert not read({}).answered and not read({"error": "there is no agent"}).answered


@pytest.mark.parametrize(
    "value", [None, 1, "x", [], ["x"], [None], {"host-name": 1}, {"name": {}}, [{"name": "x" * 999}]]
)
def test_whatever_it_says_is_bounded(value: object) -> None:
    names = ("guest-get-host-name", "guest-get-osinfo", "guest-network-get-interfaces")
    found = read(dict.fromkeys(names, value))
    assert found.answered and found.hostname is None and all(len(each.name) <= 255 for each in found.interfaces)


def test_what_is_not_printable_is_escaped_and_lists_are_cut_off() -> None:
    hostile = {"ip-addresses": [{"ip-address": "1.1.1.1", "prefix": 99}, {"ip-address": "x\n", "prefix": 1}] * 50}
    many = [{"name": f"eth{number}\x1b[2J", "hardware-address": "x", **hostile} for number in range(1000)]
    said = {"guest-get-host-name": {"host-name": "a\nb\u202e" * 999}, "guest-network-get-interfaces": many}
    found = read(json.loads(json.dumps(said)))
    assert found.hostname and found.hostname.isprintable() and len(found.hostname) <= 255
    assert len(found.interfaces) == 32 and all(each.name.isprintable() for each in found.interfaces)
    assert not any(each.addresses or each.mac for each in found.interfaces)
