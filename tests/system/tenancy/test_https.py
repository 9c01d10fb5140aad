"""HTTPS: members on other machines, and strangers who try what they can at the gate.

The daemon listens in its own network namespace; the other machines are the outside of it, behind a link.
"""

from __future__ import annotations

import json
import os
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import pytest

from insula.api.patience import HEAD
from insula.api.tls.certificates import CertificateAuthority, Certificates
from insula.api.tls.gate import HANDSHAKE, HANDSHAKES
from insula.api.tls.record import ClientRecord
from insula.client import Client
from insula.client.https import HttpsRemote
from insula.kernel.netns import call_in
from insula.model.errors import Denied, Unauthenticated, Unavailable
from tests.support.daemon import Daemon
from tests.support.machine import Namespaces
from tests.support.wait import patiently, until
from tests.system.tenancy.conftest import People, Person

T = TypeVar("T")
GATE_USER = 61007
ADDRESS, ADDRESS6, PORT = "198.18.0.2", "2001:2:0:ffff::2", 7443
API = f'[api]\nlisten = ["0.0.0.0:{PORT}", "[::]:{PORT}"]\nnames = ["{ADDRESS}"]\nuser = "{GATE_USER}"\n'


@pytest.fixture(scope="module")
def served(run_: Any) -> Iterator[Daemon]:
    """A daemon with HTTPS, whose directories the gate can enter."""
    daemon = Daemon(run_)
    mode = daemon.path.parent.stat().st_mode & 0o7777
    for path in (daemon.path.parent, daemon.path):
        path.chmod(0o711)
    try:
        daemon.configure(API)
        daemon.start()
        until(lambda: gates(daemon) != [], "the gate runs")
        until(lambda: handshake(daemon) is None, "it answers")
        yield daemon
    finally:
        daemon.remove()
        daemon.path.parent.chmod(mode)


def there(daemon: Daemon, function: Callable[[], T]) -> T:
    """Call a function on the other machine: in its network namespace."""
    fd = os.open(daemon.namespaces.outside, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return call_in(fd, function)
    finally:
        os.close(fd)


def shakes(daemon: Daemon, address: str) -> bool:
    """Whether a handshake with this address of the host succeeds within less time than a silent one may take."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=authority(daemon))
    try:
        with socket.create_connection((address, PORT), HANDSHAKE / 2) as sock:
            context.wrap_socket(sock, server_hostname=ADDRESS).close()
    except OSError:
        return False
    return True


def dial() -> socket.socket:
    return socket.create_connection((ADDRESS, PORT), patiently(10))


def gates(daemon: Daemon) -> list[int]:
    """The PIDs of this daemon's gates."""
    own = daemon.pid("insulad")
    listed = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(own)], capture_output=True, text=True).stdout
    return [int(line.split()[0]) for line in listed.splitlines() if "insula.api.tls.gate" in line]


def authority(daemon: Daemon) -> str:
    return Certificates(daemon.root / "pki").trusted("server").decode()


def handshake(daemon: Daemon, context: ssl.SSLContext | None = None, send: bytes = b"") -> str | None:
    """Connect from the outside; None if TLS answers, else the error. `send` is sent instead of a handshake."""
    if context is None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cadata=authority(daemon))
    try:
        with there(daemon, dial) as sock:
            if send:
                sock.sendall(send)
                return sock.recv(100).decode("latin-1")
            with context.wrap_socket(sock, server_hostname=ADDRESS) as secure:
                secure.sendall(b"GET /v1/whoami HTTP/1.1\r\nhost: x\r\n\r\n")
                return None if secure.recv(12).startswith(b"HTTP/1.1") else "no answer"
    except OSError as error:
        return str(error) or type(error).__name__


@pytest.fixture(scope="module")
def people(served: Daemon, tmp_path_factory: pytest.TempPathFactory) -> People:
    return People(served, tmp_path_factory.mktemp("tokens"))


@pytest.fixture(scope="module")
def ann(people: People) -> Person:
    return people.person("member", "default")


