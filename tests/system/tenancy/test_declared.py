"""Declared state in a tenant: apply, diff and dump by the command line, against a real daemon."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.cli import Cli, Result
from tests.support.wait import until
from tests.system.conftest import TenantFactory, remove_instances
from tests.system.tenancy.conftest import People


def network(name: str, subnet: str = "10.1.0.0/24", **labels: str) -> dict[str, Any]:
    return document("Network", name, {"subnet": subnet}, labels)


def instance(name: str, on: str | None = "back", labels: dict[str, str] | None = None, **spec: Any) -> dict[str, Any]:
    networks = [] if on is None else [{"network": on}]
    whole = {"image": "busybox", "networks": networks, "command": ["sleep", "600"], "stop_timeout": 0, **spec}
    return document("Instance", name, whole, labels or {})


def document(kind: str, name: str, spec: dict[str, Any], labels: dict[str, str] | None = None) -> dict[str, Any]:
    metadata = {"name": name, "labels": labels} if labels else {"name": name}
    return {"apiVersion": "insula/v1", "kind": kind, "metadata": metadata, "spec": spec}


def apply(cli: Cli, *documents: dict[str, Any] | str, options: tuple[str, ...] = (), verb: str = "apply") -> Result:
    """`insula apply -f -`, with documents as JSON, which is YAML."""
    text = "\n---\n".join(each if isinstance(each, str) else json.dumps(each) for each in documents)
    return cli.run(verb, "-f", "-", *options, stdin=text)


def results(result: Result) -> dict[str, str]:
    """What was done about each object: {"Instance web": "created"}; what follows a colon is left out."""
    lines = [line for line in result.out.splitlines() if not line.startswith(" ")]
    return {name: done.partition(":")[0] for name, _, done in (line.partition("  ") for line in lines)}


def instances(cli: Cli) -> dict[str, dict[str, Any]]:
    return {view["instance"]["name"]: view["instance"] for view in cli.json("ps", "-a")}


def shown(cli: Cli, name: str) -> Any:
    (found,) = cli.json("inspect", name)
    return found


def by_hand(cli: Cli, name: str, *options: str) -> None:
    network = () if "--network" in options else ("--network", "none")
    cli.ok("run", "-d", "--name", name, *network, "--stop-timeout", "0", *options, "busybox", "sleep", "600")


@pytest.fixture
def cli(tenant: Cli) -> Iterator[Cli]:
    """The tenant of this file; what a test leaves is removed, but for its sets."""
    yield tenant
    remove_instances(tenant)
    for view in tenant.json("network", "ls"):
        if view["network"]["name"] != "default":
            tenant.ok("network", "rm", view["network"]["name"])


# -- what an apply does ------------------------------------------------------------------------------------------------


def test_documents_in_any_order_and_a_second_time_nothing_changes(cli: Cli) -> None:
    world = [instance("b", options={"pid_of": "a"}), instance("a"), network("back")]
    first = apply(cli, *world)
    assert first.status == 0, first
    assert results(first) == {"Network back": "created", "Instance a": "created", "Instance b": "created"}
    ids = {name: each["id"] for name, each in instances(cli).items()}
    again = apply(cli, *world)
    assert again.status == 0 and set(results(again).values()) == {"unchanged"}, again
    assert {name: each["id"] for name, each in instances(cli).items()} == ids
    assert apply(cli, *world, verb="diff").status == 0


def test_what_can_be_changed_is_changed_while_it_runs(cli: Cli) -> None:
    apply(cli, instance("web", on=None, labels={"v": "1"})).ok()
    before = shown(cli, "web")
    changed = instance("web", on=None, labels={"v": "2"}, resources={"pids": 99}, restart={"name": "always"})
    assert results(apply(cli, changed)) == {"Instance web": "changed"}
    after = shown(cli, "web")
    assert after["instance"]["id"] == before["instance"]["id"]
    assert after["status"]["pid"] == before["status"]["pid"], "it runs on"
    assert after["instance"]["spec"]["labels"] == {"v": "2"}
    assert after["instance"]["spec"]["resources"]["pids"] == after["status"]["resources"]["pids"] == 99
    assert after["instance"]["spec"]["restart"]["name"] == "always"
    cli.ok("pause", "web")
    assert results(apply(cli, instance("web", on=None))) == {"Instance web": "changed"}, "back to the defaults"
    assert shown(cli, "web")["status"]["state"] == "paused", "it stays so"
    spec = shown(cli, "web")["instance"]["spec"]
    assert (spec["labels"], spec["resources"]["pids"], spec["restart"]["name"]) == ({}, 4096, "no")


def test_what_can_not_be_changed_is_replaced_only_if_that_is_asked_for(cli: Cli) -> None:
    apply(cli, instance("web", on=None)).ok()
    before = instances(cli)["web"]["id"]
    other = instance("web", on=None, env={"COLOUR": "red"})
    refused = apply(cli, other)
    assert refused.status == 1 and results(refused) == {"Instance web": "refused"}
    assert "spec.env.COLOUR can't be changed; hint: --replace" in refused.out
    assert "+    COLOUR: red" in refused.out and instances(cli)["web"]["id"] == before
    assert results(apply(cli, other, options=("--replace",))) == {"Instance web": "replaced"}
    after = instances(cli)["web"]
    assert after["id"] != before and after["spec"]["env"] == {"COLOUR": "red"}


def test_a_replacement_that_can_not_be_made_leaves_what_there_is(cli: Cli) -> None:
    apply(cli, instance("web", on=None)).ok()
    before = instances(cli)["web"]["id"]
    for wrong in (instance("web", on="nowhere"), instance("web", on=None, image="no-such-image")):
        result = apply(cli, wrong, options=("--replace",))
        assert result.status == 1 and results(result) == {"Instance web": "failed"}
    assert instances(cli)["web"]["id"] == before


def test_a_network_is_replaced_or_stays_as_it_is(cli: Cli) -> None:
    apply(cli, network("back"), network("other", "10.2.0.0/24")).ok()
    overlapping = apply(cli, network("back", "10.2.0.0/25"), options=("--replace",))
    assert overlapping.status == 1 and "overlaps" in overlapping.out
    subnets = {view["network"]["name"]: view["network"]["subnet"] for view in cli.json("network", "ls")}
    assert subnets["back"] == "10.1.0.0/24"
    assert results(apply(cli, network("back", "10.3.0.0/24"), options=("--replace",))) == {"Network back": "replaced"}
    apply(cli, instance("web")).ok()
    used = apply(cli, network("back", "10.4.0.0/24"), options=("--replace",))
    assert results(used) == {"Network back": "failed"} and "network back is used by web" in used.out
    assert results(apply(cli, network("back", "10.3.0.0/24", tier="x"))) == {"Network back": "changed"}, "its labels"
    assert shown(cli, "web")["status"]["state"] == "running"


def test_several_files_of_several_formats_are_one_apply(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(
        'apiVersion = "insula/v1"\nkind = "Network"\nmetadata = {name = "back"}\nspec = {subnet = "10.1.0.0/24"}\n'
    )
    (tmp_path / "b.json").write_text(json.dumps([instance("web")]))
    (tmp_path / "c.yaml").write_text("%YAML 1.2\n---\n" + json.dumps(instance("db", on=None)))
    files = [word for path in sorted(tmp_path.iterdir()) for word in ("-f", str(path))]
    done = cli.run("apply", *files)
    assert results(done) == {"Network back": "created", "Instance db": "created", "Instance web": "created"}
    (tmp_path / "b.json").write_text('{"a": ]')
    refused = cli.run("apply", *files)
    assert refused.status == 1 and refused.err.startswith(f"error: {tmp_path}/b.json:1:7: ")
    assert "Network" in cli.json("apply", "--schema")["$defs"]["NetworkDocument"]["properties"]["kind"]["enum"]


def test_a_change_by_hand_is_a_conflict_until_it_is_taken_over(cli: Cli) -> None:
    declared = instance("web", on=None, resources={"pids": 100})
    apply(cli, declared).ok()
    cli.ok("update", "web", "--pids", "200")
    for verb, status in (("apply", 1), ("diff", 1)):
        result = apply(cli, declared, verb=verb)
        assert result.status == status and "spec.resources.pids was changed by hand" in result.out
        assert "# spec.resources.pids: applied 100, now 200, declared 100" in result.out
    assert instances(cli)["web"]["spec"]["resources"]["pids"] == 200
    apply(cli, declared, options=("--force",)).ok()
    assert instances(cli)["web"]["spec"]["resources"]["pids"] == 100


def test_fields_that_no_file_has_are_the_server_s(cli: Cli) -> None:
    apply(cli, instance("web", on=None)).ok()
    cli.ok("update", "web", "--pids", "200")
    assert results(apply(cli, instance("web", on=None, labels={"a": "b"}))) == {"Instance web": "changed"}
    assert instances(cli)["web"]["spec"]["resources"]["pids"] == 200


def test_what_was_made_by_hand_is_not_changed_without_a_word(cli: Cli) -> None:
    by_hand(cli, "web")
    assert results(apply(cli, instance("web", on=None))) == {"Instance web": "unchanged"}
    spelled_out = instance("web", on=None, image="docker.io/library/busybox:latest")
    assert results(apply(cli, spelled_out)) == {"Instance web": "unchanged"}
    by_hand(cli, "db")
    other = apply(cli, instance("db", on=None, resources={"pids": 9}))
    assert other.status == 1 and "it was not made by this set" in other.out
    assert instances(cli)["db"]["spec"]["resources"]["pids"] == 4096


def test_one_failure_skips_what_depends_on_it_and_nothing_else(cli: Cli) -> None:
    cli.ok("network", "create", "taken", "--subnet", "10.9.0.0/24")
    result = apply(cli, instance("b"), instance("free", on=None), network("back", "10.9.0.0/25"), network("other"))
    assert result.status == 1
    assert results(result) == {
        "Network back": "failed",
        "Network other": "created",
        "Instance b": "skipped",
        "Instance free": "created",
    }
    assert "Instance b  skipped: Network/back was not applied" in result.out
    assert "1 failed" in result.err and "1 skipped" in result.err and "2 created" in result.err
    assert set(instances(cli)) == {"free"}
    cli.ok("network", "rm", "taken")
    again = apply(cli, instance("b"), instance("free", on=None), network("back", "10.9.0.0/25"), network("other"))
    assert again.status == 0 and results(again)["Instance b"] == "created"


def test_a_failed_start_is_tried_again(cli: Cli) -> None:
    by_hand(cli, "owner")
    broken = instance("web", on=None, command=["/no/such/program"])
    assert results(apply(cli, broken)) == {"Instance web": "failed"}
    assert set(instances(cli)) == {"owner", "web"}
    assert results(apply(cli, broken)) == {"Instance web": "failed"}, "not: unchanged"
    mended = apply(cli, instance("web", on=None), options=("--replace",))
    assert results(mended) == {"Instance web": "replaced"}
    assert results(apply(cli, instance("web", on=None))) == {"Instance web": "unchanged"}


def test_the_wanted_state_is_a_field(cli: Cli) -> None:
    apply(cli, instance("web", on=None, wanted="stopped")).ok()
    assert shown(cli, "web")["status"]["state"] == "created"
    apply(cli, instance("web", on=None, wanted="running")).ok()
    assert shown(cli, "web")["status"]["state"] == "running"
    apply(cli, instance("web", on=None, wanted="stopped")).ok()
    assert shown(cli, "web")["status"]["state"] == "exited"
    assert "wanted: stopped" in cli.ok("dump")


def test_a_wrong_file_changes_nothing(cli: Cli) -> None:
    for wrong in ("a: [", "{}", json.dumps({**network("x"), "kind": "Nothing"})):
        result = apply(cli, network("back"), wrong)
        assert result.status == 1 and result.err.startswith("error: -") and result.err.count("\n") == 1, result
    assert [view["network"]["name"] for view in cli.json("network", "ls")] == ["default"]
    assert "declare nothing" in cli.fails("apply", "-f", "-", stdin="# nothing\n")
    assert "can't be read" in cli.fails("apply", "-f", "/no/such/file.yaml")
    assert "needs a file" in cli.fails("apply", status=2)


# -- prune -------------------------------------------------------------------------------------------------------------


def test_prune_removes_what_the_set_had_and_nothing_else(cli: Cli) -> None:
    """Of this set alone: not what was made by hand, by another set, or again by hand under the same name."""
    by_hand(cli, "by-hand", "-l", "set=default")
    mine = [network("back"), *(instance(name, on=None) for name in "abcd")]
    apply(cli, *mine).ok()
    apply(cli, instance("theirs", on=None), options=("--set", "other")).ok()
    cli.ok("rm", "-f", "d")
    by_hand(cli, "d")
    assert set(results(apply(cli, *mine[:2])).values()) == {"unchanged"}, "without --prune nothing is removed"
    plan = apply(cli, *mine[:3], verb="diff", options=("--prune",))
    assert plan.status == 1 and "Instance c  remove" in plan.out and "Instance d" not in plan.out
    pruned = apply(cli, *mine[:3], options=("--prune",))
    assert results(pruned) == {
        "Network back": "unchanged",
        "Instance a": "unchanged",
        "Instance b": "unchanged",
        "Instance c": "removed",
    }
    assert set(instances(cli)) == {"by-hand", "theirs", "a", "b", "d"}


def test_the_last_object_is_pruned_too_if_that_is_meant(cli: Cli) -> None:
    apply(cli, instance("a", on=None), instance("b", on=None), instance("c", on=None)).ok()
    assert "declare nothing" in cli.fails("apply", "-f", "-", "--prune")
    assert "removes 3 of the 3 objects of set default: " in cli.fails("apply", "-f", "-", "--prune", "--allow-empty")
    two = apply(cli, instance("a", on=None), options=("--prune",))
    assert two.status == 1 and "removes 2 of the 3 objects of set default: Instance/b, Instance/c" in two.err
    assert set(instances(cli)) == {"a", "b", "c"}
    gone = cli.run("apply", "-f", "-", "--prune", "--allow-empty", "--yes")
    assert gone.status == 0 and set(results(gone).values()) == {"removed"} and instances(cli) == {}


def test_nothing_is_pruned_while_something_is_not_applied(cli: Cli) -> None:
    apply(cli, *(instance(name, on=None) for name in "abc")).ok()
    wrong = instance("new", on=None, image="no-such-image")
    result = apply(cli, instance("a", on=None), instance("b", on=None), wrong, options=("--prune",))
    assert result.status == 1 and results(result)["Instance c"] == "skipped"
    assert set(instances(cli)) == {"a", "b", "c"}


def test_one_removal_that_fails_is_not_the_end_of_the_others(cli: Cli) -> None:
    apply(cli, *(instance(name, on=None) for name in "ab"), network("back"), network("other", "10.2.0.0/24")).ok()
    by_hand(cli, "user", "--network", "back")
    gone = cli.run("apply", "-f", "-", "--prune", "--allow-empty", "--yes")
    assert gone.status == 1 and "network back is used by user" in gone.out
    assert results(gone)["Network other"] == "removed" and set(instances(cli)) == {"user"}
    cli.ok("rm", "-f", "user")
    again = cli.run("apply", "-f", "-", "--prune", "--allow-empty", "--yes")
    assert results(again) == {"Network back": "removed"}, "it has stayed a member"


def test_an_object_belongs_to_one_set(cli: Cli) -> None:
    apply(cli, instance("web", on=None), options=("--set", "one")).ok()
    refused = apply(cli, instance("web", on=None), options=("--set", "two"))
    assert refused.status == 1 and "it belongs to another set" in refused.out
    apply(cli, instance("web", on=None), options=("--set", "two", "--force")).ok()
    cli.run("apply", "-f", "-", "--set", "one", "--prune", "--allow-empty", "--yes").ok()
    assert set(instances(cli)) == {"web"}
    cli.run("apply", "-f", "-", "--set", "two", "--prune", "--allow-empty", "--yes").ok()
    assert instances(cli) == {}


def test_instances_are_pruned_before_their_networks(cli: Cli) -> None:
    apply(cli, network("back"), instance("a"), instance("b", options={"pid_of": "a"})).ok()
    gone = cli.run("apply", "-f", "-", "--prune", "--allow-empty", "--yes")
    assert gone.status == 0, gone
    assert list(results(gone)) == ["Instance b", "Instance a", "Network back"]


# -- dump --------------------------------------------------------------------------------------------------------------


def test_a_dump_applied_changes_nothing_and_makes_a_tenant_anew(tenants: TenantFactory) -> None:
    here, there = tenants(), tenants()
    cli = here
    cli.ok("network", "create", "back", "--subnet", "10.1.0.0/24", "--subnet6", "fd00:1::/64", "-l", "a=b")
    options = ("--network", "back", "-e", "COUNTRY=NO", "-l", "app=NO", "--memory", "64m", "--tmpfs", "/scratch")
    by_hand(cli, "web", *options, "--restart", "on-failure:3")
    by_hand(cli, "db")
    cli.ok("stop", "db")
    text = cli.ok("dump")
    assert text.isascii() and 'COUNTRY: "NO"' in text.replace("'", '"') and "pids" not in text
    same = apply(cli, text)
    assert set(results(same).values()) == {"unchanged"}, (same, text)
    made = apply(there, text)
    assert made.status == 0, made
    assert results(made) == {
        "Network back": "created",
        "Network default": "unchanged",
        "Instance db": "created",
        "Instance web": "created",
    }
    assert there.ok("dump") == text
    state = {view["instance"]["name"]: view["status"]["state"] for view in there.json("ps", "-a")}
    assert state == {"web": "running", "db": "created"}
    for each in (here, there):
        remove_instances(each)


def test_what_is_shown_can_not_control_a_terminal(cli: Cli) -> None:
    hostile = instance("web", on=None, env={"X": "\x1b]0;owned\x07\u009b2J\u202e"}, labels={"l": "ok"})
    result = apply(cli, hostile, verb="diff")
    assert result.status == 1
    assert all(c.isprintable() or c == "\n" for c in result.out) and "\\e]0;owned" in result.out
    apply(cli, hostile).ok()
    assert cli.ok("dump").replace("\n", "").isprintable()
    assert set(results(apply(cli, cli.ok("dump"))).values()) == {"unchanged"}


# -- who may -----------------------------------------------------------------------------------------------------------


def test_every_object_is_checked_as_by_its_verb(cli: Cli, people: People) -> None:
    acme = str(cli.tenant)
    viewer, member, admin = (people.person(role, acme) for role in ("viewer", "member", "admin"))
    plain, strong = instance("plain", on=None), instance("strong", on=None, options={"cap_add": ["SYS_TIME"]})
    refused = apply(viewer.cli, plain)
    assert refused.status == 1 and "set.write" in refused.err
    result = apply(member.cli, plain, strong)
    assert results(result) == {"Instance plain": "created", "Instance strong": "failed"}
    assert "it takes the permission instance.capabilities" in result.out
    made = apply(admin.cli, plain, strong)
    assert results(made) == {"Instance plain": "unchanged", "Instance strong": "created"}
    for changed in ({"env": {"A": "B"}}, {"restart": {"name": "always"}}):
        again = instance("strong", on=None, options={"cap_add": ["SYS_TIME"]}, **changed)
        denied = apply(member.cli, again, options=("--replace",))
        assert results(denied) == {"Instance strong": "failed"} and "instance.capabilities" in denied.out
    account = document("ServiceAccount", "ci", {})
    assert "service-account" in apply(member.cli, account).out
    by_token = apply(admin.cli, account)
    assert by_token.status == 1 and "a token can't" in by_token.out, "a token makes no rights"
    assert apply(cli, account).status == 0
    limited = people.with_token(member.name, acme, labels={"job": "7"})
    assert "set.write" in apply(limited.cli, instance("job", on=None, labels={"job": "7"})).err


def test_nobody_binds_what_they_do_not_hold(cli: Cli, people: People) -> None:
    """By the operator's socket it works; a token can't, whatever its owner holds."""
    ann = people.person("admin", str(cli.tenant))
    binding = document("Binding", ann.name, {"role": "viewer"})
    denied = apply(ann.cli, binding, options=("--force",))
    assert denied.status == 1 and "binding.write" in denied.out
    assert role(people, cli, ann.name) == "admin"
    assert results(apply(cli, binding, options=("--force",))) == {f"Binding {ann.name}": "changed"}
    assert role(people, cli, ann.name) == "viewer"


def role(people: People, cli: Cli, name: str) -> str:
    return next(
        str(each["role"]) for each in people.operator.identities.bindings(str(cli.tenant)) if each["user"] == name
    )


def test_another_tenant_s_object_is_refused_as_one_that_is_not_there(
    cli: Cli, tenants: TenantFactory, people: People
) -> None:
    other = tenants()
    apply(other, instance("web", on=None), options=("--set", "theirs")).ok()
    member = people.person("member", str(cli.tenant))
    for named in (str(other.tenant), "absent"):
        elsewhere = {**network("back"), "metadata": {"name": "back", "tenant": named}}
        inside = apply(member.cli, elsewhere)
        place = json.dumps(elsewhere).index(f'"{named}"') + 1
        expected = f"error: -:1:{place}: it is for tenant {named}, not {cli.tenant}; "
        assert inside.status == 1 and inside.err.startswith(expected), inside
        outside = apply(member.cli.of(named), network("back"))
        assert outside.status == 1
        assert outside.err == f"error: there is no tenant {named}; hint: `insula tenant ls` lists them\n"
        assert "host.apply" in apply(member.cli, elsewhere, options=("--host",)).err
    gone = member.cli.run("apply", "-f", "-", "--set", "theirs", "--prune", "--allow-empty", "--yes")
    assert gone.status == 0 and set(instances(other)) == {"web"}, "sets are each tenant's own"
    remove_instances(other)


def test_values_of_variables_are_not_told_to_who_can_not_run_processes(cli: Cli, people: People) -> None:
    """Nor can they be guessed: a guess differs neither if it is right nor if it is wrong."""
    apply(cli, instance("web", on=None, env={"PASSWORD": "secret"})).ok()
    viewer = people.person("viewer", str(cli.tenant))
    assert "secret" in cli.ok("dump")
    dump = viewer.cli.ok("dump")
    assert "secret" not in dump and "# values of environment variables are left out\n" in dump
    for guess in ("secret", "wrong"):
        result = apply(viewer.cli, instance("web", on=None, env={"PASSWORD": guess}), verb="diff")
        assert (result.status, result.out) == (0, ""), result
    seen = apply(viewer.cli, instance("web", on=None, env={"OTHER": "x"}, resources={"pids": 5}), verb="diff")
    assert seen.status == 1 and "secret" not in seen.out and "PASSWORD" in seen.out


# -- at the same time, and interrupted ---------------------------------------------------------------------------------


def test_two_of_the_same_set_at_once_lose_no_member(cli: Cli) -> None:
    """They run one after the other, so that the second one prunes what the first one has made, or the reverse."""
    for _ in range(3):
        files = {who: [instance(f"{who}{n}", on=None) for n in range(4)] for who in "xy"}
        started = [start(cli, *files[who], options=("--prune", "--yes")) for who in "xy"]
        assert [finish(each) for each in started] == [0, 0]
        left = set(instances(cli))
        assert left in ({f"x{n}" for n in range(4)}, {f"y{n}" for n in range(4)}), left
        cli.run("apply", "-f", "-", "--prune", "--allow-empty", "--yes").ok()
        assert instances(cli) == {}


def start(cli: Cli, *documents: dict[str, Any], options: tuple[str, ...] = ()) -> Any:
    process = subprocess.Popen(
        cli.command("--json", "apply", "-f", "-", *options),
        env=cli.environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin
    process.stdin.write("\n---\n".join(map(json.dumps, documents)).encode())
    process.stdin.close()
    process.stdin = None
    return process


def finish(process: Any) -> int:
    out, err = process.communicate(timeout=60)
    assert process.returncode is not None, (out, err)
    return int(process.returncode)


@pytest.mark.parametrize("how", ["client is killed", "role is taken"])
def test_an_apply_ends_after_the_object_that_it_is_at(how: str, cli: Cli, people: People) -> None:
    """While an instance is being stopped, which takes a moment; what follows is not made."""
    member = people.person("member", str(cli.tenant))
    slow = {**instance("a", on=None), "spec": {**instance("a", on=None)["spec"], "stop_timeout": 1.5}}
    apply(member.cli, slow).ok()
    stopped = {**slow, "spec": {**slow["spec"], "wanted": "stopped"}}
    process = start(member.cli, stopped, instance("b", on=None))
    until(lambda: shown(cli, "a")["status"]["state"] == "stopping", "it is being stopped")
    if how == "client is killed":
        process.kill()
    else:
        people.operator.identities.unbind(member.name, str(cli.tenant))
    out, err = process.communicate(timeout=60)
    assert out == b"" and process.returncode != 0
    assert how == "client is killed" or b"there is no tenant" in err, err
    until(lambda: shown(cli, "a")["status"]["state"] == "exited", "it is stopped")
    until(lambda: apply(cli, stopped, verb="diff").status == 0, "that is recorded")
    assert set(instances(cli)) == {"a"}
    done = apply(cli, stopped, instance("b", on=None))
    assert results(done) == {"Instance a": "unchanged", "Instance b": "created"}


def test_a_client_that_is_killed_after_any_object_loses_nothing(cli: Cli) -> None:
    world = [network("back"), *(instance(name) for name in "abc")]
    for count in range(1, len(world) + 1):
        process = start(cli, *world)
        for _ in range(count):
            process.stdout.readline()
        process.kill()
        process.communicate()
        done = apply(cli, *world)
        assert done.status == 0 and set(results(done).values()) <= {"unchanged", "created"}, done
        assert apply(cli, *world, verb="diff").status == 0
        until(lambda: set(instances(cli)) == {"a", "b", "c"}, "all are there")
        cli.run("apply", "-f", "-", "--prune", "--allow-empty", "--yes").ok()
        assert instances(cli) == {}
