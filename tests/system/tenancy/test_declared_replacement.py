"""A replacement that can't be made, because of addresses or users, is refused before anything is removed."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.cli import Cli
from tests.system.conftest import TenantFactory
from tests.system.tenancy.test_declared import apply, instance, network, results, shown


@pytest.fixture
def cli(tenants: TenantFactory) -> Cli:
    return tenants()


def at(**chosen: str) -> list[dict[str, str]]:
    """The network back, with these addresses there."""
    return [{"network": "back", **chosen}]


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