class Machine:
    """Another machine with a home directory, on which nothing of Insula is but the command line."""

    def __init__(self, daemon: Daemon, home: Path) -> None:
        self.daemon = daemon
        self.environment = {"PATH": os.environ["PATH"], "HOME": str(home), "INSULA_TENANT": "default"}
        self.environment["INSULA_RUN"] = str(home / "no daemon runs here")

    def run(self, *words: str, stdin: str = "", **more: str) -> subprocess.CompletedProcess[str]:
        command = Namespaces.wrap(self.daemon.namespaces.outside, *self.daemon.cli.command(*words))
        environment = {**self.environment, **more}
        return subprocess.run(
            command, env=environment, input=stdin, capture_output=True, text=True, timeout=patiently(60)
        )

    def ok(self, *words: str, stdin: str = "") -> str:
        result = self.run(*words, stdin=stdin)
        assert result.returncode == 0, result
        return result.stdout.strip()


@pytest.fixture
def machine(served: Daemon, tmp_path: Path) -> Machine:
    return Machine(served, tmp_path)


@pytest.fixture
def joined(machine: Machine, served: Daemon, ann: Person) -> Machine:
    machine.ok("remote", "add", "lab", stdin=served.cli.ok("remote", "invite", ann.name) + "\n")
    return machine


def test_a_member_works_from_another_machine(joined: Machine, ann: Person) -> None:
    assert joined.ok("whoami").startswith(f"{ann.name}, by token")
    assert joined.ok("run", "--rm", "busybox", "echo", "from afar") == "from afar"
    joined.ok("run", "-d", "--name", "far", "busybox", "sh", "-c", "echo hello; exec sleep 600")
    assert joined.ok("exec", "-i", "far", "wc", "-c", stdin="x" * 300_000) == "300000"
    big = joined.run("exec", "far", "head", "-c", "2000000", "/dev/zero")
    assert len(big.stdout) == 2_000_000
    until(lambda: joined.ok("logs", "far") == "hello", "its log has it")
    joined.ok("cp", "far:/etc/hostname", str(Path(joined.environment["HOME"]) / "copied"))
    assert (Path(joined.environment["HOME"]) / "copied").read_text().strip() == "far"
    assert joined.run("exec", "far", "sh", "-c", "exit 7").returncode == 7
    joined.ok("rm", "-f", "far")


def test_it_keeps_its_token_for_itself(joined: Machine) -> None:
    files = list(Path(joined.environment["HOME"]).rglob("*.json"))
    assert [file.stat().st_mode & 0o777 for file in files] == [0o600]
    files[0].chmod(0o644)
    refused = joined.run("ps")
    assert refused.returncode == 1 and "chmod 600" in refused.stderr


def test_an_invitation_is_good_once(machine: Machine, served: Daemon, ann: Person, people: People) -> None:
    word = served.cli.ok("remote", "invite", ann.name)
    assert machine.ok("remote", "add", "lab", stdin=f"{word}\n")
    again = machine.run("remote", "add", "lab2", stdin=f"{word}\n")
    assert again.returncode == 1 and "the token is not valid" in again.stderr
    invited = people.operator.identities.invite(ann.name)["token"]
    client = people.client(invited)
    with pytest.raises(Denied):
        client.identities.whoami()  # an invitation is no token for anything else
    assert client.identities.join()["token"] != invited


@pytest.mark.parametrize("word", ["", "insula-join:", "insula-join:e30=", "x", "insula-join:****"])
def test_what_is_no_invitation(word: str, machine: Machine) -> None:
    refused = machine.run("remote", "add", "lab", stdin=f"{word}\n")
    assert refused.returncode == 1 and "this is no invitation" in refused.stderr


def test_remotes_are_chosen(joined: Machine) -> None:
    assert "lab" in joined.ok("remote", "ls")
    assert joined.ok("remote", "use", "local") == "local"
    assert joined.run("whoami").returncode == 1, "there is no daemon on that machine"
    assert joined.ok("--remote", "lab", "whoami")
    assert joined.run("whoami", INSULA_REMOTE="lab").returncode == 0
    assert joined.run("--remote", "nowhere", "ps").returncode == 1
    assert joined.ok("remote", "rm", "lab") == "lab"
    assert joined.run("--remote", "lab", "whoami").returncode == 1


def https(daemon: Daemon, **proof: Any) -> Client:
    return Client(remote=HttpsRemote([f"{ADDRESS}:{PORT}"], authority(daemon), **proof), timeout=60)


