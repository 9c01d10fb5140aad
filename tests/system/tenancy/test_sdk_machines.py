"""The SDK over TLS: members of two tenants on two machines, beside the operator, with threads and with asyncio.

Each machine is a network namespace: one beside the host, and one behind that.
"""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pytest

from insula.api.tls.certificates import Certificates
from insula.kernel.netns import call_in
from insula.model.errors import Conflict, Denied, Failed, Invalid, NotFound, Unauthenticated, Unavailable
from insula.model.own_views import OwnExplanation, OwnInstanceView, OwnProcess, OwnTenantView
from insula.model.views import Explanation, InstanceView, ProcessView, TenantView
from insula.sdk import (
    ApplySpec,
    AsyncHTTPSTransport,
    AsyncInsula,
    Credentials,
    DeclaredFile,
    HTTPSTransport,
    InstanceSpec,
    Insula,
    UnixTransport,
)
from tests.support.cli import REPOSITORY
from tests.support.daemon import Daemon
from tests.support.machine import Namespaces, Run
from tests.support.wait import patiently, until
from tests.system.tenancy.conftest import People, Person
from tests.system.tenancy.sdk_program import BIG, SHOUTING, async_day, day, tar
from tests.system.tenancy.test_https import ADDRESS, API, PORT, authority, gates, handshake

T = TypeVar("T")
WHERE = f"{ADDRESS}:{PORT}"
TENANTS = ("acme", "globex")
SECRET = Credentials(username="ann", password="hunter2")


