"""What members and admins of one tenant try against another tenant, against each other, and against the host."""

from __future__ import annotations

import json
import re
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from typing import Any

import pytest

from insula.client import Client
from insula.model.errors import NotFound
from tests.support.daemon import Daemon
from tests.support.wait import until
from tests.system.tenancy.conftest import Houses, People, Person
from tests.system.tenancy.http import HttpAnswer, exchange

ADMIN = 61021
SEND = """
import json, socket, sys
sock = socket.socket(socket.AF_UNIX)
sock.settimeout(60)
sock.connect(sys.argv[1])
sock.sendall(bytes.fromhex(sys.argv[2]))
answer = b""
while piece := sock.recv(65536):
    answer += piece
print(answer.hex())
"""
SPEC = {"image": "busybox", "command": ["sleep", "600"], "networks": []}


@pytest.fixture(scope="module", autouse=True)
def reachable(daemon: Daemon) -> Iterator[None]:
    """The directories of the tests can be entered by all, as /run/insula can."""
    modes = {path: path.stat().st_mode & 0o7777 for path in (daemon.path, daemon.path.parent)}
    for path in modes:
        path.chmod(0o711)
    yield
    for path, mode in modes.items():
        path.chmod(mode)


@pytest.fixture(scope="module")
def admin(people: People, houses: Houses) -> Iterator[int]:
    """An admin of acme, known by its user ID: so it may make tokens."""
    people.operator.identities.create_user("mallory", ADMIN)
    people.operator.identities.bind("mallory", "admin", houses.acme.tenant)
    yield ADMIN
    people.operator.identities.remove_user("mallory")


def as_user(daemon: Daemon, uid: int, method: str, target: str, body: object = None) -> tuple[int, Any]:
    """Send a request as a user of the host; returns status and problem."""
    data = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {target} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(data)}\r\n"
    request = f"{head}content-type: application/json\r\n\r\n".encode() + data
    command = [sys.executable, "-I", "-c", SEND, str(daemon.run / "users.sock"), request.hex()]
    done = subprocess.run(command, user=uid, group=uid, extra_groups=[], capture_output=True, text=True, check=True)
    top, _, rest = bytes.fromhex(done.stdout).partition(b"\r\n\r\n")
    return int(top.split()[1]), json.loads(rest or b"null")


# -- who exists --------------------------------------------------------------------------------------------------------


def test_tokens_for_others_tell_nobody_who_exists(daemon: Daemon, people: People, houses: Houses, admin: int) -> None:
    """The permission is checked before the look-up: of a user, and of a service account of another tenant."""
    globex = str(houses.globex.tenant)
    somebody = people.person("viewer", globex).name
    people.operator.identities.create_service_account(globex, "robot")
    pairs = (somebody, "no-such-user"), (f"{globex}/robot", f"{globex}/nothing"), (f"{globex}/robot", "nowhere/robot")
    for there, absent in pairs:
        (status, problem), (other, without) = (
            as_user(daemon, admin, "POST", "/v1/tokens", {"user": user}) for user in (there, absent)
        )
        assert (status, problem["code"]) == (other, without["code"])
        names = re.compile(f"{there}|{absent}|{there.partition('/')[0]}|{absent.partition('/')[0]}")
        assert names.sub("X", problem["detail"]) == names.sub("X", without["detail"])
    people.operator.identities.remove_service_account(globex, "robot")


def test_roles_for_others_tell_nothing_of_another_tenant(
    daemon: Daemon, people: People, houses: Houses, admin: int
) -> None:
    acme, globex = str(houses.acme.tenant), str(houses.globex.tenant)
    people.operator.identities.create_service_account(globex, "robot")
    people.operator.identities.create_service_account(acme, "robot")
    own = as_user(daemon, admin, "PUT", f"/v1/tenants/{acme}/bindings", {"user": f"{acme}/robot", "role": "viewer"})
    assert own[0] == 200, "the control"
    answers = []
    for user in (f"{globex}/robot", f"{globex}/nothing", "nowhere/robot"):
        bound = as_user(daemon, admin, "PUT", f"/v1/tenants/{acme}/bindings", {"user": user, "role": "viewer"})
        unbound = as_user(daemon, admin, "DELETE", f"/v1/tenants/{acme}/bindings?user={user.replace('/', '%2F')}")
        answers.append([(status, problem["detail"].replace(user, "X")) for status, problem in (bound, unbound)])
    assert answers[0] == answers[1] == answers[2]
    somebody = people.person("viewer", globex).name
    for user in (somebody, "no-such-user"):
        status, problem = as_user(daemon, admin, "DELETE", f"/v1/tenants/{acme}/bindings?user={user}")
        assert (status, problem["detail"]) == (404, f"'{user}' has no role in tenant {acme}")
    for tenant in (acme, globex):
        people.operator.identities.remove_service_account(tenant, "robot")


