"""Members of two tenants at work, by the command line and its client, each seeing its own tenant only."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from insula.model.errors import Conflict, Denied, Invalid, NotFound
from tests.support.daemon import Daemon
from tests.support.wait import until
from tests.system.tenancy.conftest import Houses, People, Person


@pytest.fixture(scope="module")
def ann(people: People, houses: Houses) -> Person:
    return people.person("member", houses.acme.tenant)


@pytest.fixture(scope="module")
def bob(people: People, houses: Houses) -> Person:
    return people.person("member", houses.globex.tenant)


def test_a_member_works_as_in_the_guide(ann: Person, bob: Person) -> None:
    """run, ps, exec, logs, cp, stats, top, explain, inspect, stop, rm: of one's own, and never of the other."""
    for person in (ann, bob):
        person.cli.ok("run", "-d", "--name", "mine", "busybox", "sh", "-c", "echo hello; exec sleep 600")
        assert person.cli.ok("exec", "mine", "echo", "hi") == "hi"
        until(lambda person=person: person.cli.ok("logs", "mine") == "hello", "its log has it")  # type: ignore[misc]
        assert "mine" in person.cli.ok("ps") and "web" in person.cli.ok("ps")
        assert "sleep 600" in person.cli.ok("top", "mine")
        assert "its own" in person.cli.ok("explain", "mine")
        assert "mine" in person.cli.ok("stats", "--no-stream", "mine")
        assert person.cli.ok("network", "ls").splitlines()[1].split()[0] == "default"
        assert person.cli.ok("run", "--rm", "busybox", "echo", "there") == "there"
    ann.cli.ok("rm", "-f", "mine")
    assert "mine" not in ann.cli.ok("ps", "-a")
    assert "mine" in bob.cli.ok("ps"), "that of the other tenant runs"
    bob.cli.ok("rm", "-f", "mine")


def test_listings_have_ones_own_tenant_only(ann: Person, bob: Person, houses: Houses) -> None:
    for person, own in ((ann, houses.acme.tenant), (bob, houses.globex.tenant)):
        assert [view["tenant"]["name"] for view in person.client.tenants.list()] == [own]
        assert {view["instance"]["tenant"] for view in person.client.instances.list()} == {own}
        samples = next(iter(person.client.instances.stats()))
        assert {each["tenant"] for each in samples["instances"]} == {own}


def test_nothing_of_the_host_is_shown(daemon: Daemon, people: People, ann: Person, houses: Houses) -> None:
    """No PID of the host, index, VNI, ID base or path: neither by value nor by key."""
    tenant = str(houses.acme.tenant)
    whole = people.operator.instances.get(tenant, "web")
    answers = [ann.client.instances.get(tenant, "web"), ann.client.instances.explain(tenant, "web")]
    shown = json.dumps(answers)
    assert not {whole["status"]["pid"], whole["instance"]["host"]} & set(values(answers))
    assert str(daemon.path) not in shown and daemon.prefix not in shown
    keys = {"pid", "index", "vni", "id_base", "host", "start_time", "uid_map", "cgroups", "upper", "inode", "rules"}
    seen = json.dumps([json.loads(shown), ann.client.tenants.get(tenant), ann.client.networks.list(tenant)])
    assert not keys & {key for key in keys if f'"{key}":' in seen}
    assert '"pid":' in json.dumps(whole), "the operator sees them"


def values(answer: Any) -> Iterator[object]:
    """Every value in an answer."""
    if isinstance(answer, dict | list):
        for each in answer.values() if isinstance(answer, dict) else answer:
            yield from values(each)
    else:
        yield answer


def test_events_are_ones_own(ann: Person, bob: Person, houses: Houses) -> None:
    seen: list[dict[str, object]] = []

    def follow() -> None:
        for event in ann.client.host.events():
            seen.append(event)
            if event["name"] == "last":
                return

    thread = threading.Thread(target=follow)
    thread.start()

    def begun() -> bool:
        ann.cli.ok("run", "--rm", "--name", "first", "busybox", "true")
        return bool(seen)

    until(begun, "events arrive")
    bob.cli.ok("run", "--rm", "--name", "theirs", "busybox", "true")
    ann.cli.ok("run", "--rm", "--name", "last", "busybox", "true")
    thread.join(60)
    assert not thread.is_alive()
    assert {event["tenant"] for event in seen} == {houses.acme.tenant}
    assert not {"revision", "pid"} & {key for event in seen for key in event}


