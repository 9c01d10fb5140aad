"""Declared state of the host: tenants, users and roles, by the operator; and daemons that are killed meanwhile."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.cli import Cli
from tests.support.daemon import Daemon
from tests.system.tenancy.conftest import People
from tests.system.tenancy.test_declared import apply, document, instance, instances, network, results, start

HOST = ("--host",)


def of(tenant: str, found: dict[str, Any]) -> dict[str, Any]:
    return {**found, "metadata": {**found["metadata"], "tenant": tenant}}


@pytest.fixture
def host(daemon: Daemon) -> Iterator[Cli]:
    """The operator; what a test has applied is removed."""
    yield daemon.cli
    gone = daemon.cli.run("apply", "-f", "-", "--host", "--prune", "--allow-empty", "--yes")
    assert gone.status == 0, gone


RULE = {"action": "deny", "direction": "out", "peers": [{"type": "cidr", "cidr": "10.66.0.0/16"}]}
WORLD = [
    of("declared-a", instance("web", on="default")),
    of("declared-a", document("Binding", "declared-ann", {"role": "member"})),
    of("declared-a", network("default")),
    of("declared-a", document("ServiceAccount", "ci", {})),
    of("declared-a", document("Binding", "ci", {"role": "viewer", "subject": "service-account"})),
    document("User", "declared-ann", {"uid": 4242}),
    document("OperatorPolicy", "declared-company", {"rules": [RULE], "tenants": {"labels": {"no": "such"}}}),
    document("Tenant", "declared-a", {"limits": {"instances": 5}}, {"customer": "7"}),
]


def test_tenants_users_and_all_that_tenants_have_in_one_file(host: Cli) -> None:
    made = apply(host, *WORLD, options=HOST)
    assert made.status == 0 and set(results(made).values()) == {"created"} and len(results(made)) == len(WORLD), made
    assert [line.split()[0] for line in made.out.splitlines()][:3] == ["Tenant", "OperatorPolicy", "User"]
    again = apply(host, *WORLD, options=HOST)
    assert again.status == 0 and set(results(again).values()) == {"unchanged"}, again
    assert set(results(apply(host, host.ok("dump", "--host"), options=(*HOST, "--set", "all"), verb="diff"))) == {
        # those that belong to the set `default`
        *(f"{kind} {name}" for kind, name in zip(kinds(made.out), names(made.out), strict=True))
    }
    tenant = host.json("tenant", "show", "declared-a")["tenant"]
    assert tenant["limits"]["instances"] == 5 and tenant["labels"] == {"customer": "7"}
    users = {view["principal"]["name"]: view for view in host.json("user", "ls")}
    assert users["declared-ann"]["principal"]["uid"] == 4242
    assert users["declared-ann"]["bindings"][0]["role"] == "member"
    assert host.json("policy", "show", "declared-company", "--operator")["priority"] == 1000


def kinds(text: str) -> list[str]:
    return [line.split()[0] for line in text.splitlines()]


def names(text: str) -> list[str]:
    return [line.split()[1] for line in text.splitlines()]


def test_limits_and_roles_are_changed_in_place(host: Cli) -> None:
    apply(host, *WORLD, options=HOST).ok()
    default = host.json("tenant", "show", "default")["tenant"]["limits"]["pids"]
    other = [
        document("OperatorPolicy", "declared-company", {"rules": [RULE], "priority": 5}),
        document("Tenant", "declared-a", {"limits": {"pids": 77}}),
        of("declared-a", document("Binding", "declared-ann", {"role": "admin"})),
    ]
    changed = apply(host, *other, options=HOST)
    assert set(results(changed).values()) == {"changed"}, changed
    tenant = host.json("tenant", "show", "declared-a")["tenant"]
    assert tenant["limits"]["pids"] == 77 and tenant["labels"] == {}
    assert tenant["limits"]["instances"] != 5, "not declared any more"
    policy = host.json("policy", "show", "declared-company", "--operator")
    assert (policy["priority"], len(policy["rules"])) == (5, 1) and not policy["tenants"].get("labels")
    apply(host, document("Tenant", "declared-a", {}), options=HOST).ok()
    assert host.json("tenant", "show", "declared-a")["tenant"]["limits"]["pids"] == default


def test_a_user_who_can_not_be_replaced_keeps_roles_and_tokens(host: Cli, people: People) -> None:
    apply(host, *WORLD, document("User", "declared-bob", {"uid": 4243}), options=HOST).ok()
    identities = people.operator.identities
    identities.create_token("declared-ann", ttl=600)

    def known() -> tuple[int, list[str], int]:
        """The user ID, roles, and number of tokens."""
        view = identities.user("declared-ann")
        tokens = [each for each in identities.tokens(everybody=True) if each["user"] == "declared-ann"]
        return view["principal"]["uid"], [each["role"] for each in view["bindings"]], len(tokens)

    replace = (*HOST, "--replace")
    for spec, why in (
        ({"uid": 4243}, "is that of another user"),
        ({"uid": host.json("tenant", "show", "declared-a")["tenant"]["id_base"]}, "belongs to a tenant's instances"),
        ({"subject": "x", "provider": "nobody"}, "provider"),
    ):
        failed = apply(host, document("User", "declared-ann", spec), options=replace)
        assert results(failed) == {"User declared-ann": "failed"} and why in failed.out, failed
        assert known() == (4242, ["member"], 1)
    done = apply(host, document("User", "declared-ann", {"uid": 4244}), options=replace)
    assert results(done) == {"User declared-ann": "replaced"}, done
    assert known() == (4244, [], 0), "the user is another one"


def test_an_instance_is_not_removed_for_one_that_the_quota_forbids(host: Cli) -> None:
    def tenant(memory: int) -> dict[str, Any]:
        return document("Tenant", "declared-f", {"limits": {"memory": memory}})

    before = of("declared-f", instance("web", on=None, resources={"memory": 256 << 20}))
    large = of("declared-f", instance("web", on=None, env={"A": "B"}, resources={"memory": 1 << 30}))
    apply(host, tenant(512 << 20), before, options=HOST).ok()
    found = instances(host.of("declared-f"))["web"]["id"]
    failed = apply(host, tenant(512 << 20), large, options=(*HOST, "--replace"))
    assert "Instance declared-f/web  failed: " in failed.out and "memory" in failed.out, failed
    assert instances(host.of("declared-f"))["web"]["id"] == found, "it is the one that was there"
    done = apply(host, tenant(1 << 30), large, options=(*HOST, "--replace"))
    assert results(done)["Instance declared-f/web"] == "replaced", "its own share does not count twice"


def test_what_can_not_be_replaced_is_made_again_as_it_was(host: Cli) -> None:
    """With the reason, and still a member of its set."""
    tenant, back = document("Tenant", "declared-g", {}), of("declared-g", network("back"))
    before = of("declared-g", instance("web"))
    wrong = of("declared-g", instance("web", networks=[{"network": "back", "address": "10.9.9.9"}]))
    apply(host, tenant, back, before, options=HOST).ok()
    for _ in range(2):
        failed = apply(host, tenant, back, wrong, options=(*HOST, "--replace"))
        assert results(failed)["Instance declared-g/web"] == "failed" and "10.9.9.9" in failed.out, failed
        assert instances(host.of("declared-g"))["web"]["spec"]["networks"][0]["address"] is None
        assert host.of("declared-g").json("inspect", "web")[0]["status"]["state"] == "running"
    again = apply(host, tenant, back, before, options=HOST)
    assert set(results(again).values()) == {"unchanged"}, again
    gone = apply(host, tenant, back, options=(*HOST, "--prune"))
    assert results(gone)["Instance declared-g/web"] == "removed", gone


def test_tenants_are_pruned_only_with_a_word(host: Cli) -> None:
    others = [document("User", f"declared-{n}", {}) for n in range(9)]
    apply(host, document("Tenant", "declared-b", {}), *others, options=HOST).ok()
    refused = apply(host, *others, options=(*HOST, "--prune"))
    assert refused.status == 1 and "this removes tenants: Tenant/declared-b" in refused.err
    assert results(apply(host, *others, options=(*HOST, "--prune", "--yes")))["Tenant declared-b"] == "removed"
    assert "declared-b" not in {view["tenant"]["name"] for view in host.json("tenant", "ls")}


def test_a_later_tenant_of_the_name_is_no_member(host: Cli) -> None:
    apply(host, document("Tenant", "declared-c", {}), options=HOST).ok()
    host.ok("tenant", "rm", "declared-c")
    host.ok("tenant", "create", "declared-c")
    try:
        gone = host.run("apply", "-f", "-", "--host", "--prune", "--allow-empty", "--yes")
        assert gone.status == 0 and "declared-c" not in gone.out
        assert "declared-c" in {view["tenant"]["name"] for view in host.json("tenant", "ls")}
        refused = apply(host, document("Tenant", "declared-c", {"limits": {"pids": 3}}), options=HOST)
        assert "it was not made by this set" in refused.out
    finally:
        host.ok("tenant", "rm", "declared-c")


def test_only_the_operator_applies_and_auditors_compare(host: Cli, people: People) -> None:
    apply(host, *WORLD, options=HOST).ok()
    auditor, admin = people.person("auditor"), people.person("admin", "declared-a")
    for verb, person, permission in (
        ("apply", auditor, "host.apply"),
        ("apply", admin, "host.apply"),
        ("diff", admin, "user.read"),
    ):
        refused = apply(person.cli, *WORLD, options=HOST, verb=verb)
        assert refused.status in (1, 2) and permission in refused.err and refused.out == ""
    assert "user.read" in admin.cli.fails("dump", "--host")
    assert apply(auditor.cli, *WORLD, options=HOST, verb="diff").status == 0
    assert "declared-ann" in auditor.cli.ok("dump", "--host")
    assert "a Tenant is not in a tenant" in apply(admin.cli.of("declared-a"), WORLD[-1]).err


def test_each_object_that_is_changed_has_a_line_in_the_audit_log(daemon: Daemon, host: Cli, people: People) -> None:
    apply(host, document("Tenant", "declared-e", {}), options=HOST).ok()
    member = people.person("member", "declared-e")
    own = member.cli
    world = [network("back"), document("ServiceAccount", "ci", {}), network("second", "10.2.0.0/24")]
    apply(own, *world)
    apply(own, *world, verb="diff")
    apply(own, network("back"))
    own.ok("network", "rm", "back", "second")
    seen = [json.loads(line) for line in daemon.cli.of("declared-e").ok("--json", "audit").splitlines()]
    applied = [e for e in seen if e["user"] == member.name and e["verb"].endswith(("/apply", "/diff"))]
    assert [(e.get("operation"), e.get("kind"), e["name"], e["status"]) for e in applied] == [
        ("none", "ServiceAccount", "ci", 403),
        ("create", "Network", "back", 200),
        ("create", "Network", "second", 200),
        (None, None, "default", 200),
        (None, None, "default", 200),
    ]
    assert len({e["id"] for e in applied}) == 2 and {e["tenant"] for e in applied} == {"declared-e"}


def test_a_tenant_takes_its_sets_with_it(daemon: Daemon, host: Cli) -> None:
    host.ok("tenant", "create", "declared-d")
    own = host.of("declared-d")
    apply(own, network("back", a="1"), options=("--set", "mine")).ok()
    host.ok("tenant", "rm", "-f", "declared-d")
    host.ok("tenant", "create", "declared-d")
    try:
        own.ok("network", "create", "back", "--subnet", "10.1.0.0/24", "-l", "a=2")
        differs = apply(own, network("back", a="1"), options=("--set", "mine"))
        assert differs.status == 1 and "it was not made by this set" in differs.out
        own.run("apply", "-f", "-", "--set", "mine", "--prune", "--allow-empty", "--yes").ok()
        assert [view["network"]["name"] for view in own.json("network", "ls")] == ["back"]
    finally:
        host.ok("tenant", "rm", "-f", "declared-d")


PROVIDER = '[[oidc]]\nname = "corp"\nissuer = "https://id.example"\nclient_id = "insula"\n'


def test_a_daemon_that_is_killed_after_any_object_loses_nothing(unstarted: Daemon) -> None:
    """The same apply again ends what was begun, and prunes what was made before the kill."""
    fresh = unstarted
    fresh.configure(PROVIDER)
    fresh.start()
    group = {"role": "member", "subject": "group", "group": "corp:Développeurs & co"}
    world = [of("acme", network("back")), *(of("acme", instance(name)) for name in "ab")]
    world += [document("Tenant", "acme", {}), document("User", "ann", {"provider": "corp", "subject": "4 2"})]
    world += [
        of("acme", document("Binding", "developers", group)),
        of("acme", document("Binding", "ann", {"role": "admin"})),
    ]
    for count in range(1, len(world) + 1):
        process = start(fresh.cli, *world, options=HOST)
        for _ in range(count):
            assert json.loads(process.stdout.readline())["state"] == "done"
        fresh.kill("insulad")
        process.communicate(timeout=60)
        fresh.start()
        done = apply(fresh.cli, *world, options=HOST)
        assert done.status == 0 and set(results(done).values()) <= {"unchanged", "created"}, done
        assert apply(fresh.cli, *world, options=HOST, verb="diff").status == 0
        same = apply(fresh.cli, fresh.cli.ok("dump", "--host"), options=HOST, verb="diff")
        assert (same.status, same.out) == (0, "")
        gone = fresh.cli.run("apply", "-f", "-", "--host", "--prune", "--allow-empty", "--yes")
        assert gone.status == 0 and len(results(gone)) == len(world), gone
        assert [view["tenant"]["name"] for view in fresh.cli.json("tenant", "ls")] == ["default"]
