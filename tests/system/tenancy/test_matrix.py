"""Every route of the API, by every role, on a tenant of one's own, a foreign one and one that does not exist.

The routes are those of the application, also those that the framework has added; a new one is in the matrix without
being named here. Names in paths exist in no tenant and bodies are empty, so that what is allowed changes nothing.
"""

from __future__ import annotations

import json
import re
import socket
from typing import NamedTuple

import pytest
from litestar import Litestar

from insula.api.app import application
from insula.api.authorization import handlers, permission_of
from insula.model.permissions import NOT_BY_TOKEN, OF_EVERYBODY, PERMISSIONS, permissions_of
from tests.support.daemon import Daemon
from tests.support.wait import patiently
from tests.system.tenancy.conftest import Houses, People, Person
from tests.unit.stub_plane import StubPlane

ABSENT = "no-such-tenant"


class Route(NamedTuple):
    method: str
    path: str
    permission: str

    def at(self, tenant: str) -> str:
        """The path with names in it: of the tenant, and of nothing else that exists."""
        named = self.path.replace("{tenant:str}", tenant)
        return re.sub(r"\{(\w+):(\w+)\}", lambda match: "1" if match[2] == "int" else "absent", named)


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Litestar:
    return application(StubPlane(tmp_path_factory.mktemp("plane")), None)


@pytest.fixture(scope="module")
def routes(app: Litestar) -> list[Route]:
    return [Route(method, path, permission_of(handler, method)) for path, method, handler in handlers(app)]


class Answer(NamedTuple):
    status: int
    body: str


def send(daemon: Daemon, route: Route, tenant: str, token: str) -> Answer:
    """Send an empty request; returns the status, and the body of an error."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(patiently(60))
        sock.connect(str(daemon.run / "users.sock"))
        head = f"{route.method} {route.at(tenant)} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
        head += f"authorization: Bearer {token}\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{{}}"
        sock.sendall(head.encode())
        data = b""
        while b"\r\n\r\n" not in data and (piece := sock.recv(65536)):
            data += piece
        status = int(data.split(b" ", 2)[1])
        while status >= 400 and (piece := sock.recv(65536)):
            data += piece
    return Answer(status, data.partition(b"\r\n\r\n")[2].decode() if status >= 400 else "")


@pytest.fixture(scope="module")
def roles(people: People, houses: Houses) -> dict[str, Person]:
    acme = houses.acme.tenant
    return {role: people.person(role, acme) for role in ("viewer", "member", "admin")} | {
        "auditor": people.person("auditor"),
        "member for some": people.person("member", acme, labels={"job": "7"}),
    }


@pytest.mark.parametrize("role", ["viewer", "member", "admin", "member for some"])
def test_a_foreign_tenant_is_one_that_does_not_exist(
    role: str, routes: list[Route], daemon: Daemon, houses: Houses, roles: dict[str, Person]
) -> None:
    """The same status and the same words, but for the name."""
    foreign, seen = str(houses.globex.tenant), 0
    others = [Route("HEAD", route.path, "") for route in routes if route.method == "GET"]
    for route in (*routes, *others):
        if "{tenant:" not in route.path:
            continue
        theirs = send(daemon, route, foreign, roles[role].secret)
        nobodys = send(daemon, route, ABSENT, roles[role].secret)
        assert theirs.status == nobodys.status, route
        assert theirs.body.replace(foreign, ABSENT) == nobodys.body, route
        if route.method == "HEAD":
            assert theirs.status == 405, "there is none"
            continue
        assert theirs.status == 404, route
        assert json.loads(theirs.body)["message"] == f"there is no tenant {foreign}", route
        seen += 1
    assert seen > 80


@pytest.mark.parametrize("role", ["viewer", "member", "admin", "auditor", "member for some"])
def test_in_ones_own_tenant_the_table_says_what_may_be_done(
    role: str, routes: list[Route], daemon: Daemon, houses: Houses, roles: dict[str, Person]
) -> None:
    name, *labels = role.split(" ")
    held = (permissions_of(name) | OF_EVERYBODY) - NOT_BY_TOKEN  # type: ignore[arg-type]
    if labels:  # a token for instances with a label gives what it takes to use these
        others = {"self.read", "tenant.read", "network.read", "image.read"}
        held = frozenset(each for each in held if each.startswith("instance.") or each in others)
    own, allowed, refused = str(houses.acme.tenant), 0, 0
    for route in routes:
        permission = PERMISSIONS[route.permission]
        answer = send(daemon, route, own, roles[role].secret)
        assert answer.status < 500, (route, answer)
        if permission.name in held:
            assert answer.status != 401 and permission.name not in answer.body, (route, answer)
            assert "no tenant" not in answer.body, (route, answer)
            allowed += 1
        else:
            assert answer.status == 403 and permission.name in answer.body, (route, answer)
            refused += 1
    assert allowed > 10 and refused > 3


def test_a_token_that_is_not_valid_opens_nothing(
    routes: list[Route], daemon: Daemon, houses: Houses, people: People
) -> None:
    person = people.person("operator")
    people.operator.identities.revoke_token(person.secret.split("_")[1])
    wrong = person.secret[:-1] + ("0" if person.secret[-1] != "0" else "1")
    for token in (person.secret, wrong, "x"):
        for route in routes:
            answer = send(daemon, route, str(houses.acme.tenant), token)
            assert answer.status == 401 and json.loads(answer.body)["error"] == "Unauthenticated", (route, answer)


def test_a_stolen_token_of_an_operator_gives_no_rights_to_others(
    routes: list[Route], daemon: Daemon, houses: Houses, people: People
) -> None:
    """Neither tokens and certificates, nor users and roles, in any tenant; by the operator's socket they are given."""
    person, refused = people.person("operator"), 0
    for route in routes:
        if route.permission in NOT_BY_TOKEN:
            answer = send(daemon, route, str(houses.acme.tenant), person.secret)
            assert answer.status == 403 and route.permission in answer.body, (route, answer)
            assert "a token can't" in json.loads(answer.body)["hint"], route
            refused += 1
    assert refused > 10 and {route.permission for route in routes} >= NOT_BY_TOKEN
    assert people.person("viewer", str(houses.acme.tenant)), (
        "the control: by the socket users, roles and tokens are made"
    )