def test_a_certificate_proves_who_somebody_is(served: Daemon, people: People, ann: Person, tmp_path: Path) -> None:
    made = people.operator.identities.create_certificate(ann.name)
    file = tmp_path / "ann.pem"
    file.write_text(made["pem"])
    by_certificate = https(served, certificate=str(file)).identities
    by_token = https(served, certificate=str(file), token=ann.secret).identities
    sender = there(served, by_certificate.whoami)
    assert (sender["user"], sender["tenants"]) == (ann.name, {"default": "member"})
    assert sender["proof"] == f"certificate {made['serial']}"
    assert there(served, by_token.whoami)["proof"].startswith("token")
    people.operator.identities.revoke_certificate(made["serial"])
    with pytest.raises(Unauthenticated):
        there(served, by_certificate.whoami)


def test_without_a_proof_nobody_comes_in(served: Daemon) -> None:
    """Root of another machine is no operator, nor are those who know the address."""
    with pytest.raises(Unauthenticated, match="no proof"):
        there(served, https(served).identities.whoami)


def stranger(tmp_path: Path) -> tuple[CertificateAuthority, Path]:
    """Another authority of clients, and a certificate of it."""
    foreign = Certificates(tmp_path / "foreign")
    file = tmp_path / "foreign.pem"
    file.write_bytes(foreign.client(7, timedelta(days=1)))
    return foreign.authority("server"), file


def test_certificates_of_others(served: Daemon, tmp_path: Path) -> None:
    """A foreign client is refused in the handshake, a server's certificate is no client's, and a client refuses a
    server of another authority."""
    foreign, client = stranger(tmp_path)
    own = Certificates(served.root / "pki").server([ADDRESS])
    for file in (client, own):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cadata=authority(served))
        context.load_cert_chain(file)
        assert handshake(served, context) is not None
    wrong = Client(remote=HttpsRemote([f"{ADDRESS}:{PORT}"], foreign.pem.decode()))
    with pytest.raises(Denied, match="not the server that you were invited to"):
        there(served, wrong.identities.whoami)
    assert handshake(served) is None, "the positive control"


def test_older_tls_and_no_tls(served: Daemon) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=authority(served))
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    assert handshake(served, context) is not None
    answer = handshake(served, send=b"GET /v1/whoami HTTP/1.1\r\nhost: x\r\n\r\n")
    assert answer is None or "HTTP/1.1 200" not in answer


def test_handshakes_that_fail_are_in_the_audit_log(served: Daemon) -> None:
    """From an address of IPv6: that of IPv4 has failed so often in these tests that it is counted."""

    def strange() -> None:
        with socket.create_connection((ADDRESS6, PORT), patiently(10)) as sock:
            sock.sendall(b"\0" * 64)
            sock.recv(100)

    there(served, strange)

    def told() -> bool:
        found = [e for e in audit(served) if e.get("verb") == "TLS handshake"]
        return any(e["address"] == "2001:2:0:ffff::1" and e["status"] == 401 for e in found)

    until(told, "the audit log has it, with the address")


def audit(daemon: Daemon) -> list[dict[str, Any]]:
    return [json.loads(line) for line in daemon.cli.ok("--json", "audit").splitlines()]


def test_requests_are_in_the_audit_log_with_their_address(joined: Machine, served: Daemon, ann: Person) -> None:
    joined.ok("run", "--rm", "--name", "noted", "busybox", "true")
    entry = next(each for each in reversed(audit(served)) if each["name"] == "noted")
    assert (entry["user"], entry["address"], entry["uid"]) == (ann.name, "198.18.0.1", None)
    assert entry["proof"].startswith("token ")


def test_the_gate_has_no_rights(served: Daemon) -> None:
    (pid,) = gates(served)
    status = Path(f"/proc/{pid}/status").read_text()
    assert f"Uid:\t{GATE_USER}\t{GATE_USER}\t{GATE_USER}\t{GATE_USER}" in status
    assert "Groups:\t \n" in status and "NoNewPrivs:\t1" in status
    assert "CapEff:\t0000000000000000" in status and "CapPrm:\t0000000000000000" in status
    open_files = {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}
    assert not {file for file in open_files if "pki" in file or "memfd" in file}, "the key is in its memory only"