def test_a_viewer_sees_and_changes_nothing(people: People, houses: Houses) -> None:
    eve = people.person("viewer", houses.acme.tenant)
    assert "web" in eve.cli.ok("ps")
    for words in (
        ("run", "-d", "busybox", "true"),
        ("stop", "web"),
        ("rm", "-f", "web"),
        ("exec", "web", "true"),
        ("logs", "web"),
        ("cp", "web:/etc/hosts", "-"),
        ("network", "create", "other", "--subnet", "10.9.0.0/24"),
        ("tenant", "update", str(houses.acme.tenant), "--cpus", "4"),
        ("user", "bind", eve.name, "admin"),
        ("user", "ls"),
        ("status",),
        ("doctor",),
        ("down",),
    ):
        status = 125 if words[0] in ("run", "exec") else 1
        error = eve.cli.fails(*words, status=status)
        assert "may not do this" in str(error), words
    assert "web" in houses.acme.ok("ps")


def test_a_member_does_not_build_in_the_network_of_the_host(people: People, ann: Person, houses: Houses) -> None:
    """debootstrap runs in it. Pull and push, in the network of the tenant, are in test_registry."""
    for person in (ann, people.person("admin", houses.acme.tenant)):
        assert "image.registry" in str(person.cli.fails("image", "build-base", "debian"))
    assert "image.registry" not in str(houses.acme.fails("image", "build-base", "debian", "--release", "no such"))


def test_a_viewer_neither_pulls_nor_pushes(people: People, houses: Houses) -> None:
    viewer = people.person("viewer", houses.acme.tenant)
    for verb, *words in (("pull", "127.0.0.1:1/x"), ("push", "busybox", "127.0.0.1:1/x")):
        assert f"image.{verb}" in str(viewer.cli.fails("image", verb, *words))


DANGEROUS = (["--cap-add", "NET_ADMIN"], ["--nesting"], ["--sysctl", "net.ipv4.ip_forward=1"], ["--aio"])


@pytest.mark.parametrize("option", [*DANGEROUS, ["--socket-family", "packet"]], ids=" ".join)
def test_options_that_make_stronger_are_permissions_of_their_own(
    option: list[str], people: People, ann: Person, houses: Houses
) -> None:
    """A member can't use them, nor start what an admin has created with them; an admin can."""
    admin = people.person("admin", houses.acme.tenant)
    error = ann.cli.fails("run", "-d", "--name", "strong", *option, "busybox", "sleep", "600", status=125)
    assert "permission instance." in str(error)
    with pytest.raises(NotFound):
        ann.client.instances.get(str(houses.acme.tenant), "strong")
    admin.cli.ok("run", "-d", "--name", "strong", *option, "busybox", "sleep", "600")
    ann.cli.ok("stop", "strong")
    ann.cli.fails("start", "strong")
    ann.cli.fails("restart", "strong")
    admin.cli.ok("start", "strong")
    admin.cli.ok("rm", "-f", "strong")


def test_a_tenants_admin_binds_others_to_what_it_holds(people: People, houses: Houses) -> None:
    tenant = str(houses.acme.tenant)
    admin = people.person("admin", tenant)
    people.operator.identities.create_user("carl")
    people._made.append("carl")
    by_uid = people.with_token("carl")
    with pytest.raises(Denied, match=r"binding\.write"):
        admin.client.identities.bind("carl", "member", tenant)  # by a token nobody gives rights to others
    people.operator.identities.bind("carl", "member", tenant)
    assert by_uid.client.identities.whoami()["tenants"] == {tenant: "member"}
    for role in ("operator", "auditor"):
        with pytest.raises((Denied, Invalid)):
            admin.client.identities.bind("carl", role, None)
    people.operator.identities.unbind("carl", tenant)
    with pytest.raises(NotFound, match="there is no tenant"):
        by_uid.client.instances.list(tenant)


def test_service_accounts_of_two_tenants_may_have_one_name(people: People, houses: Houses) -> None:
    operator, secrets = people.operator.identities, {}
    for cli in houses:
        tenant = str(cli.tenant)
        operator.create_service_account(tenant, "ci")
        operator.bind(f"{tenant}/ci", "member", tenant)
        secrets[tenant] = operator.create_token(f"{tenant}/ci")["token"]
    acme, globex = secrets
    with pytest.raises(Invalid, match="another tenant"):
        operator.bind(f"{acme}/ci", "member", globex)
    with pytest.raises(Conflict, match="service account"):
        operator.create_service_account(acme, "ci")
    client = people.client(secrets[acme])
    assert client.identities.whoami()["tenants"] == {acme: "member"}
    assert [view["instance"]["name"] for view in client.instances.list(acme)] == ["web"]
    with pytest.raises(NotFound):
        client.instances.list(globex)
    for tenant in secrets:
        operator.remove_service_account(tenant, "ci")


