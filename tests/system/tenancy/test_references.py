"""Names of another tenant's objects in paths, queries, bodies and files: the answer is that for what does not exist.

Where a request can name something is read from the description of the API: each text whose pattern is that of a name,
of an image, of a principal, a token or a certificate. So a new route or field is tried without being named here.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode

import pytest

from insula.client import Client
from insula.kernel import syscalls
from insula.model import rules
from insula.model.errors import InsulaError
from insula.model.rules import anchored
from insula.model.stream import Kind, encode
from tests.support.daemon import Daemon
from tests.system.tenancy.conftest import Houses, People
from tests.system.tenancy.http import HttpAnswer, exchange
from tests.system.tenancy.quota_kinds import rootfs

USERS = {"admin": 61021, "member": 61022}
OWN, THEIRS, ABSENT = "myself", "theirs", "absent"
NOWHERE = "no-such-tenant-"
TAR, FRAMES = "application/x-tar", "application/vnd.insula.frames"
BODIES = {  # in place of the description's example, which names what is not there
    "run": {
        "image": "busybox",
        "command": ["true"],
        "networks": [{"network": "default"}],
        "options": {"kind": "container"},
    },
    "create_router": {"name": "another", "networks": [OWN]},
    "update_router": {"join": [OWN]},
    "create_load_balancer": {"name": "another", "listen": [{"port": 80}], "on": [{"network": OWN}], "instances": [OWN]},
    "tag": {"source": OWN, "name": "another"},
    "pull": {"reference": "127.0.0.1:1/x", "insecure": True},
    "push": {"name": "busybox", "reference": "127.0.0.1:1/x", "insecure": True},
    "save": {"names": ["busybox"]},
    "bind": {"user": "nobody-at-all", "role": "viewer"},
}
LEFT_OUT = {"down"}
ELSEWHERE = {("pull", "reference"), ("push", "reference")}
"""Names at a registry."""


class Place(NamedTuple):
    """Where an operation takes a name: in the path, the query or the body, below these keys; `kind` is its pattern."""

    operation: str
    method: str
    path: str
    where: str
    keys: tuple[str, ...]
    kind: str


KINDS = {
    anchored(rules.LABEL): "name",
    anchored(f"({rules.LABEL})?"): "name",
    anchored(rules.REFERENCE): "name",
    anchored(rules.PRINCIPAL): "principal",
    anchored(rules.BOUND): "principal",
    anchored(rules.TOKEN_ID): "token",
    anchored(rules.SERIAL): "certificate",
}


class World(NamedTuple):
    daemon: Daemon
    document: dict[str, Any]
    operator: Client
    acme: str
    globex: str
    tokens: dict[str, str]

    def values(self, kind: str) -> list[tuple[str, str]]:
        """What is another's, and what does not exist, of the same length."""
        return {
            "name": [(THEIRS, ABSENT)],
            "principal": [
                (f"{self.globex}/{THEIRS}", f"{self.globex}/{ABSENT}"),
                (f"{self.globex}/{THEIRS}", f"{NOWHERE}{'x' * 99}"[: len(self.globex)] + f"/{THEIRS}"),
            ],
            "token": [(self.tokens[THEIRS], "0" * 16)],
            "certificate": [("1f2e3d", "000000")],
        }[kind]

    def own(self, kind: str) -> str:
        return {"name": OWN, "principal": f"{self.acme}/{OWN}", "token": self.tokens[OWN], "certificate": "1"}[kind]


@contextmanager
def as_user(uid: int) -> Iterator[None]:
    """Connections that this thread makes are of this user of the host."""
    syscalls.set_thread_users(-1, uid, -1)
    try:
        yield
    finally:
        syscalls.set_thread_users(-1, 0, -1)


@pytest.fixture(scope="module")
def world(daemon: Daemon, houses: Houses, people: People) -> Iterator[World]:
    """In each tenant there is one object of each kind; the admin and the member of acme are users of the host."""
    modes = {path: path.stat().st_mode & 0o7777 for path in (daemon.path, daemon.path.parent)}
    for path in modes:
        path.chmod(0o711)
    operator, tokens = people.operator, {}
    for cli, name in ((houses.acme, OWN), (houses.globex, THEIRS)):
        tenant = str(cli.tenant)
        operator.networks.create(tenant, name, "10.77.0.0/24")
        operator.routers.create(tenant, name)
        operator.images.import_(tenant, name, [rootfs(1)])
        operator.instances.run(tenant, "busybox", ["sleep", "600"], name=name)
        operator.identities.create_service_account(tenant, name)
        operator.identities.bind(f"{tenant}/{name}", "viewer", tenant)
        tokens[name] = operator.identities.create_token(f"{tenant}/{name}")["id"]
    for role, uid in USERS.items():
        operator.identities.create_user(f"{role}-by-uid", uid)
        operator.identities.bind(f"{role}-by-uid", role, str(houses.acme.tenant))
    document = exchange(daemon.run / "insulad.sock", "GET", "/openapi.json").json
    yield World(daemon, document, operator, str(houses.acme.tenant), str(houses.globex.tenant), tokens)
    for role in USERS:
        operator.identities.remove_user(f"{role}-by-uid")
    for path, mode in modes.items():
        path.chmod(mode)