# -- tokens for some instances -----------------------------------------------------------------------------------------


def ask(
    daemon: Daemon, person: Person, method: str, target: str, body: object = None, key: str | None = None
) -> HttpAnswer:
    fields = {"idempotency_key": key} if key else {}
    return exchange(daemon.run / "users.sock", method, target, body, token=person.secret, **fields)


def test_an_answer_that_is_made_anew_has_no_other_instance(daemon: Daemon, people: People, houses: Houses) -> None:
    """An answer that was too long to keep is made of the instance as it is: by the request's own name of it, and only
    if the token is for it."""
    where = f"/v1/tenants/{houses.acme.tenant}/instances"
    ann = people.person("member", houses.acme.tenant)
    job = people.with_token(ann.name, houses.acme.tenant, labels={"job": "9"})
    long = {f"V{number}": "x" * 1000 for number in range(20)}  # more than is kept
    mine = {**SPEC, "labels": {"job": "9"}, "env": long}
    for name, spec in (("hidden", {**SPEC, "env": {"KEY": "canary-1"}}), ("mine", mine)):
        assert ask(daemon, ann, "POST", f"{where}?start=false", {**spec, "name": name}).status == 201
    for key, method, target, body in (
        ("to-1", "PATCH", f"{where}/mine?to=hidden", {"pids": 100}),
        ("to-2", "POST", f"{where}/mine/stop?to=hidden", None),
    ):
        first, again = (ask(daemon, job, method, target, body, key) for _ in range(2))
        assert (first.status, again.status) == (200, 200)
        assert again.headers["idempotency-replayed"] == "true" and len(again.body) > 16 << 10, "it is made anew"
        assert again.json["instance"]["name"] == "mine"

    created = {**mine, "name": "swapped"}
    assert ask(daemon, job, "POST", f"{where}?start=false", created, "swap").status == 201
    assert ask(daemon, job, "DELETE", f"{where}/swapped").status == 204
    assert ask(daemon, ann, "POST", f"{where}?start=false", {**SPEC, "name": "swapped"}).status == 201
    again = ask(daemon, job, "POST", f"{where}?start=false", created, "swap")
    assert (again.status, again.json["code"]) == (404, "NotFound")

    renamed = [ask(daemon, ann, "POST", f"{where}/mine/rename?to=other", None, "name") for _ in range(2)]
    assert [each.json["instance"]["name"] for each in renamed] == ["other", "other"], "the control"
    for name in ("hidden", "other", "swapped"):
        ask(daemon, ann, "DELETE", f"{where}/{name}")


# -- what was before ---------------------------------------------------------------------------------------------------


def events(daemon: Daemon, person: Person, cursor: str, until_name: str) -> list[dict[str, Any]]:
    """The events after a cursor, up to the one of an object of this name."""
    head = f"GET /v1/events?cursor={cursor} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {person.secret}\r\n\r\n"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(60)
        sock.connect(str(daemon.run / "users.sock"))
        sock.sendall(head.encode())
        found = []
        for line in sock.makefile("rb"):
            with suppress(json.JSONDecodeError):
                if isinstance(event := json.loads(line), dict):
                    found.append(event)
                    if event.get("name") == until_name:
                        break
        return found


def test_events_of_an_earlier_tenant_of_the_name_are_nobodys(daemon: Daemon, people: People, houses: Houses) -> None:
    """A cursor goes back to before the tenant was removed and created again, for others."""
    ann = people.person("member", houses.acme.tenant)
    with_cursor = Watching(daemon, ann)
    exchange(daemon.run / "users.sock", "GET", "/v1/whoami", token=ann.secret)  # the stream has begun by then
    people.operator.networks.create(str(houses.acme.tenant), "marker", "10.9.0.0/24")
    cursor = with_cursor.cursor_of("marker")
    assert len(cursor) == 48, "however many changes the host has seen"
    operator = people.operator
    operator.tenants.create("reborn")
    operator.networks.create("reborn", "secret-plan", "10.0.0.0/24")
    operator.networks.remove("reborn", "secret-plan")
    operator.tenants.remove("reborn")
    operator.tenants.create("reborn")
    operator.identities.bind(ann.name, "viewer", "reborn")
    operator.networks.create("reborn", "public", "10.0.0.0/24")
    found = events(daemon, ann, cursor, "public")
    assert [(each["tenant"], each["action"], each["name"]) for each in found] == [
        ("reborn", "created", "reborn"),
        ("reborn", "created", "public"),
    ]
    operator.networks.remove(str(houses.acme.tenant), "marker")
    operator.networks.remove("reborn", "public")
    operator.tenants.remove("reborn")
    with pytest.raises(NotFound):
        operator.tenants.get("reborn")


