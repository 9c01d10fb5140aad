"""Every path that stores or starts a spec checks its options: whatever they are, by whatever path, for each role."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from insula.api.app import application
from insula.api.authorization import handlers, permission_of
from insula.client import Client
from insula.model.errors import Denied
from insula.model.permissions import PERMISSIONS, permissions_of
from tests.system.tenancy.conftest import Houses, People, Person
from tests.unit.stub_plane import StubPlane

SOURCE = Path(__file__).parents[3] / "src" / "insula"
NAME = "tried"
Spec = dict[str, Any]
OF_OPTIONS: dict[str, Spec] = {
    "instance.capabilities": {"cap_add": ["SYS_TIME"]},
    "instance.nesting": {"nesting": True},
    "instance.sysctls": {"sysctls": {"net.ipv4.ip_forward": "1"}},
    "instance.sockets": {"socket_families": ["packet"], "aio": True},
}
"""Options that take a permission."""


class World(NamedTuple):
    tenant: str
    operator: Client
    members: dict[str, Person]


@pytest.fixture(scope="module")
def world(people: People, houses: Houses) -> World:
    tenant = str(houses.acme.tenant)
    return World(tenant, people.operator, {role: people.person(role, tenant) for role in ("member", "admin")})


def declared(client: Client, world: World, spec: Spec, labels: dict[str, str] | None = None, **options: bool) -> None:
    metadata = {"name": NAME, "labels": labels or {}}
    document = {"apiVersion": "insula/v1", "kind": "Instance", "metadata": metadata, "spec": spec}
    for item in client.declared.apply(world.tenant, [{"text": json.dumps(document)}], force=True, **options):
        if item["state"] != "done":
            raise Denied(item["reason"])


def there(world: World, spec: Spec, *, start: bool = False) -> None:
    world.operator.instances.run(world.tenant, start=start, name=NAME, **spec)


def run(client: Client, world: World, spec: Spec) -> None:
    client.instances.run(world.tenant, name=NAME, **spec)


def create(client: Client, world: World, spec: Spec) -> None:
    client.instances.run(world.tenant, name=NAME, start=False, **spec)


def run_attached(client: Client, world: World, spec: Spec) -> None:
    client.instances.run_attached(world.tenant, name=NAME, **spec).sock.close()


def apply(client: Client, world: World, spec: Spec) -> None:
    declared(client, world, spec)


def apply_in_place_of_another(client: Client, world: World, spec: Spec) -> None:
    there(world, {**spec, "options": {"kind": "container"}, "env": {"A": "B"}})
    declared(client, world, spec, replace=True)


def apply_labels(client: Client, world: World, spec: Spec) -> None:
    there(world, spec)
    declared(client, world, {**spec, "wanted": "stopped"}, {"a": "b"})


def start(client: Client, world: World, spec: Spec) -> None:
    there(world, spec)
    client.instances.start(world.tenant, NAME)


def restart(client: Client, world: World, spec: Spec) -> None:
    there(world, spec, start=True)
    client.instances.restart(world.tenant, NAME)


def attach_and_start(client: Client, world: World, spec: Spec) -> None:
    there(world, spec)
    with client.instances.attach(world.tenant, NAME, start=True) as attached:
        for kind, payload in attached:
            if kind.name == "ERROR":
                raise Denied(json.loads(payload)["detail"])


PATHS: dict[Callable[[Client, World, Spec], None], str] = {
    run: "run",
    create: "run",
    run_attached: "run_attached",
    apply: "apply",
    apply_in_place_of_another: "apply",
    apply_labels: "apply",
    start: "start",
    restart: "restart",
    attach_and_start: "attach",
}
"""Each path, with its route."""
NO_OPTIONS = {"update", "rename", "plug", "unplug", "publish", "stop", "kill", "pause", "unpause", "remove", "detach",
              "exec", "exec_detached", "vnc", "archive_get", "archive_put", "export", "bind", "unbind",
              "create_service_account", "remove_service_account", "create_network", "remove_network",
              "create_snapshot", "remove_snapshot", "restore_snapshot", "fork", "create_ticket", "migrate",
              "add_disk", "remove_disk"}  # fmt: skip
"""Routes that change something of a tenant, and neither store options nor start what was stored; or of virtual machines
alone, whose options take no permission."""


@settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(
    path=st.sampled_from([*PATHS]),
    role=st.sampled_from(["member", "admin"]),
    taken=st.sets(st.sampled_from([*OF_OPTIONS])),
)
def test_options_take_their_permissions_by_every_path(path: Any, role: Any, taken: set[str], world: World) -> None:
    options: Spec = {"kind": "container"}
    for permission in taken:
        options |= OF_OPTIONS[permission]
    spec = {"image": "busybox", "command": ["true"], "networks": [], "stop_timeout": 0, "options": options}
    refused = ""
    try:
        path(world.members[role].client, world, spec)
    except Denied as error:
        refused = error.message
    finally:
        found = [view["instance"] for view in world.operator.instances.list(world.tenant)]
        if any(instance["name"] == NAME for instance in found):
            world.operator.instances.remove(world.tenant, NAME, force=True)
    missing = taken - permissions_of(role)
    assert bool(refused) == bool(missing), refused
    assert not missing or any(permission in refused for permission in missing), refused
    if missing and path in (run, create, run_attached, apply):
        assert all(instance["name"] != NAME for instance in found), "nothing was made"


def test_every_permission_for_options_is_tried() -> None:
    own = {"instance.read", "instance.write", "instance.logs", "instance.files", "instance.exec", "instance.attach"}
    assert {name for name in PERMISSIONS if name.startswith("instance.")} - own == set(OF_OPTIONS)
    assert set(OF_OPTIONS) & permissions_of("member") == set(), "the control: a member holds none"


def test_every_route_that_changes_instances_is_known(tmp_path: Path) -> None:
    """A new one has to be tried above, or said to concern no options."""
    found = set()
    for path, method, handler in handlers(application(StubPlane(tmp_path), None)):
        kind = permission_of(handler, method).partition(".")[0]
        if method in ("POST", "PUT", "PATCH", "DELETE") and "{tenant:" in path and kind in ("instance", "set"):
            found.add(str(handler.handler_name))
    assert found - NO_OPTIONS - {"wait", "diff"} == {*PATHS.values()}


WRITERS = {
    "control/instances/admission.py: propose",  # a new one, which _checked has admitted
    "control/instances/admission.py: attempt",  # limits
    "control/instances/connecting.py: attempt",  # networks
    "control/instances/plugging.py: unplug",  # without ports that are gone
    "control/instances/lifecycle.py: start_anew",  # after a boot, by its restart policy
    "control/instances/loading.py: _take",  # as it was, with the name of its host
    "control/instances/renaming.py: _commit",
    "control/instances/migrating.py: _committed",  # as it was, of which host it is
    "control/instances/verbs.py: attempt",  # start, restart, reconfigure, which admit; stop, pause, unpause, remove
}


def test_nothing_else_writes_instances() -> None:
    """All that put a record of an instance into the store. A new one has to admit what it writes."""
    found = set()
    for file in (SOURCE / "control").rglob("*.py"):
        functions = [each for each in ast.walk(ast.parse(file.read_text())) if isinstance(each, DEFINITIONS)]
        for function in functions:
            inner = {id(node) for each in ast.walk(function) if each is not function for node in within(each)}
            if any(is_put(node) for node in ast.walk(function) if id(node) not in inner):
                found.add(f"{file.relative_to(SOURCE)}: {function.name}")
    assert found == WRITERS


DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def within(node: ast.AST) -> list[ast.AST]:
    return [*ast.walk(node)] if isinstance(node, DEFINITIONS) else []


def is_put(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "put" and ast.unparse(node.value) == "INSTANCES"