# -- where names are ------------------------------------------------------------------------------------------------


def names_in(schema: dict[str, Any], document: dict[str, Any], keys: tuple[str, ...]) -> Iterator[tuple[Any, str]]:
    """Yield (keys, kind) for each name in the schema of a body; "*" stands for the items of a list."""
    if "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    if (kind := KINDS.get(schema.get("pattern", ""))) and keys:
        yield keys, kind
    for name, value in schema.get("properties", {}).items():
        yield from names_in(value, document, (*keys, name))
    if isinstance(schema.get("items"), dict):
        yield from names_in(schema["items"], document, (*keys, "*"))
    for part in ("anyOf", "oneOf", "allOf"):
        for value in schema.get(part, []):
            yield from names_in(value, document, keys)


def places(document: dict[str, Any]) -> Iterator[Place]:
    for path, item in document["paths"].items():
        for method, operation in item.items():
            name = operation["operationId"]
            if name in LEFT_OUT:
                continue
            here = (name, method.upper(), path)
            for parameter in operation.get("parameters", ()):
                found = {kind for _, kind in names_in({"properties": {"x": parameter["schema"]}}, document, ())}
                if found and parameter["name"] != "tenant":
                    yield Place(*here, parameter["in"], (parameter["name"],), found.pop())
            content = operation.get("requestBody", {}).get("content", {})
            if "application/json" in content:
                for keys, kind in set(names_in(content["application/json"]["schema"], document, ())):
                    if (name, keys[0]) not in ELSEWHERE:
                        yield Place(*here, "body", keys, kind)
            if name == "run_attached":  # its first frame is a spec
                for keys, kind in set(names_in({"$ref": "/InstanceSpec"}, document, ())):
                    yield Place(*here, "frame", keys, kind)


def put(body: Any, keys: tuple[str, ...], value: str) -> Any:
    """The body with `value` at these keys."""
    if not keys:
        return value
    if keys[0] == "*":
        return [put({}, keys[1:], value)]
    body = dict(body) if isinstance(body, dict) else {}
    return {**body, keys[0]: put(body.get(keys[0], {}), keys[1:], value)}


def send(world: World, place: Place, value: str, uid: int) -> HttpAnswer:
    """The operation with that value there, and what exists of one's own elsewhere."""
    operation = world.document["paths"][place.path][place.method.lower()]
    query: dict[str, str] = {}
    path = place.path.replace("{tenant}", world.acme)
    body: Any = None
    content = operation.get("requestBody", {}).get("content", {})
    for parameter in operation.get("parameters", ()):
        name, where = parameter["name"], parameter["in"]
        given = value if (where, (name,)) == (place.where, place.keys) else None
        if where == "path" and name != "tenant":
            path = path.replace(f"{{{name}}}", quote(given or OWN, safe=""))
        elif where == "query" and (given or parameter.get("required")):
            query[name] = given or {"path": "/etc/hosts", "to": OWN, "user": "nobody-at-all"}.get(name, "busybox")
    if "application/json" in content:
        body = copy.deepcopy(BODIES.get(place.operation, content["application/json"]["example"]))
    if place.where == "body":
        body = put(body, place.keys, value)
    if FRAMES in content:
        opened = put(BODIES["run"], place.keys, value) if place.where == "frame" else {"command": ["true"]}
        body = encode(Kind.OPEN, json.dumps(opened).encode())
    elif TAR in content:
        body = rootfs(1)
    target = path + (f"?{urlencode(query)}" if query else "")
    with as_user(uid):
        return exchange(world.daemon.run / "users.sock", place.method, target, body)


def told(answer: HttpAnswer, value: str, instead: str) -> tuple[int, dict[str, str], str]:
    """The whole of an error, and the status of what is done, with `instead` in place of a value."""
    if answer.status < 400:
        return answer.status, {}, ""
    own = {name: text for name, text in answer.headers.items() if name not in ("date", "x-request-id")}
    text = answer.body.decode().replace(value, instead)
    return answer.status, own, text.replace(value.partition("/")[0], instead.partition("/")[0])


