"""Requests by proof: the cost of knowing who sends them, beside dockerd, and what the time of an answer tells."""

from __future__ import annotations

import json
import os
import re
import socket
import ssl
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from joserfc import jwt
from joserfc.jwk import ECKey

from bench.lib import Bench, Measure, Table, interleave
from bench.peers import docker
from insula.api.tls.certificates import Certificates
from insula.client import Client
from insula.kernel.netns import call_in
from tests.support.daemon import Daemon
from tests.support.peers import IMAGE, Missing
from tests.support.wait import until

ADDRESS, PORT, GATE_USER, MEMBER = "198.18.0.2", 7443, 61007, 61008
ISSUER = "http://127.0.0.1:8080"
ROUNDS, REQUESTS = 20, 50
SAMPLES = 4000
HANDSHAKES = 500  # a second, of the flood
SECONDS = 4.0


class Connection:
    """A kept-alive HTTP/1.1 connection: `get` returns the seconds from the request to its whole answer."""

    def __init__(self, sock: socket.socket, *headers: str) -> None:
        self.sock = sock
        self._headers = "".join(f"{header}\r\n" for header in headers)

    def get(self, target: str, status: int = 200) -> float:
        request = f"GET {target} HTTP/1.1\r\nhost: insula\r\n{self._headers}\r\n".encode()
        started = time.perf_counter()
        self.sock.sendall(request)
        answer = self.sock.recv(1 << 16)
        while not _complete(answer):
            piece = self.sock.recv(1 << 16)
            if not piece:
                raise Missing("the connection was closed")
            answer += piece
        seconds = time.perf_counter() - started
        assert answer.startswith(b"HTTP/1.1 %d" % status), answer[:300]
        return seconds

    def each(self, target: str) -> float:
        """The mean of some requests: a pause before a single one costs more than it does."""
        return sum(self.get(target) for _ in range(REQUESTS)) / REQUESTS


def _complete(answer: bytes) -> bool:
    head, end, body = answer.partition(b"\r\n\r\n")
    if not end:
        return False
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
    if fields.get(b"transfer-encoding") == b"chunked":
        return body.endswith(b"0\r\n\r\n")
    return len(body) >= int(fields[b"content-length"])


def measure(bench: Bench) -> list[Table]:
    served = _Served(bench)
    with ExitStack() as stack:
        stack.callback(served.close)
        return [_by_proof(bench, served, stack), _new_connections(bench, served), _flood(served), _oracles(served)]