class Machines:
    """A daemon with HTTPS, and the network namespaces of two other machines."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.operator = Insula(UnixTransport(str(daemon.run / "insulad.sock"), timeout=patiently(60)))
        names = daemon.namespaces
        self._holder = names._hold()
        far = f"/proc/{self._holder.pid}/ns/net"
        self.namespaces = (names.outside, far)
        names.ip(names.outside, f"link add far0 type veth peer name eth0 netns {self._holder.pid}")
        for namespace, device, address in ((names.outside, "far0", "198.18.1.1"), (far, "eth0", "198.18.1.2")):
            names.ip(namespace, f"address add {address}/24 dev {device}")
            names.ip(namespace, f"link set {device} up")
        names.ip(far, "route add default via 198.18.1.1")
        forward = Namespaces.wrap(names.outside, "sysctl", "-qw", "net.ipv4.ip_forward=1")
        subprocess.run(forward, check=True)

    def on(self, machine: int, function: Callable[[], T]) -> T:
        """Call a function on a machine."""
        fd = os.open(self.namespaces[machine], os.O_RDONLY | os.O_CLOEXEC)
        try:
            return call_in(fd, function)
        finally:
            os.close(fd)

    def cloud(self, token: str | None = None, certificate: Path | None = None) -> Insula:
        pem, file = authority(self.daemon), str(certificate) if certificate else None
        transport = HTTPSTransport(WHERE, authority=pem, certificate=file, timeout=patiently(60))
        return Insula(transport, token=token)

    def async_cloud(self, token: str) -> AsyncInsula:
        transport = AsyncHTTPSTransport([WHERE], authority=authority(self.daemon), timeout=patiently(60))
        return AsyncInsula(transport, token=token)

    def close(self) -> None:
        self.operator.close()
        with self._holder:
            self._holder.kill()


@pytest.fixture(scope="module")
def machines(run_: Run) -> Iterator[Machines]:
    daemon = Daemon(run_)
    mode = daemon.path.parent.stat().st_mode & 0o7777
    made = Machines(daemon)
    try:
        for path in (daemon.path.parent, daemon.path):
            path.chmod(0o711)
        daemon.configure(API)
        daemon.start()
        until(lambda: gates(daemon) != [], "the gate runs")
        until(lambda: handshake(daemon) is None, "it answers")
        for tenant in TENANTS:
            made.operator.tenants.create(tenant, cpus=4)
            made.operator.networks.create(tenant, "default", "10.0.0.0/24")
        yield made
    finally:
        made.close()
        daemon.remove()
        daemon.path.parent.chmod(mode)


@pytest.fixture(scope="module")
def people(machines: Machines, tmp_path_factory: pytest.TempPathFactory) -> People:
    return People(machines.daemon, tmp_path_factory.mktemp("tokens"))


class Members(NamedTuple):
    """One of each tenant."""

    acme: Person
    globex: Person


@pytest.fixture(scope="module")
def members(people: People) -> Members:
    return Members(*(people.person("member", tenant) for tenant in TENANTS))


def at_once(*functions: Callable[[], object]) -> list[object]:
    """Call functions in threads, and return their results."""
    results: list[object] = [None] * len(functions)

    def run(number: int) -> None:
        try:
            results[number] = functions[number]()
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(patiently(120))
    return results


@pytest.mark.parametrize("swapped", [False, True], ids=["threads and asyncio", "asyncio and threads"])
def test_two_members_and_the_operator_at_the_same_time(machines: Machines, members: Members, swapped: bool) -> None:
    def with_threads(machine: int, tenant: str, other: str) -> object:
        cloud = machines.cloud(members[machine].secret)
        return machines.on(machine, lambda: day(cloud, tenant, other))

    def with_tasks(machine: int, tenant: str, other: str) -> object:
        cloud = machines.async_cloud(members[machine].secret)
        return machines.on(machine, lambda: asyncio.run(async_day(cloud, tenant, other)))

    def as_operator() -> object:
        sees = {view.instance.tenant for _ in range(10) for view in machines.operator.instances.list()}
        assert isinstance(machines.operator.tenants.get("acme"), TenantView)
        return sees <= set(TENANTS)

    ways = (with_tasks, with_threads) if swapped else (with_threads, with_tasks)
    found = at_once(lambda: ways[0](0, *TENANTS), lambda: ways[1](1, *reversed(TENANTS)), lambda: as_operator())
    for seen, own, other in zip(found, TENANTS, reversed(TENANTS), strict=False):
        assert not isinstance(seen, BaseException), repr(seen)
        assert seen == (
            [own],
            4,
            b"from afar\n",
            b"%d\n" % len(BIG),
            7,
            [b"line 1", b"line 2", b"line 3"],
            BIG,
            [f"shouting-{number}" for number in range(5)],
            f"there is no tenant {other}",
            {own},
            [],
        )
    assert found[2] is True


def test_every_read_is_understood(machines: Machines, members: Members, people: People) -> None:
    """As the operator, by the wide types, and as an admin of a tenant on another machine, by the narrow ones."""
    machines.operator.instances.run("acme", InstanceSpec(image="busybox", name="read", command=SHOUTING))
    admin = people.person("admin", "acme")

    def read(cloud: Insula, kinds: tuple[type, ...]) -> None:
        tenant, instance, explained, process = kinds
        assert isinstance(cloud.tenants.get("acme"), tenant)
        view = cloud.instances.get("acme", "read")
        assert isinstance(view, instance) and view.instance.ports[0].address.startswith("10.0.0.")
        assert isinstance(cloud.instances.explain("acme", "read"), explained)
        top = cloud.instances.top("acme", "read")
        assert top and all(isinstance(each, process) for each in top)
        assert any(each.name == "busybox:latest" for each in cloud.images.list("acme"))
        assert cloud.images.get("acme", "busybox:latest").size > 0
        assert [each.network.name for each in cloud.networks.list("acme")] == ["default"]
        assert cloud.networks.get("acme", "default").status.ready
        assert [each.name for each in cloud.tenants.usage("acme").instances] == ["read"]
        for samples in (cloud.tenants.stats("acme"), cloud.instances.stats("acme", "read"), cloud.host.stats()):
            assert next(samples).instances[0].name == "read"
            samples.close()
        assert {each.tenant for each in cloud.host.usage()} >= {"acme"}
        assert "insula_tenant_cpu_seconds" in cloud.tenants.metrics("acme")
        assert b"kind: Instance" in b"".join(cloud.declared.dump("acme"))
        assert '"$schema"' in cloud.declared.schema()
        assert admin.name in [each.user for each in cloud.identities.list_bindings("acme")]
        assert list(cloud.identities.list_service_accounts("acme")) == []
        assert cloud.identities.whoami().user
        assert "BEGIN CERTIFICATE" in cloud.identities.authorities().server
        assert cloud.identities.login().providers == []
        assert len(b"".join(cloud.instances.export("acme", "read"))) > 100_000

    read(machines.operator, (TenantView, InstanceView, Explanation, ProcessView))
    cloud = machines.cloud(admin.secret)
    machines.on(1, lambda: read(cloud, (OwnTenantView, OwnInstanceView, OwnExplanation, OwnProcess)))
    machines.on(1, cloud.close)
    operator = machines.operator
    status = operator.host.status()
    assert (status.tenants, status.instances["running"]) == (3, 1)
    assert {each.state for each in operator.host.doctor()} <= {"ok", "degraded", "missing", "unknown"}
    assert operator.host.verify().passed
    assert operator.host.whois(1).tenant is None
    assert "insula_" in operator.host.metrics()
    assert admin.name in [each.principal.name for each in operator.identities.list_users()]
    assert operator.identities.get_user(admin.name).bindings[0].role == "admin"
    assert admin.name in [each.user for each in operator.identities.list_tokens(everybody=True)]
    assert list(operator.identities.list_certificates(everybody=True)) == []
    entries = list(operator.audit.list(tenant="acme"))
    assert any((each.name, each.verb, each.status) == ("read", each.verb, 201) for each in entries)
    assert operator.audit.head().head.partition(":")[0].isdigit()
    assert admin.name.encode() in b"".join(operator.audit.raw())
    operator.instances.remove("acme", "read", force=True)


def test_images_pass_in_both_directions(machines: Machines, people: People) -> None:
    """Saved, loaded, tagged, imported, removed; an error in the middle of a pull."""
    admin = people.person("admin", "acme")

    def work() -> list[str]:
        with machines.cloud(admin.secret) as cloud:
            saved = list(cloud.images.save("acme", ["busybox:latest"], layout="docker"))
            [loaded] = cloud.images.load("acme", saved, name="mine:1")
            assert (loaded.tenant, loaded.name) == ("acme", "mine:1")
            assert cloud.images.tag("acme", "mine:1", "mine:2").layers == loaded.layers
            assert cloud.images.import_rootfs("acme", "bare:1", [tar("greeting", BIG)]).size >= len(BIG)
            names = [each.name for each in cloud.images.list("acme", page=1) if each.tenant == "acme"]
            pull = cloud.images.pull("acme", "127.0.0.1:1/nothing", insecure=True, credentials=SECRET)
            with pytest.raises((Denied, Failed, Unavailable)):
                list(pull)
            with pytest.raises(Invalid):
                cloud.images.load("acme", [b"no tar" * 1000])
            for name in names:
                cloud.images.remove("acme", name)
            return names

    assert "hunter2" not in repr(SECRET)
    assert machines.on(1, work) == ["bare:1", "mine:1", "mine:2"]


def test_identities_from_an_invitation_to_a_service_account(machines: Machines, people: People) -> None:
    """A user joins by an invitation; an admin makes a service account, which works, and is removed."""
    operator = machines.operator.identities
    admin = people.person("admin", "acme")
    word = operator.invite(admin.name, ttl=600)
    assert word.addresses == [WHERE] and "BEGIN CERTIFICATE" in word.authority
    with machines.cloud(word.token) as invited:
        joined = machines.on(0, invited.identities.join)
    account = "acme/robot"
    operator.create_service_account("acme", "robot")
    assert operator.bind(account, "member", "acme").kind == "service-account"
    made = operator.create_token(account, ttl=600, labels={"kind": "mine"}, idempotency_key="robot-token")
    with pytest.raises(Conflict, match=made.id):
        operator.create_token(account, ttl=600, labels={"kind": "mine"}, idempotency_key="robot-token")

    def names(token: str) -> list[str]:
        with machines.cloud(token) as cloud:
            return [view.principal.name for view in cloud.identities.list_service_accounts("acme")]

    assert machines.on(0, lambda: names(joined.token)) == ["robot"]
    with pytest.raises(Denied):
        machines.on(1, lambda: names(made.token))
    operator.unbind(account, "acme")
    operator.revoke_token(made.id)
    operator.remove_service_account("acme", "robot")
    assert machines.on(0, lambda: names(joined.token)) == []


def test_declared_state_and_events(machines: Machines, people: People) -> None:
    admin = people.person("admin", "globex")
    text = "apiVersion: insula/v1\nkind: Network\nmetadata: {name: backend}\nspec: {subnet: 10.1.0.0/24}\n"
    spec = ApplySpec(files=[DeclaredFile(name="app.yaml", text=text)], set="app")

    def work() -> list[tuple[str, str | None, str | None]]:
        with machines.cloud(admin.secret) as cloud:
            begun = cloud.host.events()
            with begun:
                assert [item.operation for item in cloud.declared.diff("globex", spec)] == ["create"]
                assert [item.state for item in cloud.declared.apply("globex", spec)] == ["done"]
                cloud.networks.remove("globex", "backend")
                seen = [next(begun) for _ in range(2)]
            assert all(event.cursor and event.revision is None for event in seen)
            with cloud.host.events(cursor=seen[0].cursor) as again:
                assert next(again).cursor == seen[1].cursor, "a stream goes on where another one ended"
            return [(event.action, event.tenant, event.name) for event in seen]

    assert machines.on(0, work) == [("created", "globex", "backend"), ("removed", "globex", "backend")]


def test_who_somebody_is_and_who_the_server_is(
    machines: Machines, members: Members, people: People, tmp_path: Path
) -> None:
    made = machines.operator.identities.create_certificate(members.acme.name, ttl=3600)
    (tmp_path / "ann.pem").write_text(made.pem)
    with machines.cloud(certificate=tmp_path / "ann.pem") as cloud:
        assert machines.on(1, cloud.identities.whoami).proof == f"certificate {made.serial}"
        machines.operator.identities.revoke_certificate(made.serial)
        with pytest.raises(Unauthenticated):
            machines.on(1, cloud.identities.whoami)
    with machines.cloud() as cloud, pytest.raises(Unauthenticated, match="no proof"):
        machines.on(0, cloud.identities.whoami)
    foreign = Certificates(tmp_path / "foreign").authority("server").pem.decode()
    with (
        Insula(HTTPSTransport(WHERE, authority=foreign), token=members.acme.secret) as cloud,
        pytest.raises(Denied, match="not the server that you were invited to"),
    ):
        machines.on(0, cloud.identities.whoami)

    async def ask(transport: AsyncHTTPSTransport) -> str:
        async with AsyncInsula(transport, token=members.acme.secret) as cloud:
            return (await cloud.identities.whoami()).user

    with pytest.raises(Denied, match="not the server that you were invited to"):
        machines.on(0, lambda: asyncio.run(ask(AsyncHTTPSTransport(WHERE, authority=foreign))))
    second = [f"{ADDRESS}:1", WHERE]
    reachable = AsyncHTTPSTransport(second, authority=authority(machines.daemon))
    assert machines.on(0, lambda: asyncio.run(ask(reachable))) == members.acme.name
    with pytest.raises(Unavailable, match="Connection refused"):
        machines.on(0, lambda: asyncio.run(ask(AsyncHTTPSTransport(second[:1], authority=foreign))))


@pytest.mark.parametrize("stream", ["logs", "exec"])
@pytest.mark.parametrize("half", ["threads", "asyncio"])
def test_a_stream_ends_with_its_right(machines: Machines, people: People, stream: str, half: str) -> None:
    """And says why; that of another member goes on."""
    person, other = people.person("member", "acme"), people.person("member", "acme")
    name = f"{half}-{stream}"
    machines.operator.instances.run("acme", InstanceSpec(image="busybox", name=name, command=SHOUTING))
    begun, ended = threading.Semaphore(0), threading.Event()

    def follow(token: str) -> int:
        """Read until the stream ends, or until the other one has ended and something came after that."""
        with machines.cloud(token) as cloud:
            items: Any = (
                cloud.instances.logs("acme", name, follow=True)
                if stream == "logs"
                else cloud.instances.exec("acme", name, SHOUTING)
            )
            with items:
                for count, _ in enumerate(items):
                    if count == 0:
                        begun.release()
                    elif ended.is_set():
                        return count
        return 0

    async def follow_in_loop(token: str) -> int:
        async with machines.async_cloud(token) as cloud:
            items: Any = (
                cloud.instances.logs("acme", name, follow=True)
                if stream == "logs"
                else cloud.instances.exec("acme", name, SHOUTING)
            )
            count = 0
            async with items:
                async for _ in items:
                    count += 1
                    if count == 1:
                        begun.release()
                    elif ended.is_set():
                        return count
        return 0

    def run(token: str, machine: int) -> object:
        if half == "threads":
            return machines.on(machine, lambda: follow(token))
        return machines.on(machine, lambda: asyncio.run(follow_in_loop(token)))

    def revoke() -> None:
        for _ in range(2):
            assert begun.acquire(timeout=patiently(30))
        machines.operator.identities.revoke_token(person.secret.split("_")[1])

    def followed() -> object:
        try:
            return run(person.secret, 0)
        except Unauthenticated as error:
            return error
        finally:
            ended.set()

    lost, kept, _ = at_once(followed, lambda: run(other.secret, 1), revoke)
    assert isinstance(lost, Unauthenticated) and "not valid any more" in lost.message, lost
    assert isinstance(kept, int) and kept > 0, kept
    machines.operator.instances.remove("acme", name, force=True)


def test_a_cancelled_stream_is_gone_at_the_server(machines: Machines, members: Members) -> None:
    """It counts no longer as one of the tenant's open streams."""
    machines.operator.instances.run("acme", InstanceSpec(image="busybox", name="followed", command=SHOUTING))

    def streams() -> int:
        return int(machines.operator.tenants.get("acme").usage.streams)

    async def work() -> None:
        async with machines.async_cloud(members.acme.secret) as cloud:

            async def follow() -> None:
                async for _ in cloud.instances.logs("acme", "followed", follow=True):
                    pass

            tasks = [asyncio.ensure_future(follow()) for _ in range(5)]
            while await asyncio.to_thread(streams) != 5:
                await asyncio.sleep(0.05)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await cloud.instances.wait("acme", "followed")
            for task in tasks:
                task.cancel()
            assert len(await asyncio.gather(*tasks, return_exceptions=True)) == 5
            while await asyncio.to_thread(streams):
                await asyncio.sleep(0.05)
            assert (await cloud.instances.get("acme", "followed")).status.state == "running"

    machines.on(0, lambda: asyncio.run(asyncio.wait_for(work(), patiently(60))))
    machines.operator.instances.remove("acme", "followed", force=True)