def tidy(world: World) -> None:
    """Remove what was made under these names, so that they stay another's and nobody's."""
    for name in (THEIRS, ABSENT, "another"):
        with suppress(InsulaError):
            world.operator.instances.rename(world.acme, name, OWN)  # if that is its name before
        with suppress(InsulaError):
            world.operator.instances.remove(world.acme, name, force=True)
        for remove in (world.operator.routers.remove, world.operator.networks.remove, world.operator.images.remove):
            with suppress(InsulaError):
                remove(world.acme, name)
        with suppress(InsulaError):
            world.operator.load_balancers.remove(world.acme, name)
        with suppress(InsulaError):
            world.operator.identities.remove_service_account(world.acme, name)


# -- the tests ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", USERS)
def test_what_is_another_s_is_answered_as_what_does_not_exist(role: str, world: World) -> None:
    tried = 0
    for place in places(world.document):
        for theirs, absent in world.values(place.kind):
            answers = []
            for value in (theirs, absent):
                answers.append(answer := send(world, place, value, USERS[role]))
                if answer.status < 400:
                    tidy(world)
                assert answer.status < 500 or (answer.status == 503 and b"HTTPS" in answer.body), (place, answer)
            assert told(answers[0], theirs, absent) == told(answers[1], absent, absent), place
            tried += 1
    assert tried > 50
    there = world.operator
    assert there.instances.get(world.globex, THEIRS) and there.networks.get(world.globex, THEIRS)
    assert there.images.get(world.globex, THEIRS) and there.identities.service_accounts(world.globex)


CONTROL = {
    ("bind", "user"), ("create_token", "user"), ("push", "name"), ("run", "image"), ("run", "network"),
    ("run", "pid_of"), ("run_attached", "network"), ("save", "names"), ("tag", "source"), ("unbind", "user"),
    ("get_image", "name"), ("get_instance", "name"), ("get_network", "network"), ("get_router", "router"),
    ("tenant_stats", "name"), ("explain", "name"), ("logs", "name"), ("top", "name"),
}  # fmt: skip


def test_what_is_one_s_own_is_answered_otherwise(world: World) -> None:
    """A positive control: these places are really looked at."""
    found = set()
    for place in places(world.document):
        name = next(key for key in reversed(place.keys) if key != "*")
        if (place.operation, name) in CONTROL:
            _, absent = world.values(place.kind)[0]
            own = send(world, place, world.own(place.kind), USERS["admin"])
            other = send(world, place, absent, USERS["admin"])
            if (own.status, b"there is no" in own.body) != (other.status, b"there is no" in other.body):
                found.add((place.operation, name))
            tidy(world)
    assert found == CONTROL


DOCUMENTS = {
    "network": {"kind": "Instance", "spec": {"image": "busybox", "networks": [{"network": "NAME"}]}},
    "image": {"kind": "Instance", "spec": {"image": "NAME", "networks": []}},
    "pid_of": {"kind": "Instance", "spec": {"image": "busybox", "options": {"kind": "container", "pid_of": "NAME"}}},
    "account": {"kind": "Binding", "spec": {"role": "viewer", "subject": "service-account"}},
}


@pytest.mark.parametrize("what", DOCUMENTS)
@pytest.mark.parametrize("verb", ["apply", "diff"])
def test_names_in_files(verb: str, what: str, world: World) -> None:
    answers = {}
    for name in (THEIRS, ABSENT, OWN):
        document = {"apiVersion": "insula/v1", "metadata": {"name": name if what == "account" else "made"}}
        text = json.dumps({**document, **DOCUMENTS[what]}).replace("NAME", name)
        body = {"files": [{"text": text}], "set": f"set-{name}"}
        with as_user(USERS["admin"]):
            answer = exchange(world.daemon.run / "users.sock", "POST", f"/v1/tenants/{world.acme}/{verb}", body)
        answers[name] = (answer.status, answer.body.decode().replace(name, ABSENT))
        with suppress(InsulaError):
            world.operator.instances.remove(world.acme, "made", force=True)
    assert answers[THEIRS] == answers[ABSENT]
    if verb == "apply":
        assert answers[OWN] != answers[ABSENT], "the control"


def test_nobody_learns_by_a_token_who_is_a_user(world: World, people: People) -> None:
    """Tokens for others are an operator's; others are refused whoever exists."""
    there = people.person("viewer", world.globex).name
    answers = set()
    for uid in USERS.values():
        for user in (there, "x" * len(there)):
            for path in ("/v1/tokens", "/v1/invitations", "/v1/certificates"):
                with as_user(uid):
                    answer = exchange(world.daemon.run / "users.sock", "POST", path, {"user": user})
                assert answer.status in (403, 503)
                answers.add((uid, path, answer.body.replace(user.encode(), b"")))
    assert len(answers) == 2 * 3