def test_only_the_gate_may_say_who_is_there(served: Daemon, people: People, ann: Person, tmp_path: Path) -> None:
    """The record is taken from the gate's user alone, on its own socket; sent by a client it is no HTTP."""
    made = people.operator.identities.create_certificate(ann.name)
    (tmp_path / "ann.pem").write_text(made["pem"])
    der = ssl.PEM_cert_to_DER_cert(made["pem"][made["pem"].index("-----BEGIN CERTIFICATE") :])
    forged = ClientRecord("192.0.2.1", 1, "TLSv1.3", der).encode()
    request = b"GET /v1/whoami HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    for path in ("gate.sock", "users.sock", "insulad.sock"):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(patiently(20))
            sock.connect(str(served.run / path))
            try:
                sock.sendall(forged + request)
                answer = sock.recv(4096)
            except OSError:
                answer = b""
        assert b"200 OK" not in answer and ann.name.encode() not in answer, path
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=authority(served))
    with there(served, dial) as plain, context.wrap_socket(plain, server_hostname=ADDRESS) as secure:
        secure.sendall(forged + request)
        assert b"200 OK" not in secure.recv(4096)
    as_gate = f"""
import socket, sys
sock = socket.socket(socket.AF_UNIX); sock.connect({str(served.run / "gate.sock")!r})
sock.sendall({forged!r} + {request!r}); print(sock.makefile("rb").read())
"""
    control = subprocess.run(
        [sys.executable, "-c", as_gate], user=GATE_USER, group=GATE_USER, capture_output=True, text=True
    )
    assert ann.name in control.stdout, "the positive control: the gate's user"


def test_the_gate_starts_again_when_it_is_killed(served: Daemon) -> None:
    (pid,) = gates(served)
    os.kill(pid, 9)
    until(lambda: gates(served) not in ([], [pid]) and handshake(served) is None, "another one answers")
    assert served.pid("insulad")


def test_connections_that_say_nothing_do_not_keep_others_out(served: Daemon) -> None:
    """More than all handshakes that may be going on, from one address; another address is served meanwhile."""
    held: list[socket.socket] = []
    try:
        held = there(served, lambda: [dial() for _ in range(2 * HANDSHAKES)])
        assert there(served, lambda: shakes(served, ADDRESS6)), "another address, at once"
        assert not there(served, lambda: shakes(served, ADDRESS)), "the control: this one has its share"
    finally:
        for sock in held:
            sock.close()