def test_a_token_for_instances_with_a_label(people: People, houses: Houses) -> None:
    """It runs, sees and changes those, and no others."""
    tenant = str(houses.acme.tenant)
    job = people.person("member", tenant, labels={"job": "7"})
    assert "job=7" in job.cli.ok("whoami")
    assert [line for line in job.cli.ok("ps", "-a").splitlines() if "web" in line] == []
    job.cli.fails("run", "-d", "--name", "other", "busybox", "sleep", "600", status=125)
    job.cli.fails(
        "run", "-d", "--name", "spy", "--label", "job=7", "--pid", "container:web", "busybox", "true", status=125
    )
    job.cli.ok("run", "-d", "--name", "worker", "--label", "job=7", "busybox", "sleep", "600")
    assert job.cli.ok("exec", "worker", "echo", "hi") == "hi"
    for words in (("exec", "web", "true"), ("stop", "web"), ("top", "web"), ("logs", "web"), ("rm", "-f", "web")):
        error = job.cli.fails(*words, status=125 if words[0] == "exec" else 1)
        assert "has no instance web" in str(error)
    for measured in (job.client.instances.stats(), job.client.instances.stats(tenant)):
        assert [each["name"] for each in next(iter(measured))["instances"]] == ["worker"]
    with pytest.raises(NotFound, match="has no instance web"):
        next(iter(job.client.instances.stats(tenant, ["web"])))
    all_of = people.client(people.operator.identities.create_token(job.name)["token"])
    assert {"web", "worker"} <= {each["name"] for each in next(iter(all_of.instances.stats(tenant)))["instances"]}
    job.cli.ok("rm", "-f", "worker")
    assert "web" in houses.acme.ok("ps")


def test_nobody_inherits_from_what_is_gone(people: People, daemon: Daemon) -> None:
    daemon.cli.ok("tenant", "create", "short-lived")
    dan = people.person("admin", "short-lived")
    assert dan.client.tenants.get("short-lived")["tenant"]["name"] == "short-lived"
    daemon.cli.ok("tenant", "rm", "short-lived")
    daemon.cli.ok("tenant", "create", "short-lived")
    with pytest.raises(NotFound):
        dan.client.tenants.get("short-lived")
    people.operator.identities.bind(dan.name, "viewer", "short-lived")
    assert dan.client.tenants.get("short-lived")
    people.operator.identities.remove_user(dan.name)
    people.operator.identities.create_user(dan.name)
    again = people.with_token(dan.name)
    assert again.client.identities.whoami()["tenants"] == {}
    daemon.cli.ok("tenant", "rm", "short-lived")


@pytest.fixture
def nobody_writes_tokens(daemon: Daemon) -> Iterator[None]:
    """No secret is anywhere below the daemon's directories, or in its log."""
    yield
    text = daemon.log.read_text(errors="replace") + daemon.audit.read_text(errors="replace")
    assert "insula_" not in text.replace("insula_test", "")


def test_secrets_are_stored_and_logged_nowhere(
    people: People, houses: Houses, daemon: Daemon, nobody_writes_tokens: None
) -> None:
    person = people.person("member", houses.acme.tenant)
    person.cli.ok("ps")
    secret = re.fullmatch(r"insula_[0-9a-f]{16}_(.{43})_[0-9a-f]{8}", person.secret)[1]  # type: ignore[index]
    found = [
        path
        for path in daemon.path.rglob("*")
        if path.is_file() and path != person.token and secret.encode() in path.read_bytes()
    ]
    assert found == []
    assert any(person.secret.split("_")[1].encode() in path.read_bytes() for path in daemon.root.glob("state.db*"))


def test_a_token_file_that_others_can_read_is_refused(people: People, houses: Houses) -> None:
    person = people.person("member", houses.acme.tenant)
    person.token.chmod(0o644)
    assert "can be read by other users" in str(person.cli.fails("ps"))
    person.token.chmod(0o600)
    person.cli.ok("ps")


def test_several_are_removed_and_revoked_at_once(daemon: Daemon) -> None:
    """The verbs go on after one that does not exist."""
    cli = daemon.cli
    for name in ("one", "two"):
        cli.ok("user", "create", name)
    tokens = [json.loads(cli.ok("--json", "token", "create", "--user", name))["id"] for name in ("one", "two")]
    revoked = cli.run("token", "revoke", tokens[0], "0" * 16, tokens[1])
    assert (revoked.status, revoked.out.split()) == (1, tokens)
    removed = cli.run("user", "rm", "one", "nobody-here", "two")
    assert (removed.status, removed.out.split()) == (1, ["one", "two"])
    assert "nobody-here" in removed.err
