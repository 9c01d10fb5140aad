"""Names resolve from the moment in which a network is there, however often networks come and go."""

from __future__ import annotations

from tests.system.conftest import TenantFactory


def test_the_resolver_answers_when_a_network_was_created(tenants: TenantFactory) -> None:
    """dnsmasq does not listen at one new address in some ten; it is started again then."""
    cli = tenants()
    for number in range(40):
        cli.ok("network", "create", "other", "--subnet", f"10.{number + 1}.0.0/24")
        status = {view["network"]["name"]: view["status"] for view in cli.json("network", "ls")}
        assert status["other"]["ready"] and status["default"]["ready"], (number, status)
        cli.ok("network", "rm", "other")