def test_connections_on_which_no_request_comes_are_closed(served: Daemon) -> None:
    """Silent ones after their handshake, and one whose head grows for ever; others are served meanwhile."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=authority(served))
    with ExitStack() as stack:
        silent, slow = (
            stack.enter_context(context.wrap_socket(stack.enter_context(there(served, dial)), server_hostname=ADDRESS))
            for _ in range(2)
        )
        slow.sendall(b"GET /v1/whoami HTTP/1.1\r\n")
        ended = False

        def closed() -> bool:
            nonlocal ended
            if not ended:
                try:
                    slow.sendall(b"x-a: b\r\n")
                except OSError:
                    ended = True
            return ended

        until(closed, "the slow one is closed", timeout=2 * HEAD)
        silent.settimeout(patiently(HEAD))
        assert silent.recv(1) == b""
        assert handshake(served) is None, "the control"


def test_it_ends_with_insulad(served: Daemon) -> None:
    (pid,) = gates(served)
    served.kill("insulad")
    served.reap()
    until(lambda: not Path(f"/proc/{pid}").exists(), "the gate has ended")
    served.start()
    until(lambda: handshake(served) is None, "HTTPS is there again")


def test_a_user_that_does_not_exist_is_a_problem_and_no_end(unstarted: Daemon) -> None:
    unstarted.configure(API.replace(str(GATE_USER), "no-such-user"))
    unstarted.start()
    problems = unstarted.cli.json("status")["problems"]
    assert any("no-such-user" in problem for problem in problems), problems
    client = Client(remote=HttpsRemote([f"{ADDRESS}:{PORT}"], authority(unstarted)))
    with pytest.raises(Unavailable):
        there(unstarted, client.identities.whoami)
    assert unstarted.cli.ok("ps") is not None, "the sockets serve"


def remote_file(machine: Machine) -> Path:
    return Path(machine.environment["HOME"]) / ".config/insula/remotes/lab.json"


def pinned(machine: Machine) -> int:
    """How many authorities the machine trusts."""
    return int(json.loads(remote_file(machine).read_text())["authority"].count("BEGIN CERTIFICATE"))


@contextmanager
def asking(machine: Machine) -> Iterator[list[int]]:
    """Requests one after the other meanwhile; yields their exit statuses, complete at the end."""
    statuses: list[int] = []
    over = threading.Event()

    def run() -> None:
        while not over.is_set():
            statuses.append(machine.run("whoami").returncode)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        until(lambda: statuses != [], "the first request is answered")
        yield statuses
        asked = len(statuses)
        until(lambda: len(statuses) > asked + 1, "one began afterwards and is answered")
    finally:
        over.set()
        thread.join()


def test_the_servers_authority_is_rotated_and_no_request_fails(joined: Machine, served: Daemon, tmp_path: Path) -> None:
    (gate,) = gates(served)
    with asking(joined) as statuses:
        assert served.cli.ok("certificate", "rotate", "server").strip() == "server"
    assert set(statuses) == {0}
    assert gates(served) == [gate], "the server's certificate is still signed by the authority that everybody knows"
    refused = served.cli.run("certificate", "rotate", "server")
    assert refused.status == 1 and "is being rotated already" in refused.err
    assert joined.ok("whoami") and pinned(joined) == 1
    file = remote_file(joined)
    file.write_text(json.dumps({**json.loads(file.read_text()), "checked": 0.0}))  # as if a day had passed
    assert joined.ok("whoami") and pinned(joined) == 2 and file.stat().st_mode & 0o777 == 0o600

    (tmp_path / "other").mkdir()
    old = Machine(served, tmp_path / "other")  # that has not learned of the new one
    old.environment["XDG_CONFIG_HOME"] = str(tmp_path / "other")
    (tmp_path / "other/insula/remotes").mkdir(parents=True)
    kept = json.loads(file.read_text())
    newest, end, before = kept["authority"].partition("-----END CERTIFICATE-----\n")
    copy = tmp_path / "other/insula/remotes/lab.json"
    copy.write_text(json.dumps({**kept, "authority": before}))
    copy.chmod(0o600)
    assert old.ok("--remote", "lab", "whoami"), "the positive control"
    (served.root / "pki" / "server-ca.old.pem").unlink()  # as if the overlap were over
    file.write_text(json.dumps({**kept, "authority": newest + end}))
    served.stop()
    served.start()
    until(lambda: joined.run("whoami").returncode == 0, "who has the new one, trusts the server")
    refused_old = old.run("--remote", "lab", "whoami")
    assert refused_old.returncode == 1 and "not the server that you were invited to" in refused_old.stderr


def test_the_authority_of_clients_is_rotated(served: Daemon, people: People, ann: Person, tmp_path: Path) -> None:
    def certificate(name: str) -> Client:
        (tmp_path / name).write_text(people.operator.identities.create_certificate(ann.name)["pem"])
        return https(served, certificate=str(tmp_path / name))

    def user(client: Client) -> str | None:
        try:
            return str(there(served, client.identities.whoami)["user"])
        except (OSError, Unavailable, Denied):
            return None

    before = certificate("before.pem")
    assert user(before) == ann.name
    people.operator.identities.rotate_authority("client")
    after = certificate("after.pem")
    until(lambda: user(after) == ann.name, "the gate trusts the new one")
    assert user(before) == ann.name, "and the old one"
    followed = there(served, lambda: before.host.events())
    people.operator.identities.rotate_authority("client", now=True)
    with pytest.raises((Unavailable, OSError)):
        for _ in followed:
            pass
    until(lambda: handshake(served) is None, "the next gate answers")
    assert user(before) is user(after) is None
    assert user(certificate("newest.pem")) == ann.name, "the positive control"


def test_members_rotate_nothing(joined: Machine) -> None:
    refused = joined.run("certificate", "rotate", "client", "--now")
    assert refused.returncode == 1 and "host.certificates" in refused.stderr
