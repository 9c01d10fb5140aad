"""Members of two tenants on two machines, by TLS with the command line and the SDK, beside the operator on the host.

Each machine is a network namespace with a link to the host. What ends when a right is taken ends there, too.
"""

from __future__ import annotations

import json
import os
import socket
import ssl
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple, TypeVar

import pytest

from insula.api.tls.certificates import Certificates
from insula.api.tls.gate import OF_ADDRESS
from insula.cli.verbs.remote import encode
from insula.client import Client
from insula.client.https import HttpsRemote, certificates
from insula.kernel.netns import call_in
from insula.model.errors import Denied, InsulaError, NotFound, Unauthenticated
from tests.support.daemon import Daemon
from tests.support.machine import Namespaces, Run
from tests.support.wait import patiently, until
from tests.system.tenancy.conftest import People

T = TypeVar("T")
GATE_USER, PORT = 61031, 7443
HOSTS = ("198.18.0.2", "198.19.0.2")
NAME, HOST6 = "cloud.test", "2001:2:0:ffff::2"
MACHINES = ("198.18.0.1", "198.19.0.1")
LOOP = "while :; do echo tick; sleep 0.2; done"


def settings(*names: str) -> str:
    listed = json.dumps(names)
    return f'[api]\nlisten = ["0.0.0.0:{PORT}", "[::]:{PORT}"]\nnames = {listed}\nuser = "{GATE_USER}"\n'


