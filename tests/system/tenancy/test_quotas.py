"""Quotas: fifty requests at once for the last places, by the operator and a member, a kill -9 in the middle; rates.

Each kind has a tenant of its own with a limit of that kind. The member is a user of the host, on the users' socket.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import pytest

from insula.api.peer import MAX_CONNECTIONS
from insula.client import Client
from insula.kernel import syscalls
from insula.model.errors import InsulaError, NotFound, QuotaExceeded, Unavailable
from insula.model.quotas import NOW, STORED
from tests.support.daemon import Daemon
from tests.support.machine import Run
from tests.support.wait import patiently, until
from tests.system.tenancy.quota_kinds import IMAGE, KINDS, MOST, OPENINGS, own_images, rootfs

ADMIN, STRANGER, OUTSIDER = 61011, 61012, 61013
AT_ONCE = 50
"""Requests at once."""


@contextmanager
def as_user(uid: int) -> Iterator[None]:
    """Connections that this thread makes are of this user of the host (SO_PEERCRED has the effective one)."""
    syscalls.set_thread_users(-1, uid, -1)
    try:
        yield
    finally:
        syscalls.set_thread_users(-1, 0, -1)


@pytest.fixture(scope="module")
def host(run_: Run) -> Iterator[Daemon]:
    """A daemon that is killed now and then; users of the host may reach its socket."""
    daemon = Daemon(run_)
    mode = daemon.path.parent.stat().st_mode & 0o7777
    for path in (daemon.path.parent, daemon.path):
        path.chmod(0o711)
    try:
        limits = "[quotas]\nnetworks = 7\nuser_tokens = 6\nuser_requests = 400\n"
        daemon.configure(f'{limits}[network]\nfloating = ["198.18.0.64/27"]')
        daemon.start()
        yield daemon
    finally:
        daemon.remove()
        daemon.path.parent.chmod(mode)


def test_every_stored_quota_is_tried() -> None:
    assert set(KINDS) == {quota.name for quota in STORED}
    assert set(OPENINGS) == {quota.name for quota in NOW}


@pytest.fixture(scope="module")
def operator(host: Daemon) -> Client:
    return Client(str(host.run / "insulad.sock"), timeout=patiently(60))


def tenant_of(name: str) -> str:
    return name.replace("_", "-")


@pytest.fixture(scope="module")
def houses(operator: Client) -> dict[str, str]:
    """A tenant for each kind of quota, in which the user `admin` has that role; and `other`, which is not limited."""
    operator.identities.create_user("admin", ADMIN)
    limits = {**{name: kind.limit for name, kind in KINDS.items()}, "exec_sessions": MOST, "streams": MOST}
    limits["upload_bytes"] = MOST * 1000
    found = {name: tenant_of(name) for name in (*limits, "other")}
    for name, tenant in found.items():
        operator.tenants.create(tenant, None, **({name: limits[name]} if name in limits else {}))
        operator.identities.bind("admin", "admin", tenant)
    operator.identities.create_service_account("tokens", "ci")
    return found


def usage(client: Client, tenant: str) -> dict[str, Any]:
    found: dict[str, Any] = client.tenants.get(tenant)["usage"]
    return found


def many(host: Daemon, work: Callable[[Client, int], object]) -> list[Exception | None]:
    """Do it fifty times at once, in turns as the operator and as the user of the host; returns what each raised."""

    def one(number: int) -> Exception | None:
        try:
            if number % 2:
                with as_user(ADMIN):
                    work(Client(str(host.run / "users.sock"), timeout=patiently(60)), number)
            else:
                work(Client(str(host.run / "insulad.sock"), timeout=patiently(60)), number)
        except (InsulaError, OSError) as error:
            return error
        return None

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return [*pool.map(one, range(AT_ONCE))]


# -- stored objects ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_of_fifty_requests_at_once_as_many_succeed_as_there_are_places(
    name: str, host: Daemon, operator: Client, houses: dict[str, str]
) -> None:
    """Exactly, through both sockets; and what is removed is free again."""
    kind, tenant = KINDS[name], houses[name]
    before = usage(operator, "other")
    outcomes = many(host, lambda client, number: kind.make(client, tenant, number))
    assert [error for error in outcomes if error and not isinstance(error, QuotaExceeded)] == []
    assert outcomes.count(None) == MOST
    refusal = next(str(error) for error in outcomes if error)
    assert f"tenant {tenant} may" in refusal and " left; hint: " in refusal and "\n" not in refusal
    used = usage(operator, tenant)[name]
    assert used == kind.objects(operator, tenant) and used <= kind.limit
    if name != "tokens":  # the control: another tenant is not concerned
        kind.make(operator, "other", [*KINDS].index(name))
    assert name == "tokens" or usage(operator, "other")[name] > before[name]
    with pytest.raises(QuotaExceeded, match="in use, not"):
        operator.tenants.update(tenant, **{name: kind.limit / 2 if name == "cpus" else int(kind.limit) // 2})


def test_after_a_kill_in_the_middle_usage_is_what_is_there(
    host: Daemon, operator: Client, houses: dict[str, str]
) -> None:
    """Fifty requests of each kind at once, in new tenants, while insulad is killed; then fifty more."""
    tenants = {name: f"{tenant_of(name)}-again" for name in KINDS}
    for name, tenant in tenants.items():
        operator.tenants.create(tenant, None, **{name: KINDS[name].limit})
        operator.identities.bind("admin", "admin", tenant)
    operator.identities.create_service_account(tenants["tokens"], "ci")

    def everything(client: Client, number: int) -> None:
        error: Exception | None = None
        for name, tenant in tenants.items():
            try:
                KINDS[name].make(client, tenant, number)
            except (InsulaError, OSError) as failure:
                error = failure
        if error:
            raise error

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(many, host, everything)
        until(lambda: usage(operator, tenants["networks"])["networks"] >= 1, "they are at work")
        host.kill("insulad")
        host.start()
        outcomes = running.result()
    assert any(isinstance(error, Unavailable | OSError) for error in outcomes), "the control: some were interrupted"
    for name, tenant in tenants.items():
        there = KINDS[name].objects(operator, tenant)
        assert usage(operator, tenant)[name] == there <= KINDS[name].limit, name
    many(host, lambda client, number: everything(client, 100 + number))
    for name, tenant in tenants.items():
        kind, used = KINDS[name], usage(operator, tenant)[name]
        unit = IMAGE if name == "image_bytes" else kind.limit / MOST
        assert used == kind.objects(operator, tenant), name
        assert kind.limit - unit < used <= kind.limit, f"{name}: the last place is taken, and no more"
    assert "counted anew" not in host.log.read_text(), "nothing has drifted"


def test_removals_give_everything_back(host: Daemon, operator: Client, houses: dict[str, str]) -> None:
    for tenant in (tenant for name, tenant in houses.items() if name in KINDS):
        for view in operator.instances.list(tenant):
            operator.instances.remove(tenant, view["instance"]["name"])
        for image in own_images(operator, tenant):
            operator.images.remove(tenant, image["name"])
        for view in operator.policies.list(tenant):
            operator.policies.remove(tenant, view["policy"]["name"])
        for balancer in operator.load_balancers.list(tenant):
            operator.load_balancers.remove(tenant, balancer["name"])
        for floating in operator.floating_ips.list(tenant):
            operator.floating_ips.release(tenant, floating["floating_ip"]["name"])
        for group in operator.address_groups.list(tenant):
            operator.address_groups.remove(tenant, group["name"])
        for view in operator.routers.list(tenant):
            operator.routers.remove(tenant, view["router"]["name"])
        for view in operator.networks.list(tenant):
            operator.networks.remove(tenant, view["network"]["name"])
        for view in operator.identities.service_accounts(tenant):
            operator.identities.remove_service_account(tenant, view["principal"]["name"])
        assert not any(usage(operator, tenant).values()), tenant


# -- images --------------------------------------------------------------------------------------------------------


def test_what_two_images_share_counts_once_and_what_tenants_share_for_each(
    operator: Client, houses: dict[str, str]
) -> None:
    """So the usage of one tells nothing of another, nor of shared images."""
    data = rootfs(1)
    operator.tenants.create("first")
    operator.tenants.create("second")
    counted = []
    for tenant in ("first", "second"):
        operator.images.import_(tenant, "a", [data])
        counted.append(usage(operator, tenant)["image_bytes"])
        assert counted[-1] > 2 * 64 * 1024, "compressed and extracted"
        operator.images.tag(tenant, "a", "b")
        assert usage(operator, tenant)["image_bytes"] == counted[-1]
        assert usage(operator, tenant)["images"] == 2
    assert abs(counted[0] - counted[1]) < 100, "the second pays in full; the time of creation differs"
    operator.images.tag("first", "busybox", "mine")
    assert usage(operator, "first")["image_bytes"] > counted[0] + 2**20, "shared ones are paid for by who names them"
    for name in ("a", "b", "mine"):
        operator.images.remove("first", name)
    assert usage(operator, "first")["image_bytes"] == 0 == usage(operator, "first")["images"]


def test_content_that_an_instance_uses_is_paid_for_after_its_name_is_bound_anew(operator: Client) -> None:
    operator.tenants.create("rebinding")
    operator.images.import_("rebinding", "app", [rootfs(1)])
    one = usage(operator, "rebinding")["image_bytes"]
    operator.instances.run("rebinding", "app", ["x"], start=False, networks=[], name="web")
    operator.images.import_("rebinding", "app", [rootfs(2)])
    names = [image["name"] for image in own_images(operator, "rebinding")]
    assert len(names) == 2 and names[0] == "app:latest" and names[1].startswith("app@sha256:")
    assert usage(operator, "rebinding")["image_bytes"] > 1.9 * one
    operator.images.import_("rebinding", "app", [rootfs(3)])
    assert len(own_images(operator, "rebinding")) == 2, "content that nobody uses goes"
    operator.instances.remove("rebinding", "web")
    operator.images.remove("rebinding", names[1])
    assert abs(usage(operator, "rebinding")["image_bytes"] - one) < 100


def test_images_that_exceed_the_quota_leave_no_content(host: Daemon, operator: Client) -> None:
    operator.tenants.create("small", None, image_bytes=IMAGE)
    blobs = host.root / "images" / "blobs" / "sha256"
    operator.images.import_("small", "a", [rootfs(1)])
    before = len(list(blobs.iterdir()))
    with pytest.raises(QuotaExceeded, match=r"of images and has .* left"):
        operator.images.import_("small", "b", [rootfs(2)])
    assert len(list(blobs.iterdir())) == before
    operator.images.import_("small", "a", [rootfs(3)])  # the control: in the place of the other
    used = usage(operator, "small")["image_bytes"]
    operator.tenants.update("small", image_bytes=used)
    with pytest.raises(QuotaExceeded, match="1B asked: 0B left"):  # before any work is done
        operator.images.import_("small", "c", [b"this is no archive"])


# -- open requests -------------------------------------------------------------------------------------------------


def opened(host: Daemon, request: bytes, stack: ExitStack) -> list[socket.socket]:
    """Fifty connections with this request, in turns as the operator and as the user of the host."""
    found = []
    for number in range(AT_ONCE):
        sock = stack.enter_context(socket.socket(socket.AF_UNIX))
        sock.settimeout(patiently(60))
        if number % 2:
            with as_user(ADMIN):
                sock.connect(str(host.run / "users.sock"))
        else:
            sock.connect(str(host.run / "insulad.sock"))
        found.append(sock)
    for sock in found:
        sock.sendall(request)
        sock.setblocking(False)
    return found


def refused(socks: list[socket.socket]) -> int:
    """How many of them have the answer 422; a request that goes on has 200, or none yet."""
    count = 0
    for sock in socks:
        with suppress(BlockingIOError):
            count += sock.recv(64, socket.MSG_PEEK).startswith(b"HTTP/1.1 422")
    return count


@pytest.fixture(scope="module")
def running(operator: Client, houses: dict[str, str]) -> None:
    for name in ("exec_sessions", "streams"):
        operator.networks.create(houses[name], "default", "10.0.0.0/24")
        operator.instances.run(houses[name], "busybox", ["sleep", "600"], name="web")


@pytest.mark.parametrize("name", OPENINGS)
def test_of_fifty_requests_as_many_are_open_as_may_be(
    name: str, host: Daemon, operator: Client, houses: dict[str, str], running: None
) -> None:
    """They end with the connection, or with insulad; then others may come."""
    tenant, most = houses[name], MOST * 1000 if name == "upload_bytes" else MOST
    for end in ("close", "kill"):
        with ExitStack() as stack:
            socks = opened(host, OPENINGS[name], stack)
            until(lambda socks=socks: refused(socks) == AT_ONCE - MOST, "all others are refused")  # type: ignore[misc]
            assert usage(operator, tenant)[name] == most
            if end == "kill":
                host.kill("insulad")
                host.start()
        until(lambda: usage(operator, tenant)[name] == 0, "nothing is held any more")
    operator.tenants.update(tenant, **{name: 0})
    with ExitStack() as stack:
        socks = opened(host, OPENINGS[name], stack)
        until(lambda: refused(socks) == AT_ONCE, "none may be open")
    operator.tenants.update(tenant, **{name: None})


# -- defaults, and what is shown -------------------------------------------------------------------------------------


def test_new_tenants_have_the_limits_of_the_settings(operator: Client, host: Daemon) -> None:
    limits = operator.tenants.create("plain")["tenant"]["limits"]
    assert (limits["networks"], limits["images"], limits["memory"]) == (7, 1000, None)
    limits = operator.tenants.create("given", None, networks=9, images=None)["tenant"]["limits"]
    assert (limits["networks"], limits["images"], limits["instances"]) == (9, None, 10_000)
    host.cli.ok("tenant", "create", "by-cli", "--networks", "2", "--image-bytes", "1g", "--requests", "none")
    shown = host.cli.ok("tenant", "show", "by-cli")
    for line in ("networks         at most 2, 0 in use, 2 left", "image bytes      at most 1G, 0B in use, 1G left",
                 "requests         no limit", "log bytes        at most 500G, 0B in use, 500G left"):  # fmt: skip
        assert line in shown.splitlines()


def test_members_see_what_is_left(host: Daemon, operator: Client) -> None:
    with as_user(ADMIN):
        view = Client(str(host.run / "users.sock"), timeout=patiently(60)).tenants.get("networks")
    assert "id_base" not in view["tenant"]
    whole = operator.tenants.get("networks")
    assert (view["tenant"]["limits"], view["usage"]) == (whole["tenant"]["limits"], whole["usage"])


def test_a_user_has_no_more_tokens_than_the_setting_says(operator: Client) -> None:
    operator.identities.create_user("collector")
    made = [operator.identities.create_token("collector") for _ in range(6)]
    with pytest.raises(QuotaExceeded, match="may have 6 of these and has 6: 0 left"):
        operator.identities.create_token("collector")
    operator.identities.revoke_token(made[0]["id"])
    operator.identities.create_token("collector")


# -- rates ---------------------------------------------------------------------------------------------------------


def answers(host: Daemon, uid: int, path: str, count: int, token: str | None = None) -> list[tuple[int, str]]:
    """Send requests until one is answered by 429, at most so many; returns statuses, and the field Retry-After."""
    found = []
    for _ in range(count):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(patiently(60))
            with as_user(uid):
                sock.connect(str(host.run / "users.sock"))
            proof = f"authorization: Bearer {token}\r\n" if token else ""
            sock.sendall(f"GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{proof}\r\n".encode())
            head = sock.makefile("rb").read().partition(b"\r\n\r\n")[0].decode().lower()
        fields = dict(line.split(": ", 1) for line in head.splitlines()[1:])
        found.append((int(head.split()[1]), fields.get("retry-after", "")))
        if found[-1][0] == 429:
            break
    return found


def test_a_tenants_rate_is_for_its_members_and_counts_nobody_else(
    host: Daemon, operator: Client, houses: dict[str, str]
) -> None:
    operator.tenants.update("other", requests=1)
    operator.identities.create_user("outsider", OUTSIDER)
    strangers = answers(host, OUTSIDER, "/v1/tenants/other", 20)
    assert {status for status, _ in strangers} == {404}, "who may not know of it does not use its rate"
    members = answers(host, ADMIN, "/v1/tenants/other", 200)
    assert members[0] == (200, "") and members[-1][0] == 429
    assert int(members[-1][1]) >= 1
    assert answers(host, ADMIN, "/v1/tenants/first", 1)[0][0] == 404
    assert answers(host, ADMIN, "/v1/tenants/networks", 1) == [(200, "")], "in another tenant the member is served"
    assert operator.tenants.get("other")["usage"], "and the operator everywhere"
    operator.tenants.update("other", requests=None)
    assert {status for status, _ in answers(host, ADMIN, "/v1/tenants/other", 20)} == {200}


def test_failed_proofs_of_a_user_of_the_host_are_limited_and_lock_nobody_out(
    host: Daemon, operator: Client, houses: dict[str, str]
) -> None:
    """Also not the one who has sent them, with a proof that is valid."""
    operator.identities.create_user("holder")
    valid = operator.identities.create_token("holder")["token"]
    attempts = answers(host, STRANGER, "/v1/whoami", 500, token="insula_" + valid[::-1])
    assert attempts[0] == (401, "") and attempts[-1][0] == 429 and int(attempts[-1][1]) >= 1
    assert answers(host, STRANGER, "/v1/whoami", 1)[0][0] in (403, 429)
    assert answers(host, STRANGER, "/v1/whoami", 1, token=valid) == [(200, "")]
    assert answers(host, ADMIN, "/v1/whoami", 1) == [(200, "")], "another user is served meanwhile"
    assert operator.host.status()


def test_there_are_fewer_connections_of_a_user_than_its_tenant_may_hold_streams() -> None:
    """So that one user of the host can't hold all of a tenant's default."""
    assert next(quota.default for quota in NOW if quota.name == "streams") > MAX_CONNECTIONS  # type: ignore[operator]


def test_a_tenant_that_is_removed_leaves_nothing(operator: Client) -> None:
    operator.tenants.create("gone", None, networks=1)
    operator.identities.create_service_account("gone", "ci")
    operator.identities.create_token("gone/ci")
    operator.tenants.remove("gone")
    with pytest.raises(NotFound):
        operator.tenants.get("gone")
    assert not any(operator.tenants.create("gone")["usage"].values())
