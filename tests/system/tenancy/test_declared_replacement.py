"""A replacement that can't be made, because of addresses or users, is refused before anything is removed."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.cli import Cli
from tests.system.conftest import TenantFactory
from tests.system.tenancy.test_declared import apply, document, instance, network, results, shown


@pytest.fixture
def cli(tenants: TenantFactory) -> Cli:
    return tenants()


def at(**chosen: str) -> list[dict[str, str]]:
    """The network back, with these addresses there."""
    return [{"network": "back", **chosen}]


def test_networks_are_plugged_and_unplugged_in_place(cli: Cli) -> None:
    """The instance goes on. A port that differs in anything is another one; the others are not touched."""
    two = [network("back"), network("front", "10.5.0.0/24")]
    apply(cli, *two, instance("web", networks=at(address="10.1.0.40"))).ok()
    before = shown(cli, "web")
    both = [*at(address="10.1.0.40"), {"network": "front", "address": "10.5.0.40"}]
    assert results(apply(cli, *two, instance("web", networks=both)))["Instance web"] == "changed"
    after = shown(cli, "web")
    assert after["status"]["pid"] == before["status"]["pid"]
    assert [port["address"] for port in after["instance"]["ports"]] == ["10.1.0.40", "10.5.0.40"]
    assert after["instance"]["ports"][0] == before["instance"]["ports"][0]
    assert set(results(apply(cli, *two, instance("web", networks=both))).values()) == {"unchanged"}
    moved = [*at(address="10.1.0.40"), {"network": "front", "address": "10.5.0.41"}]
    assert results(apply(cli, *two, instance("web", networks=moved)))["Instance web"] == "changed"
    assert [port["address"] for port in shown(cli, "web")["instance"]["ports"]] == ["10.1.0.40", "10.5.0.41"]
    assert results(apply(cli, *two, instance("web", networks=[])))["Instance web"] == "changed"
    assert shown(cli, "web")["instance"]["ports"] == []
    assert shown(cli, "web")["status"]["pid"] == before["status"]["pid"]


def test_files_with_one_network_are_understood(cli: Cli) -> None:
    """As earlier versions had it: `network`, `address`, `mac_address`."""
    spec = {"image": "busybox", "command": ["sleep", "600"], "stop_timeout": 0}
    old = document("Instance", "old", {**spec, "network": "back", "address": "10.1.0.33"})
    apply(cli, network("back"), old).ok()
    assert shown(cli, "old")["instance"]["spec"]["networks"][0]["address"] == "10.1.0.33"
    assert set(results(apply(cli, network("back"), old)).values()) == {"unchanged"}
    new = instance("old", networks=at(address="10.1.0.33"))
    assert set(results(apply(cli, network("back"), new)).values()) == {"unchanged"}


def test_a_replacement_whose_addresses_are_taken_leaves_what_there_is(cli: Cli) -> None:
    """The instance is not even stopped. What it has itself is free for what takes its place."""
    other = instance("other", networks=at(address="10.1.0.77", mac="02:42:ac:11:00:77"))
    apply(cli, network("back"), other, instance("web", networks=at(address="10.1.0.78"))).ok()
    before = shown(cli, "web")
    starts = before["status"]["starts"], before["status"]["started"]
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"networks": at(address="10.1.0.77")}, "address 10.1.0.77 is taken"),
        ({"networks": at(mac="02:42:ac:11:00:77")}, "MAC address 02:42:ac:11:00:77 is taken"),
        ({"networks": at(address="10.9.0.1")}, "outside subnet"),
        ({"networks": at(address6="fd00::1")}, "has no IPv6"),
        ({"user": "nobody-here"}, "not in the image's /etc/passwd"),
    )
    for wrong, what in cases:
        result = apply(cli, instance("web", **wrong), options=("--replace",))
        assert result.status == 1 and results(result) == {"Instance web": "failed"} and what in result.out, result
    after = shown(cli, "web")
    assert after["instance"]["id"] == before["instance"]["id"]
    assert (after["status"]["starts"], after["status"]["started"]) == starts
    same = instance("web", networks=at(address="10.1.0.78"), env={"COLOUR": "red"})
    assert results(apply(cli, same, options=("--replace",))) == {"Instance web": "replaced"}
    assert shown(cli, "web")["instance"]["ports"][0]["address"] == "10.1.0.78"