class Machine:
    """A machine of a tenant's member: a network namespace and a home. `host` is the daemon's address for it."""

    def __init__(self, daemon: Daemon, namespace: str, host: str, tenant: str, home: Path) -> None:
        self.daemon, self.namespace, self.host, self.tenant = daemon, namespace, host, tenant
        self.environment = {"PATH": os.environ["PATH"], "HOME": str(home), "INSULA_TENANT": tenant}
        self.environment["INSULA_RUN"] = str(home / "no daemon runs here")

    def command(self, *words: str) -> list[str]:
        return Namespaces.wrap(self.namespace, *self.daemon.cli.command(*words))

    def run(self, *words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*words),
            env=self.environment,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=patiently(60),
        )

    def ok(self, *words: str, stdin: str = "") -> str:
        result = self.run(*words, stdin=stdin)
        assert result.returncode == 0, result
        return result.stdout.strip()

    def start(self, *words: str) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        return subprocess.Popen(self.command(*words), env=self.environment, stdout=pipe, stderr=pipe, text=True)

    def there(self, function: Callable[[], T]) -> T:
        fd = os.open(self.namespace, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return call_in(fd, function)
        finally:
            os.close(fd)

    def sdk(self, host: str | None = None, authority: str | None = None, **proof: str) -> Client:
        pem = authority or Certificates(self.daemon.root / "pki").trusted("server").decode()
        remote = HttpsRemote([f"{host or self.host}:{PORT}"], pem, **proof)
        return Client(remote=remote, timeout=patiently(60))

    def kept_token(self) -> str:
        file = Path(self.environment["HOME"]) / ".config/insula/remotes/lab.json"
        return str(json.loads(file.read_text())["token"])


class World(NamedTuple):
    daemon: Daemon
    operator: Client
    people: People
    acme: Machine
    globex: Machine

    def join(self, machine: Machine, user: str, ttl: str = "30d") -> None:
        machine.run("remote", "rm", "lab")
        machine.ok("remote", "add", "lab", stdin=self.invitation(machine, user, ttl))

    def invitation(self, machine: Machine, user: str, ttl: str = "30d") -> str:
        """An invitation with the address by which this machine reaches the host."""
        invitation = json.loads(self.daemon.cli.ok("--json", "remote", "invite", user, "--ttl", ttl))
        return encode({**invitation, "addresses": [f"{machine.host}:{PORT}"]}) + "\n"


@pytest.fixture(scope="module")
def world(run_: Run, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    daemon = Daemon(run_)
    mode = daemon.path.parent.stat().st_mode & 0o7777
    for path in (daemon.path.parent, daemon.path):
        path.chmod(0o711)
    second = Namespaces._hold()
    try:
        namespaces, there = daemon.namespaces, f"/proc/{second.pid}/ns/net"
        namespaces.ip(namespaces.host, f"link add uplink1 type veth peer name host0 netns {second.pid}")
        for namespace, device, address in ((namespaces.host, "uplink1", HOSTS[1]), (there, "host0", MACHINES[1])):
            namespaces.ip(namespace, f"link set {device} up")
            namespaces.ip(namespace, f"address add {address}/24 dev {device}")
        daemon.configure(settings(*HOSTS, NAME, HOST6))
        daemon.start()
        operator = Client(str(daemon.run / "insulad.sock"), timeout=patiently(60))
        machines = []
        for tenant, namespace, host in (("acme", namespaces.outside, HOSTS[0]), ("globex", there, HOSTS[1])):
            operator.tenants.create(tenant)
            operator.networks.create(tenant, "default", "10.0.0.0/24")
            machines.append(Machine(daemon, namespace, host, tenant, tmp_path_factory.mktemp(tenant)))
        people = People(daemon, tmp_path_factory.mktemp("tokens"))
        world = World(daemon, operator, people, *machines)
        until(lambda: shakes(world.acme) and shakes(world.globex), "it answers on both", 30)
        for machine in machines:
            operator.identities.create_user(f"of-{machine.tenant}")
            operator.identities.bind(f"of-{machine.tenant}", "member", machine.tenant)
            world.join(machine, f"of-{machine.tenant}")
        yield world
    finally:
        daemon.remove()
        daemon.path.parent.chmod(mode)
        with second:
            second.kill()


def shakes(machine: Machine, host: str | None = None, name: str | None = None, authority: str | None = None) -> bool:
    """Whether the server proves itself by this name at this address of it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    pem = authority or Certificates(machine.daemon.root / "pki").trusted("server").decode()
    context.load_verify_locations(cadata=pem)

    def shake() -> bool:
        try:
            with socket.create_connection((host or machine.host, PORT), patiently(10)) as sock:
                context.wrap_socket(sock, server_hostname=name or host or machine.host).close()
        except OSError:
            return False
        return True

    return machine.there(shake)


# -- at work -------------------------------------------------------------------------------------------------------


def work(machine: Machine, other: Machine) -> None:
    """What a member does, by the command line and by the SDK; nothing of the other tenant is there."""
    machine.ok("run", "-d", "--name", "web", "busybox", "sh", "-c", f"echo of {machine.tenant}; exec sleep 600")
    until(lambda: machine.ok("logs", "web") == f"of {machine.tenant}", "its log has it")
    assert machine.ok("exec", "web", "echo", "hi") == "hi"
    assert machine.ok("whoami").startswith(f"of-{machine.tenant}, by token")
    client = machine.sdk(token=machine.kept_token())
    assert machine.there(lambda: [view["instance"]["tenant"] for view in client.instances.list()]) == [machine.tenant]
    assert machine.there(lambda: [view["tenant"]["name"] for view in client.tenants.list()]) == [machine.tenant]
    made = machine.there(lambda: client.instances.run(machine.tenant, "busybox", ["true"], name="by-sdk"))
    assert made["instance"]["name"] == "by-sdk" and "host" not in made["instance"]
    assert machine.there(lambda: client.instances.wait(machine.tenant, "by-sdk"))["exit_status"] == 0
    with pytest.raises(NotFound, match=f"there is no tenant {other.tenant}"):
        machine.there(lambda: client.instances.list(other.tenant))
    assert f"there is no tenant {other.tenant}" in machine.run("-T", other.tenant, "ps").stderr


def test_two_members_and_the_operator_at_once(world: World) -> None:
    with ThreadPoolExecutor(2) as pool:
        for each in [pool.submit(work, world.acme, world.globex), pool.submit(work, world.globex, world.acme)]:
            each.result()
    assert [view["instance"]["tenant"] for view in world.operator.instances.list()] == ["acme"] * 2 + ["globex"] * 2
    lines = [entry for entry in world.operator.host.audit() if entry["name"] == "by-sdk"]
    came = {(entry["user"], entry["tenant"], entry["address"]) for entry in lines}
    assert came == {("of-acme", "acme", MACHINES[0]), ("of-globex", "globex", MACHINES[1])}


@pytest.mark.parametrize("stream", ["logs -f", "exec"])
def test_what_runs_by_a_token_ends_with_it(stream: str, world: World) -> None:
    """On the machine of its owner; that of the other machine goes on."""
    name = f"ticking-{stream[:4]}"
    for machine in (world.acme, world.globex):
        machine.ok("run", "-d", "--name", name, "busybox", "sh", "-c", LOOP)
    words = ("logs", "-f", name) if stream == "logs -f" else ("exec", name, "sh", "-c", LOOP, "by-exec")
    with world.acme.start(*words) as ended, world.globex.start(*words) as control:
        for each in (ended, control):
            assert each.stdout and each.stdout.readline() == "tick\n"
        world.operator.identities.revoke_token(world.acme.kept_token().split("_")[1])
        _, error = ended.communicate(timeout=patiently(60))
        assert ended.returncode != 0 and "not valid any more" in error, error
        assert control.poll() is None and control.stdout and control.stdout.readline() == "tick\n"
        control.kill()
        control.communicate()
    refused = world.acme.run("ps")
    assert refused.returncode == 1 and "the token is not valid" in refused.stderr
    tops = {tenant: world.daemon.cli.of(tenant).ok("top", name) for tenant in ("acme", "globex")}
    assert "by-exec" not in tops["acme"] and LOOP in tops["acme"], "the process of the exec ended, and it alone"
    world.join(world.acme, "of-acme")
    for machine in (world.acme, world.globex):
        machine.ok("rm", "-f", name)


# -- certificates ----------------------------------------------------------------------------------------------------


def by_certificate(world: World, directory: Path, by: Client | None = None, ttl: float = 86400.0) -> tuple[Client, str]:
    """A client with a new certificate of the member, which `by` makes (None: the operator), and its serial number."""
    if by is None:
        made = world.operator.identities.create_certificate("of-acme", ttl=ttl)
    else:
        made = world.acme.there(lambda: by.identities.create_certificate(ttl=ttl))
    file = directory / f"{made['serial']}.pem"
    file.touch(mode=0o600)
    file.write_text(made["pem"])
    return world.acme.sdk(certificate=str(file)), made["serial"]


def test_a_certificate_is_renewed_by_itself(world: World, tmp_path: Path) -> None:
    """Whoever has one can make the next one before it ends, and revoke the one before."""
    first, serial = by_certificate(world, tmp_path)
    second, newer = by_certificate(world, tmp_path, by=first)
    assert newer != serial
    world.acme.there(lambda: second.identities.revoke_certificate(serial))
    with pytest.raises(Unauthenticated):
        world.acme.there(first.identities.whoami)
    assert world.acme.there(second.identities.whoami)["user"] == "of-acme"
    with pytest.raises(Denied):  # for oneself alone
        world.acme.there(lambda: second.identities.create_certificate("of-globex"))
    with pytest.raises(InsulaError, match="7776000"):
        world.acme.there(lambda: second.identities.create_certificate(ttl=91 * 86400))


def test_the_command_line_uses_a_certificate(world: World, tmp_path: Path) -> None:
    machine, file = world.acme, tmp_path / "own.pem"
    file.touch(mode=0o600)
    file.write_text(world.operator.identities.create_certificate("of-acme")["pem"])

    def add() -> subprocess.CompletedProcess[str]:
        return machine.run("remote", "add", "lab", "--certificate", str(file), stdin=world.invitation(machine, "x"))

    world.operator.identities.create_user("x")
    machine.ok("remote", "rm", "lab")
    try:
        assert add().stdout.startswith("lab: of-acme at "), "the certificate counts, and not the invitation"
        assert ", by certificate " in machine.ok("whoami") and machine.ok("ps") is not None
        renewed = machine.ok("certificate", "create")
        assert renewed.startswith("-----BEGIN PRIVATE KEY-----")
        machine.ok("remote", "rm", "lab")
        for mode, content, reason in ((0o644, renewed, "chmod 600"), (0o600, "x", "no key with its certificate")):
            file.write_text(content)
            file.chmod(mode)
            refused = add()
            assert refused.returncode == 1 and reason in refused.stderr and refused.stderr.count("\n") == 1
        assert machine.run("--remote", "lab", "ps").returncode == 1, "nothing is kept of what was refused"
    finally:
        world.operator.identities.remove_user("x")
        world.join(machine, "of-acme")


def test_the_end_of_a_token_is_announced(world: World) -> None:
    """Seven days before, once a day."""
    for ttl, warned in (("8d", False), ("6d", True)):
        world.join(world.acme, "of-acme", ttl)
        first, second = world.acme.run("ps"), world.acme.run("ps")
        assert first.returncode == second.returncode == 0
        assert ("warning: your access to lab ends on " in first.stderr) == warned, first
        assert second.stderr == ""
        assert "until 2" in world.acme.ok("whoami")
    world.join(world.acme, "of-acme")


@pytest.mark.parametrize("way", ["revoked", "expired"])
def test_a_stream_ends_with_its_certificate(way: str, world: World, tmp_path: Path) -> None:
    client, serial = by_certificate(world, tmp_path, ttl=patiently(1) if way == "expired" else 86400.0)
    control, _ = by_certificate(world, tmp_path)
    followed, going_on = (world.acme.there(each.host.events) for each in (client, control))

    def next_of(events: Iterator[dict[str, object]]) -> dict[str, object]:
        with ThreadPoolExecutor(1) as pool:  # a stream begins with its first event
            waiting = pool.submit(lambda: world.acme.there(lambda: next(events)))
            for pids in range(1000, 100_000):
                if waiting.done():
                    break
                world.operator.tenants.update("acme", pids=pids)
            return waiting.result()

    assert next_of(followed)["kind"] and next_of(going_on)["kind"]
    if way == "revoked":
        world.operator.identities.revoke_certificate(serial)
    with pytest.raises(Unauthenticated):
        for _ in followed:
            pass
    assert next_of(going_on)["kind"], "the control"
    with pytest.raises((Unauthenticated, InsulaError)):
        world.acme.there(client.identities.whoami)


# -- the server ------------------------------------------------------------------------------------------------------


def test_the_server_proves_itself_by_each_of_its_names(world: World, tmp_path: Path) -> None:
    for host, name in ((HOSTS[0], HOSTS[0]), (HOSTS[0], NAME), (HOST6, HOST6), (HOST6, NAME)):
        assert shakes(world.acme, host, name), (host, name)
    for host, name in ((HOSTS[0], "198.18.0.3"), (HOSTS[0], "other.test"), (HOST6, "2001:2:0:ffff::3")):
        assert not shakes(world.acme, host, name), (host, name)
    strange = world.acme.sdk(authority=Certificates(tmp_path).trusted("server").decode(), token="x")
    with pytest.raises(Denied, match="not the server that you were invited to: its authority is SHA256") as refused:
        world.acme.there(strange.identities.whoami)
    for directory in (tmp_path, world.daemon.root / "pki"):
        (named,) = certificates(Certificates(directory).trusted("server").decode())
        assert named in str(refused.value), "both fingerprints"
    other = world.acme.sdk("198.18.0.3", token="x")
    world.daemon.namespaces.ip(world.daemon.namespaces.host, "address add 198.18.0.3/24 dev uplink0")
    with pytest.raises(Denied, match=r"not valid for '198\.18\.0\.3'|IP address mismatch"):
        world.acme.there(other.identities.whoami)
    by_ipv6 = world.acme.sdk(f"[{HOST6}]", token=world.acme.kept_token())
    assert world.acme.there(by_ipv6.identities.whoami)["user"] == "of-acme"


def test_another_address_takes_another_certificate_of_the_same_authority(world: World) -> None:
    """Clients go on with the authority that they have pinned."""
    before = Certificates(world.daemon.root / "pki").trusted("server").decode()
    assert not shakes(world.acme, name="moved.test")
    world.daemon.configure(settings(*HOSTS, NAME, HOST6, "moved.test"))
    world.daemon.stop()
    world.daemon.start()
    until(lambda: shakes(world.acme, name="moved.test", authority=before), "the new name is proved")
    assert world.acme.ok("whoami").startswith("of-acme")


def test_one_address_does_not_take_all_connections(world: World) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=Certificates(world.daemon.root / "pki").trusted("server").decode())
    request = b"GET /v1/login HTTP/1.1\r\nhost: x\r\n\r\n"

    def connect() -> ssl.SSLSocket:
        plain = socket.create_connection((HOSTS[0], PORT), patiently(10))
        return stack.enter_context(context.wrap_socket(stack.enter_context(plain), server_hostname=HOSTS[0]))

    def holds_all() -> bool:
        """Its connections are the most that it may have: one more is closed in the handshake."""
        try:
            while len(held) < 2 * OF_ADDRESS:
                held.append(world.acme.there(connect))
        except OSError:
            return True
        return False

    with ExitStack() as stack:
        held: list[ssl.SSLSocket] = []
        assert holds_all() and len(held) <= OF_ADDRESS, len(held)
        assert shakes(world.globex), "another machine is served"
        held[-1].sendall(request)
        assert held[-1].recv(12).startswith(b"HTTP/1.1 "), "and those that it has"
    until(lambda: shakes(world.acme), "those that were closed are free again")
