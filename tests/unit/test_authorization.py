"""Every route of the API has a permission, and every answer a form for tenants: read from the application itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast, get_args

import msgspec
import pytest
from litestar import Litestar, asgi, get, head, websocket_listener
from litestar.types import Receive, Scope, Send

from insula.api.app import application, create_app
from insula.api.authorization import check_routes, handlers, permission_of
from insula.api.narrowing import FREE, NARROW, for_sender
from insula.control.identities.authority import OPERATOR, Authority
from insula.model import own_views
from insula.model.objects import ImageConfig, Instance, InstanceSpec, InstanceStatus, OverlayRoot, Port
from insula.model.permissions import PERMISSIONS
from insula.model.tracing import TraceRule, TraceView
from insula.model.views import HostStatus, InstanceView
from tests.unit.stub_plane import StubPlane

MEMBER = Authority(proof="x", tenants={"acme": "member"})
VIEWER = Authority(proof="x", tenants={"acme": "viewer"})


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Litestar:
    return application(StubPlane(tmp_path_factory.mktemp("plane")), None)


def test_every_route_has_a_permission(app: Litestar) -> None:
    check_routes(app)
    used = {permission_of(handler, method) for _, method, handler in handlers(app)}
    assert len(used) > 20 and used <= set(PERMISSIONS)


@pytest.mark.parametrize("more", [{}, {"permission": "no.such"}, {"permission": "instance.read"}])
def test_a_route_without_one_is_refused(more: dict[str, Any]) -> None:
    """Also one whose permission is a tenant's, on a path that names no tenant."""

    @get("/x", **more)
    async def route() -> str:
        return ""

    with pytest.raises(ValueError, match="GET /x"):
        check_routes(Litestar([route], openapi_config=None))


@asgi("/mount", is_mount=True, copy_scope=True)
async def mount(scope: Scope, receive: Receive, send: Send) -> None:
    raise AssertionError("nobody gets here")


@head("/x")
async def only_head() -> None:
    raise AssertionError("nobody gets here")


@websocket_listener("/socket")
async def web_socket(data: str) -> str:
    raise AssertionError("nobody gets here")


@pytest.mark.parametrize("handler", [mount, only_head, web_socket], ids=["a mount", "HEAD", "a WebSocket"])
def test_other_kinds_of_routes_need_one_too(handler: Any) -> None:
    with pytest.raises(ValueError, match="has no permission of the table"):
        check_routes(Litestar([handler], openapi_config=None))


def test_insulad_does_not_start_with_a_route_without_one(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    @get("/whoami")
    async def route() -> str:
        return ""

    plane = StubPlane(tmp_path_factory.mktemp("plane"))
    create_app(plane)  # the control
    monkeypatch.setattr("insula.api.app.whoami", route)
    with pytest.raises(ValueError, match="GET /v1/whoami has no permission"):
        create_app(plane)


def test_every_change_takes_more_than_to_read(app: Litestar) -> None:
    for path, method, handler in handlers(app):
        permission = permission_of(handler, method)
        if method in ("POST", "PUT", "PATCH", "DELETE") and not path.endswith(
            ("/wait", "/diff", "/tokens/{token:str}", "/certificates/{serial:str}")
        ):
            assert not permission.endswith(".read"), f"{method} {path}"


def structs(hint: Any) -> Iterator[type]:
    """The structs in the annotation of a route's answer."""
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        yield hint
    for each in get_args(hint):
        yield from structs(each)


def test_every_answer_for_tenants_has_a_form(app: Litestar) -> None:
    for path, method, handler in handlers(app):
        if method == "OPTIONS" or PERMISSIONS[permission_of(handler, method)].scope == "host":
            continue
        for kind in structs(cast(Any, handler).parsed_fn_signature.return_type.annotation):
            assert kind in NARROW or kind in FREE, f"{method} {path} returns {kind.__name__}"


def test_forms_for_tenants_have_nothing_of_the_host() -> None:
    """Neither they nor what is in them."""
    hidden = {
        "index",
        "vni",
        "id_base",
        "pid",
        "start_time",
        "host",
        "uid",
        "inode",
        "path",
        "upper",
        "device",
        "cgroups",
    }
    for name, kind in vars(own_views).items():
        if isinstance(kind, type) and name.startswith("Own"):
            assert not hidden & {field.name for field in msgspec.structs.fields(kind)}, name


def view() -> InstanceView:
    port = Port(tenant="acme", network="n", instance="web", index=7, mac="02:00:00:00:00:01", address="10.0.0.2")
    instance = Instance(
        tenant="acme",
        name="web",
        id="0" * 32,
        host="rack7",
        spec=InstanceSpec(image="busybox", env={"PASSWORD": "secret"}),
        image_digest="sha256:0",
        config=ImageConfig(env=["TOKEN=secret"]),
        root=OverlayRoot(layers=[]),
        ports=[port],
        wanted="running",
        created=1.0,
    )
    return InstanceView(instance=instance, status=InstanceStatus(state="running", pid=4711, start_time=5))


def test_a_member_sees_the_instance_and_nothing_of_the_host() -> None:
    shown = msgspec.to_builtins(for_sender([view()], MEMBER))[0]
    assert shown["instance"]["spec"]["env"] == {"PASSWORD": "secret"}
    assert shown["instance"]["ports"][0]["address"] == "10.0.0.2"
    text = str(shown)
    assert "rack7" not in text and "4711" not in text and "index" not in text
    whole = msgspec.to_builtins(for_sender(view(), OPERATOR))
    assert whole["status"]["pid"] == 4711 and whole["instance"]["host"] == "rack7"


@pytest.mark.parametrize("sender", [VIEWER, Authority(proof="x", host=frozenset({"auditor"}))])
def test_who_can_not_run_processes_sees_no_values_of_variables(sender: Authority) -> None:
    text = str(msgspec.to_builtins(for_sender(view(), sender)))
    assert "secret" not in text and "PASSWORD" in text and "TOKEN" in text


def test_what_nobody_has_decided_about_is_not_shown() -> None:
    status = HostStatus(
        version="1", hostname="h", kernel="k", started=0.0, revision=1, tenants=1, networks=1, instances={}
    )
    assert for_sender(status, OPERATOR) is status
    with pytest.raises(TypeError, match="HostStatus"):
        for_sender(status, MEMBER)


def test_tenants_see_no_installed_rules_of_a_trace() -> None:
    whole = TraceView(
        source="web",
        target="db",
        source_address="10.0.0.2",
        target_address="10.0.0.3",
        service="tcp/80",
        allowed=True,
        wanted=True,
        steps=["both are on network default"],
        rules=[TraceRule(where="inet insula forward", verdict="accept", text="iifname br1")],
    )
    assert for_sender(whole, OPERATOR) == whole
    assert for_sender(whole, MEMBER) == msgspec.structs.replace(whole, rules=[])