class Watching:
    """The events of now, as a person sees them."""

    def __init__(self, daemon: Daemon, person: Person) -> None:
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.settimeout(60)
        self._sock.connect(str(daemon.run / "users.sock"))
        self._sock.sendall(
            f"GET /v1/events HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {person.secret}\r\n\r\n".encode()
        )
        until(lambda: self._sock.recv(1, socket.MSG_PEEK), "it answers")

    def cursor_of(self, name: str) -> str:
        """Wait for the event of an object, and return its cursor."""
        with self._sock:
            for line in self._sock.makefile("rb"):
                if f'"name":"{name}"'.encode() in line:
                    return str(json.loads(line)["cursor"])
        raise AssertionError("the events have ended")


# -- what it costs the host --------------------------------------------------------------------------------------------


def test_service_accounts_that_come_and_go_leave_no_keys(fresh: Daemon) -> None:
    """Each has 500 keys; an admin could make another account, and remove it, without end."""
    operator, where, accounts = Client(str(fresh.run / "insulad.sock")), fresh.run / "users.sock", {}
    for tenant in ("stays", "goes"):
        operator.tenants.create(tenant)
        for name in ("one", "two"):
            account = f"{tenant}/{name}"
            accounts[account] = operator.identities.create_service_account(tenant, name)["principal"]["id"]
            operator.identities.bind(account, "member", tenant)
            token = operator.identities.create_token(account)["token"]
            body, target = {"name": name, "subnet": "10.0.0.0/24"}, f"/v1/tenants/{tenant}/networks"
            assert exchange(where, "POST", target, body, token=token, idempotency_key="k").status == 201
            operator.networks.remove(tenant, name)
    operator.identities.remove_service_account("stays", "two")
    operator.tenants.remove("goes")
    fresh.stop()
    with closing(sqlite3.connect(fresh.root / "state.db")) as store:
        found = store.execute("SELECT key FROM entries WHERE key LIKE '/idempotency/%'").fetchall()
    assert [key.split("/")[2] for (key,) in found] == [accounts["stays/one"]]


def test_a_user_does_not_fill_the_memory_with_bodies(daemon: Daemon, people: People, houses: Houses) -> None:
    """Of bodies that are never whole; a neighbour's is taken meanwhile."""
    ann = people.person("member", houses.acme.tenant)
    path, megabytes = str(daemon.run / "users.sock"), 7
    piece = b" " * (megabytes << 20)
    head = (
        f"POST /v1/tenants/{houses.acme.tenant}/diff HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {ann.secret}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(piece) + 1}\r\n\r\n"
    ).encode()
    with ExitStack() as stack:
        socks = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(10)]
        for sock in socks:
            sock.settimeout(60)
            sock.connect(path)
            with suppress(OSError):  # it is refused, and closed, in the middle
                sock.sendall(head + piece)
        refused = [sock for sock in socks if readable(sock)]
        assert 1 <= len(refused) <= 2, "nine are more than 56 MiB"
        assert all(sock.recv(12) == b"HTTP/1.1 429" for sock in refused)
        bob = people.person("member", houses.globex.tenant)
        files = [{"name": "a", "format": "yaml", "text": "# " + "x" * 100_000}]
        body = {"set": "s", "files": files, "allow_empty": True}
        assert ask(daemon, bob, "POST", f"/v1/tenants/{houses.globex.tenant}/diff", body).status == 200
        assert ask(daemon, ann, "GET", "/v1/whoami").status == 200
    until(
        lambda: ask(daemon, ann, "POST", f"/v1/tenants/{houses.acme.tenant}/diff", body).status == 200, "it may again"
    )


def readable(sock: socket.socket) -> bool:
    """Whether an answer is there, or comes within a moment."""
    sock.settimeout(0.5)
    try:
        return bool(sock.recv(1, socket.MSG_PEEK))
    except TimeoutError:
        return False