class _Served:
    """A daemon with HTTPS, and a member of the tenant `acme` with a proof of each kind."""

    def __init__(self, bench: Bench) -> None:
        daemon = self.daemon = bench.daemon
        for path in (daemon.path.parent, daemon.path):  # the gate's user enters them
            path.chmod(0o711)
        daemon.stop()
        api = f'[api]\nlisten = ["0.0.0.0:{PORT}"]\nnames = ["{ADDRESS}"]\nuser = "{GATE_USER}"\n'
        oidc = f'[[oidc]]\nissuer = "{ISSUER}"\nclient_id = "insula"\nallow_loopback = true\n'
        daemon.configure(api + '[quotas]\nrequests = "none"\nuser_requests = "none"\n' + oidc)
        self.key = ECKey.generate_key("P-256", {"kid": "bench", "alg": "ES256", "use": "sig"})
        self.provider = self._publish(bench.scratch / "provider")
        daemon.start()
        operator = Client(str(daemon.run / "insulad.sock"), timeout=60)
        for name in ("acme", "globex"):
            operator.tenants.create(name)
        operator.instances.run("globex", name="there", image="busybox", command=["sleep", "3600"], networks=[])
        operator.instances.run("acme", name="idle", image="busybox", command=["sleep", "3600"], networks=[])
        operator.identities.create_user("member", MEMBER)
        operator.identities.bind("member", "member", "acme")
        self.token = str(operator.identities.create_token("member")["token"])
        operator.identities.create_user("member-oidc", provider="oidc", subject="member")
        operator.identities.bind("member-oidc", "member", "acme")
        self.certificate = bench.scratch / "member.pem"
        self.certificate.write_text(operator.identities.create_certificate("member")["pem"])
        until(lambda: self._answers(), "the gate answers")

    def _publish(self, directory: Path) -> subprocess.Popen[bytes]:
        """Serve the key of a provider of OpenID Connect, as far as insulad asks for it."""
        (directory / ".well-known").mkdir(parents=True)
        metadata = {"issuer": ISSUER, "jwks_uri": f"{ISSUER}/jwks"}
        (directory / ".well-known" / "openid-configuration").write_text(json.dumps(metadata))
        (directory / "jwks").write_text(json.dumps({"keys": [self.key.as_dict(private=False)]}))
        command = ["-m", "http.server", "--bind", "127.0.0.1", "--directory", str(directory), ISSUER.rpartition(":")[2]]
        serving = self.daemon.namespaces.wrap(self.daemon.namespaces.host, sys.executable, *command)
        return subprocess.Popen(serving, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def close(self) -> None:
        self.provider.kill()
        self.provider.wait()

    def id_token(self) -> str:
        """A token as the provider signs them."""
        now = int(time.time())
        claims = {"iss": ISSUER, "aud": "insula", "sub": "member", "iat": now, "exp": now + 3600}
        return jwt.encode({"alg": "ES256", "kid": "bench"}, claims, self.key, algorithms=["ES256"])

    def processor_time(self) -> float:
        """Seconds of the processors that insulad and its gate have used."""
        pid, spent = self.daemon.pid("insulad"), 0
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        gates = [child for child in children if b"tls.gate" in Path(f"/proc/{child}/cmdline").read_bytes()]
        for process in (str(pid), *gates):
            for thread in Path(f"/proc/{process}/task").iterdir():
                spent += int((thread / "schedstat").read_text().split()[0])
        return spent / 1e9

    def _answers(self) -> bool:
        try:
            self.https().close()
        except OSError:
            return False
        return True

    def https(self, *, certificate: bool = False) -> ssl.SSLSocket:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cadata=Certificates(self.daemon.root / "pki").trusted("server").decode())
        if certificate:
            context.load_cert_chain(self.certificate)
        return context.wrap_socket(self._outside(self._dial), server_hostname=ADDRESS)

    def _dial(self) -> socket.socket:
        sock = socket.create_connection((ADDRESS, PORT), 10)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def _outside(self, function: Callable[[], socket.socket]) -> socket.socket:
        fd = os.open(self.daemon.namespaces.outside, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return call_in(fd, function)
        finally:
            os.close(fd)

    def unix(self, name: str, uid: int = 0) -> socket.socket:
        """A connection to a socket of the daemon, as a user of this host (SO_PEERCRED is taken at connect)."""
        sock = socket.socket(socket.AF_UNIX)
        os.seteuid(uid)
        try:
            sock.connect(str(self.daemon.run / name))
        finally:
            os.seteuid(0)
        return sock

    def connections(self) -> dict[str, Connection]:
        bearer, signed = (f"authorization: Bearer {token}" for token in (self.token, self.id_token()))
        return {
            "the operator's socket": Connection(self.unix("insulad.sock")),
            "the users' socket, by user ID": Connection(self.unix("users.sock", MEMBER)),
            "the users' socket, by token": Connection(self.unix("users.sock", MEMBER), bearer),
            "the users' socket, by a provider's token": Connection(self.unix("users.sock", MEMBER), signed),
            "HTTPS, by token": Connection(self.https(), bearer),
            "HTTPS, by a provider's token": Connection(self.https(), signed),
            "HTTPS, by certificate": Connection(self.https(certificate=True)),
        }


def _by_proof(bench: Bench, served: _Served, stack: ExitStack) -> Table:
    connections = served.connections()
    who: dict[str, Measure] = {name: partial(c.each, "/v1/whoami") for name, c in connections.items()}
    listing: dict[str, Measure] = {
        name: partial(c.each, "/v1/tenants/acme/instances") for name, c in connections.items()
    }
    missing: dict[str, str] = {}
    cost = _cost(served, connections, bench.rounds(ROUNDS))
    try:
        peer = docker(bench)
        stack.callback(peer.close)
        peer.seconds("run", "-d", "--name", "idle", "--network=none", IMAGE, "sleep", "3600")
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(peer.engine.environment["DOCKER_HOST"].removeprefix("unix://"))
        listing["dockerd, GET /containers/json"] = partial(Connection(sock).each, "/containers/json")
        who["dockerd, GET /_ping"] = partial(Connection(sock).each, "/_ping")
    except (Missing, OSError, AssertionError) as problem:
        missing["dockerd"] = " ".join(str(problem).split())[:300]
    table = Table(
        "A request, by proof",
        ["proof", "whoami, ms", "list one instance, ms", "+ ms", "a second", "CPU ms", "+ CPU ms"],
    )
    (first, dropped), (second, more) = (interleave(each, bench.rounds(ROUNDS)) for each in (who, listing))
    base, least = statistics.median(second["the operator's socket"]), cost["the operator's socket"]
    for (name, values), listed in zip(first.items(), second.items(), strict=True):
        median, lists = statistics.median(values), statistics.median(listed[1])
        label = name if name == listed[0] else f"{name}; {listed[0].partition(', ')[2]}"
        cells = [f"{median * 1e3:.3f}", f"{lists * 1e3:.3f}", f"{(lists - base) * 1e3:+.3f}", f"{1 / lists:.0f}"]
        spent = cost.get(name)
        cells += ["-", "-"] if spent is None else [f"{spent * 1e3:.3f}", f"{(spent - least) * 1e3:+.3f}"]
        table.rows.append([label, *cells])
    table.notes += [
        f"kept-alive connections, one request after the other; medians of means of {REQUESTS}",
        "CPU: processor time of insulad and its gate for the list, which does not count other programs' turns, as the "
        "times do on a busy machine. +: to the operator's socket, which takes no proof with a request",
        *(f"{name}: not measured: {why}" for name, why in {**missing, **dropped, **more}.items()),
    ]
    return table


def _cost(served: _Served, connections: dict[str, Connection], rounds: int) -> dict[str, float]:
    """The processor time of the servers for a request on each connection: medians of means, seconds."""
    spent: dict[str, list[float]] = {name: [] for name in connections}
    for _ in range(rounds):  # in turns: a connection on which nothing happens is closed
        for name, connection in connections.items():
            before = served.processor_time()
            connection.each("/v1/tenants/acme/instances")
            spent[name].append((served.processor_time() - before) / REQUESTS)
    return {name: statistics.median(values) for name, values in spent.items()}


def _new_connections(bench: Bench, served: _Served) -> Table:
    bearer = f"authorization: Bearer {served.token}"

    def whole(connect: Callable[[], socket.socket], *headers: str) -> float:
        started = time.perf_counter()
        with connect() as sock:
            Connection(sock, *headers).get("/v1/whoami")
        return time.perf_counter() - started

    contestants: dict[str, Measure] = {
        "the operator's socket": lambda: whole(lambda: served.unix("insulad.sock")),
        "HTTPS, by token": lambda: whole(served.https, bearer),
        "HTTPS, by certificate": lambda: whole(lambda: served.https(certificate=True)),
    }
    times, _ = interleave(contestants, bench.rounds(60))
    table = Table("A new connection, and one request", ["proof", "median ms", "quartiles"])
    for name, values in times.items():
        low, middle, high = (value * 1e3 for value in statistics.quantiles(values, n=4))
        table.rows.append([name, f"{middle:.2f}", f"{low:.2f} to {high:.2f}"])
    table.notes.append("client, gate and insulad share the processors; of it the client reads its key and certificates")
    return table


_FLOOD = """
import socket, ssl, sys, time
address, port, rate, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4])
context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
begun, done = time.monotonic(), 0
while (now := time.monotonic() - begun) < seconds:
    if done > now * rate:
        time.sleep(0.001)
        continue
    try:
        with socket.create_connection((address, port), 2) as sock:
            context.wrap_socket(sock, server_hostname="x").close()
    except OSError:
        pass
    done += 1
print(done / seconds)
"""


@contextmanager
def _flooding(daemon: Daemon) -> Iterator[Callable[[], float]]:
    """Two processes outside that make handshakes; yields a function for how many a second there were."""
    command = daemon.namespaces.wrap(
        daemon.namespaces.outside, sys.executable, "-c", _FLOOD, ADDRESS, str(PORT), str(HANDSHAKES / 2), str(SECONDS)
    )
    attackers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        yield lambda: sum(float(a.communicate(timeout=30)[0]) for a in attackers)
    finally:
        for attacker in attackers:
            attacker.kill()
            attacker.wait()


def _flood(served: _Served) -> Table:
    """Requests at the operator's socket while strangers make handshakes."""

    def ask(seconds: float) -> list[float]:
        connection = Connection(served.unix("insulad.sock"))
        times, end = [], time.monotonic() + seconds
        while time.monotonic() < end:
            times.append(connection.get("/v1/whoami"))
            time.sleep(0.003)
        return times

    quiet = ask(SECONDS / 2)
    with _flooding(served.daemon) as rate:
        beside = ask(SECONDS - 1)
        reached = rate()
    quiet += ask(SECONDS / 2)
    spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        busy = ask(SECONDS / 2)
    finally:
        for process in spinning:
            process.kill()
            process.wait()
    table = Table("Others' requests during a flood of TLS handshakes", ["while", "median ms", "99 %, ms", "× nothing"])
    for name, values in (("nothing", quiet), (f"{reached:.0f} handshakes a second", beside), ("two busy loops", busy)):
        middle, last = statistics.median(values), statistics.quantiles(values, n=100)[98]
        cells = (f"{middle * 1e3:.2f}", f"{last * 1e3:.2f}", f"{middle / statistics.median(quiet):.2f}")
        table.rows.append([name, *cells])
    table.notes.append("the flood's own processes take processor time as well: the busy loops show how much that means")
    return table


def _oracles(served: _Served) -> Table:
    """Pairs of answers that must look alike: how well their times tell them apart (area under the ROC curve)."""
    connection = Connection(served.unix("users.sock", MEMBER), f"authorization: Bearer {served.token}")
    known, unknown = (_with_another_secret(served.token, identity) for identity in (None, "0" * 16))
    pairs: dict[str, tuple[Callable[[], float], Callable[[], float]]] = {
        "a foreign instance: there, not there": (
            lambda: connection.get("/v1/tenants/globex/instances/there", 404),
            lambda: connection.get("/v1/tenants/globex/instances/other", 404),
        ),
        "a foreign tenant: there, not there": (
            lambda: connection.get("/v1/tenants/globex/instances", 404),
            lambda: connection.get("/v1/tenants/glabex/instances", 404),
        ),
    }
    pairs["a token: wrong secret, unknown"] = (lambda: _refused(served, known), lambda: _refused(served, unknown))
    table = Table("What the time of an answer tells", ["pair", "medians, µs", "AUC"])
    for name, (one, other) in pairs.items():
        first, second = [], []
        for _ in range(SAMPLES):
            first.append(one())
            second.append(other())
        medians = " and ".join(f"{statistics.median(values) * 1e6:.1f}" for values in (first, second))
        table.rows.append([name, medians, f"{_auc(first, second):.3f}"])
    table.notes.append(f"{SAMPLES} requests of each, in turns; 0.5: the times tell nothing. The goal is 0.47 to 0.53")
    return table


def _with_another_secret(token: str, identity: str | None) -> str:
    """A well-formed token that is not valid, with the ID of `token` or another one."""
    prefix, own, secret, _ = re.fullmatch(r"(\w+?)_([0-9a-f]{16})_(.{43})_(.{8})", token).groups()  # type: ignore[union-attr]
    body = f"{prefix}_{identity or own}_{secret[::-1]}"
    return f"{body}_{zlib.crc32(body.encode()):08x}"


def _refused(served: _Served, token: str) -> float:
    """The seconds of a request with this token: a refused proof closes its connection, so it has one of its own."""
    with served.unix("insulad.sock") as sock:
        return Connection(sock, f"authorization: Bearer {token}").get("/v1/whoami", 401)


def _auc(first: list[float], second: list[float]) -> float:
    """The probability that a time of `second` is greater than one of `first` (Mann-Whitney U, without ties)."""
    ranked = sorted([(value, 0) for value in first] + [(value, 1) for value in second])
    ranks = sum(rank for rank, (_, which) in enumerate(ranked, 1) if which)
    return (ranks - len(second) * (len(second) + 1) / 2) / (len(first) * len(second))
