"""A right that is taken ends what runs by it, at once: streams, an exec with its process. What is detached stays."""

from __future__ import annotations

import json
import select
import socket
import time
from collections.abc import Callable
from contextlib import suppress

import pytest

from insula.model.errors import Denied, NotFound, Unauthenticated
from tests.support.daemon import Daemon
from tests.support.wait import patiently, until
from tests.system.tenancy.conftest import Houses, People, Person

LOOP = "while :; do echo tick; sleep 0.2; done"


def revoke(people: People, person: Person, _: str) -> None:
    people.operator.identities.revoke_token(person.secret.split("_")[1])


def unbind(people: People, person: Person, tenant: str) -> None:
    people.operator.identities.unbind(person.name, tenant)


def lower(people: People, person: Person, tenant: str) -> None:
    people.operator.identities.bind(person.name, "viewer", tenant)


def remove(people: People, person: Person, _: str) -> None:
    people.operator.identities.remove_user(person.name)


WAYS = {"token revoked": revoke, "unbound": unbind, "a lower role": lower, "user removed": remove}


@pytest.fixture(scope="module")
def ticking(houses: Houses) -> str:
    houses.acme.ok("run", "-d", "--name", "ticking", "busybox", "sh", "-c", LOOP)
    return "ticking"


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("stream", ["logs -f", "attach", "exec"])
def test_a_stream_ends_and_says_why(
    stream: str, way: Callable[[People, Person, str], None], people: People, houses: Houses, ticking: str
) -> None:
    tenant = str(houses.acme.tenant)
    person, other = people.person("member", tenant), people.person("member", tenant)
    follow = {
        "logs -f": ("logs", "-f", ticking),
        "attach": ("attach", ticking),
        "exec": ("exec", ticking, "sh", "-c", LOOP, person.name),
    }[stream]
    control_follows = [other.name if word == person.name else word for word in follow]
    with person.cli.start(*follow) as process, other.cli.start(*control_follows) as control:
        for each in (process, control):
            assert each.stdout and each.stdout.readline() == "tick\n"
        way(people, person, tenant)
        _, error = process.communicate(timeout=120)
        assert process.returncode != 0
        assert "not valid any more" in error or "permission" in error or "no tenant" in error, error
        assert control.stdout and control.stdout.readline() == "tick\n", "that of another member goes on"
        assert control.poll() is None
        control.kill()  # other signals are passed on to the process
        control.communicate(timeout=120)
    if stream == "exec":
        until(lambda: person.name not in houses.acme.ok("top", ticking), "the process of the exec was killed")
        assert other.name in houses.acme.ok("top", ticking), "that of the other member runs"
    assert "running" in houses.acme.ok("ps"), "the instance runs on"


def test_a_request_after_that_is_refused(people: People, houses: Houses) -> None:
    """When the verb that takes the right returns, it is taken."""
    tenant = str(houses.acme.tenant)
    expected = {revoke: Unauthenticated, unbind: NotFound, lower: Denied, remove: Unauthenticated}
    for way, error in expected.items():
        person = people.person("member", tenant)
        person.client.instances.exec_detached(tenant, "web", ["sleep", "1"])
        way(people, person, tenant)
        with pytest.raises(error):
            person.client.instances.exec_detached(tenant, "web", ["sleep", "1"])


def test_a_token_ends_at_its_time(people: People, houses: Houses, ticking: str) -> None:
    """Also what runs by it then."""
    person = people.person("member", houses.acme.tenant, ttl=patiently(5))
    with person.cli.start("logs", "-f", ticking) as process:
        assert process.stdout and process.stdout.readline() == "tick\n"
        process.communicate(timeout=120)
        assert process.returncode != 0
    with pytest.raises(Unauthenticated):
        person.client.identities.whoami()


def test_what_was_started_detached_stays(people: People, houses: Houses) -> None:
    person = people.person("member", houses.acme.tenant)
    person.cli.ok("run", "-d", "--name", "kept", "busybox", "sleep", "600")
    revoke(people, person, "")
    assert "kept" in houses.acme.ok("ps")
    houses.acme.ok("rm", "-f", "kept")


def test_rights_survive_a_kill(fresh: Daemon, tmp_path_factory: pytest.TempPathFactory) -> None:
    people = People(fresh, tmp_path_factory.mktemp("tokens"))
    person, gone = people.person("member", "default"), people.person("member", "default")
    revoke(people, gone, "")
    fresh.kill("insulad")
    fresh.reap()
    fresh.start()
    assert person.cli.ok("whoami").endswith("member of tenant default\n" + person.cli.ok("whoami").splitlines()[-1])
    assert "not valid" in str(gone.cli.fails("whoami"))
    assert person.client.identities.tokens()[0]["expires"] > time.time()


@pytest.mark.parametrize("way", [unbind, remove], ids=["unbound", "user removed"])
def test_events_end_with_the_role(
    way: Callable[[People, Person, str], None], people: People, houses: Houses, ticking: str
) -> None:
    """They are about oneself, so that they take no permission of the tenant; yet they show its changes."""
    tenant = str(houses.acme.tenant)
    person, other = people.person("viewer", tenant), people.person("viewer", tenant)
    with person.cli.start("events") as process, other.cli.start("events") as control:
        assert process.stdout and control.stdout
        for number in range(100):
            houses.acme.ok("update", "--pids", str(100 + number), ticking)
            if all(select.select([each.stdout.fileno()], [], [], 0.1)[0] for each in (process, control) if each.stdout):
                break
        way(people, person, tenant)
        process.communicate(timeout=patiently(60))
        assert process.returncode != 0
        assert control.poll() is None, "the positive control goes on"
        control.kill()