def test_the_programs_of_the_documentation(machines: Machines, people: People, tmp_path: Path) -> None:
    """All of docs/sdk.md, in its order, on another machine whose user has joined the host as `lab`."""
    ann = people.person("member", "default")
    machines.operator.tenants.remove("acme", force=True)
    text = (REPOSITORY / "docs/sdk.md").read_text()
    program = "\n".join(re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert program.count("with Insula") > 8
    program = program.replace("cloud.example.com:7443", WHERE).replace(
        "/run/insula/users.sock", str(machines.daemon.run / "users.sock")
    )
    (tmp_path / "program.py").write_text(program)
    (tmp_path / "token").write_text(ann.secret + "\n")
    (tmp_path / "ca.pem").write_text(authority(machines.daemon))
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": str(REPOSITORY / "src")}
    joining = Namespaces.wrap(machines.namespaces[0], *machines.daemon.cli.command("remote", "add", "lab"))
    word = machines.daemon.cli.ok("remote", "invite", ann.name)
    subprocess.run(joining, input=f"{word}\n", env=environment, text=True, check=True, capture_output=True)
    environment["INSULA_SOCKET"] = str(machines.daemon.run / "insulad.sock")
    command = Namespaces.wrap(machines.namespaces[0], sys.executable, "-W", "error", "program.py")
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=patiently(120)
    )
    assert done.returncode == 0, done.stderr
    assert "DELETE /v1/tenants/acme" in done.stdout
    for shown in ("web running", ann.name, "'default': 'member'", "b'hello", "143", "Network backend done"):
        assert shown in done.stdout, done.stdout
    with pytest.raises(NotFound):
        machines.operator.tenants.get("acme")