@pytest.mark.parametrize("accept", ["application/x-ndjson", "text/event-stream"])
def test_events_say_why_they_end(accept: str, daemon: Daemon, people: People, houses: Houses, ticking: str) -> None:
    """The last line, or the last event, is the problem."""
    person = people.person("viewer", str(houses.acme.tenant))
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(patiently(60))
        sock.connect(str(daemon.run / "users.sock"))
        head = (
            f"GET /v1/events HTTP/1.1\r\nhost: x\r\naccept: {accept}\r\nauthorization: Bearer {person.secret}\r\n\r\n"
        )
        sock.sendall(head.encode())
        data, number = b"", 100
        while b'"kind"' not in data:  # an event before the end, so that the answer has begun
            houses.acme.ok("update", "--pids", str(number := number + 1), ticking)
            if select.select([sock], [], [], 0.1)[0]:
                data += sock.recv(65536)
        people.operator.identities.remove_user(person.name)
        while b"Unauthenticated" not in data and (piece := sock.recv(65536)):
            data += piece
    last = [line for line in data.splitlines() if b"{" in line][-1].decode()
    assert ("event: error" in data.decode()) == last.startswith("data: ") == (accept == "text/event-stream")
    problem = json.loads(last.removeprefix("data: "))
    assert (problem["status"], problem["code"]) == (401, "Unauthenticated")


def an_upload(target: str) -> bytes:
    """The beginning of a request whose body never ends."""
    return (
        f"{target} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
        "content-type: application/x-tar\r\ntransfer-encoding: chunked\r\n"
        "authorization: Bearer TOKEN\r\n\r\n200\r\n" + "\0" * 512 + "\r\n"
    ).encode()


def a_read(target: str) -> bytes:
    return f"GET {target} HTTP/1.1\r\nhost: x\r\nconnection: close\r\nauthorization: Bearer TOKEN\r\n\r\n".encode()


OPEN = {
    "statistics": a_read("/v1/tenants/TENANT/stats?interval=0.2"),
    "all statistics": a_read("/v1/stats?interval=0.2"),
    "statistics of one": a_read("/v1/tenants/TENANT/instances/ticking/stats?interval=0.2"),
    "logs as events": a_read("/v1/tenants/TENANT/instances/ticking/logs?follow=true").replace(
        b"host: x", b"host: x\r\naccept: text/event-stream"
    ),
    "import": an_upload("POST /v1/tenants/TENANT/images/import?name=x"),
    "load": an_upload("POST /v1/tenants/TENANT/images/load"),
    "cp": an_upload("PUT /v1/tenants/TENANT/instances/ticking/archive?path=/tmp"),
    "wait": a_read("/v1/tenants/TENANT/instances/ticking/wait").replace(b"GET", b"POST"),
}
"""Requests that last, beside those of the command line above."""


@pytest.mark.parametrize("name", OPEN)
def test_what_else_is_open_ends_too(name: str, people: People, houses: Houses, ticking: str, daemon: Daemon) -> None:
    tenant = str(houses.acme.tenant)
    person, other = people.person("member", tenant), people.person("member", tenant)
    asked = OPEN[name].replace(b"TENANT", tenant.encode())
    before = len(people.operator.images.list(tenant))
    with socket.socket(socket.AF_UNIX) as sock, socket.socket(socket.AF_UNIX) as control:
        for each, who in ((sock, person), (control, other)):
            each.settimeout(patiently(60))
            each.connect(str(daemon.run / "users.sock"))
            each.sendall(asked.replace(b"TOKEN", who.secret.encode()))
        if b"interval" in asked or b"follow" in asked:
            assert sock.recv(15) == control.recv(15) == b"HTTP/1.1 200 OK"
        else:
            until(lambda: holds(people, tenant, name), "both are at work")
        unbind(people, person, tenant)
        data = b""
        while piece := sock.recv(65536):
            data += piece
        assert b"NotFound" in data or b"Denied" in data, data[-500:]
        control.settimeout(0.5)
        with suppress(TimeoutError):
            assert control.recv(1) != b"", "that of another member goes on"
    assert len(people.operator.images.list(tenant)) == before


def holds(people: People, tenant: str, name: str) -> bool:
    """Whether both requests have been let in: they count in the tenant's quotas."""
    usage = people.operator.tenants.get(tenant)["usage"]
    return bool(usage["streams"] >= 2 if name == "wait" else usage["upload_bytes"] >= 2 * 512)


def test_a_removed_tenant_ends_what_its_members_see(daemon: Daemon, people: People) -> None:
    daemon.cli.ok("tenant", "create", "leaving")
    cli = daemon.cli.of("leaving")
    cli.ok("network", "create", "default", "--subnet", "10.0.0.0/24")
    cli.ok("run", "-d", "--name", "ticking", "busybox", "sh", "-c", LOOP)
    person = people.person("member", "leaving")
    with (
        person.cli.start("logs", "-f", "ticking") as logs,
        person.cli.start("exec", "ticking", "sh", "-c", LOOP) as run,
    ):
        for each in (logs, run):
            assert each.stdout and each.stdout.readline() == "tick\n"
        daemon.cli.ok("tenant", "rm", "-f", "leaving")
        for each in (logs, run):
            each.communicate(timeout=patiently(60))
    with pytest.raises(NotFound):
        person.client.instances.list("leaving")
