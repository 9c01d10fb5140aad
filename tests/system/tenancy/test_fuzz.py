"""Generated requests for every operation, as each role: no failure of the server, answers as they are described, and
nothing of another tenant.

schemathesis generates them from /openapi.json: *positive* ones fit it, *negative* ones don't. The other tenant, the
canary, works all the while.
"""

from __future__ import annotations

import io
import json
import random
import socket
import tarfile
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from ipaddress import ip_network
from typing import Any, NamedTuple

import jsonschema_rs
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis.generation import GenerationMode

from insula.client import Client
from insula.model.stream import Kind, encode
from tests.support.daemon import Daemon
from tests.support.wait import patiently
from tests.system.tenancy.conftest import Houses, People, Person
from tests.system.tenancy.http import HttpAnswer, dechunked, exchange
from tests.system.tenancy.test_quotas import as_user

NDJSON, TAR, FRAMES = "application/x-ndjson", "application/x-tar", "application/vnd.insula.frames"
ROLES = ("operator", "auditor", "admin", "member", "viewer")
BY_UID = {"operator": 61051, "admin": 61052}
"""Roles that give rights to others, which a token can't: these are users of the host."""
LEFT_OUT = {"down"}  # ends insulad
ELSEWHERE = {"remove_tenant", "update_tenant"}  # what all others need stays: on a tenant that is not there
OFF = {"create_certificate", "invite", "rotate_authority"}  # 503: there is no HTTPS here
WAITING = {"stop", "restart", "wait"}  # they may take a day: on an instance that is not there
READS = 1 << 20  # bytes of a stream
PATIENCE = 0.05  # seconds without a byte of a stream, which has no end
EXISTING = ("web", "absent")


def subnet(bits: int, prefixes: tuple[int, ...], base: int) -> st.SearchStrategy[str]:
    """Networks in CIDR notation, without host bits."""

    def network(prefix: int, number: int) -> str:
        value = (base | number << (bits // 2)) >> (bits - prefix) << (bits - prefix)
        return str(ip_network((value.to_bytes(bits // 8, "big"), prefix)))

    return st.builds(network, st.sampled_from(prefixes), st.integers(0, 0xFF))


schemathesis.openapi.format("ipv4-network", subnet(32, (16, 24, 28), 10 << 24))
schemathesis.openapi.format("ipv6-network", subnet(128, (48, 64), 0xFD00 << 112))


@schemathesis.serializer("application/vnd.insula.frames", "application/x-tar", "application/octet-stream")
def as_bytes(_context: Any, value: Any) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()


class Canary(NamedTuple):
    """A tenant whose texts must appear in no answer for others."""

    client: Client
    tenant: str
    texts: tuple[str, ...]

    def work(self) -> None:
        self.client.instances.update(self.tenant, "canaryweb", pids=random.randint(100, 4000))


@pytest.fixture(scope="module")
def canary(daemon: Daemon, people: People) -> Iterator[Canary]:
    client, tenant = people.operator, "canary-house"
    client.tenants.create(tenant, {"canary-label": "canary-value"})
    client.networks.create(tenant, "canarynet", "10.203.77.0/24")
    view = client.instances.run(
        tenant, "busybox", ["sleep", "600"], name="canaryweb", networks=[{"network": "canarynet"}]
    )
    person = people.person("admin", tenant)
    port = view["instance"]["ports"][0]
    texts = ("canary", "10.203.77.", view["instance"]["id"], port["mac"], person.name, person.secret.split("_")[1])
    yield Canary(client, tenant, texts)
    client.tenants.remove(tenant, force=True)


@pytest.fixture(scope="module")
def document(daemon: Daemon) -> dict[str, Any]:
    found: dict[str, Any] = exchange(daemon.run / "insulad.sock", "GET", "/openapi.json").json
    return found


class Fuzzer:
    """Sends generated requests as one person, and checks the answers."""

    def __init__(
        self,
        daemon: Daemon,
        document: dict[str, Any],
        tenant: str,
        person: Person,
        canary: Canary,
        uid: int | None = None,
    ) -> None:
        self.uid = uid
        self.path = daemon.run / "users.sock"
        self.document = document
        self.tenant = tenant
        self.person = person
        self.canary = canary
        self.statuses: Counter[int] = Counter()
        self.refused: Counter[str] = Counter()
        self.done: set[str] = set()
        self.reads_hosts = person.name.startswith(("operator", "auditor"))
        self.problems: list[str] = []
        self.mode = GenerationMode.POSITIVE
        self._validators: dict[str, Any] = {}

    def operations(self) -> Iterator[Any]:
        for result in schemathesis.openapi.from_dict(self.document).get_all_operations():
            operation: Any = result.ok()  # type: ignore[union-attr]
            if operation.definition.raw["operationId"] not in LEFT_OUT:
                yield operation

    def fuzz(self, operation: Any, mode: GenerationMode, cases: int, number: int) -> None:
        name = operation.definition.raw["operationId"]
        chosen = random.Random(f"{name} {number}")
        self.mode = mode

        @seed(number)
        @settings(
            max_examples=cases,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def each(case: Any) -> None:
            if name in WAITING and case.path_parameters:
                case.path_parameters["name"] = "absent"
            if mode is GenerationMode.POSITIVE:
                self.make_real(name, case, operation.definition.raw, chosen)
            answer = self.send(case)
            try:
                self.check(name, operation.definition.raw, answer)
            except AssertionError as error:
                asked = f"{case.method} {case.formatted_path} {case.query} {case.body!r:.1500}"
                self.problems.append(f"{error} | {asked} → {answer.status} {answer.body!r:.1500}")

        with suppress(Unsatisfiable):  # there is nothing that would not fit
            each()

    def make_real(self, name: str, case: Any, raw: dict[str, Any], chosen: random.Random) -> None:
        """Put into a request what can't be guessed: objects that exist, archives, and frames."""
        named = case.path_parameters or {}
        if "tenant" in named:
            named["tenant"] = "absent" if name in ELSEWHERE else self.tenant
        if case.method == "GET" and "name" in named:
            named["name"] = chosen.choice(EXISTING)
        (case.query or {}).pop("cursor", None)
        if isinstance(case.body, dict) and "image" in case.body:
            case.body["stop_timeout"] = 0
            if chosen.random() < 0.5:
                case.body["image"] = "busybox"
            if (case.body.get("options") or {}).get("kind") == "machine":
                case.body["image"] = "absent"  # a machine takes seconds of a processor
        takes = raw.get("requestBody", {}).get("content", {})
        if TAR in takes:
            case.body = archive()
        elif FRAMES in takes:
            spec = {"image": "absent"} if name == "run_attached" else {"command": ["true"]}
            case.body = encode(Kind.OPEN, json.dumps(spec).encode())

    def send(self, case: Any) -> HttpAnswer:
        """Send a request; of a stream without end, return what comes until it pauses."""
        request = requests.Request(**case.as_transport_kwargs(base_url="http://insula")).prepare()
        given: Any = request.body or b""
        body: bytes = given.encode() if isinstance(given, str) else given
        fields = {name.lower(): value for name, value in as_text(request.headers).items()}
        fields |= {"host": "insula", "connection": "close", "content-length": str(len(body))}
        if self.uid is None:
            fields["authorization"] = f"Bearer {self.person.secret}"
        else:
            fields.pop("authorization", None)
        fields.pop("transfer-encoding", None)
        lines = [f"{request.method} {request.path_url} HTTP/1.1", *(f"{name}: {text}" for name, text in fields.items())]
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(patiently(60))
            with as_user(self.uid or 0):
                sock.connect(str(self.path))
            sock.sendall("\r\n".join([*lines, "", ""]).encode("latin-1", "replace") + body)
            return received(sock)

    def check(self, name: str, raw: dict[str, Any], answer: HttpAnswer) -> None:
        if self.mode is GenerationMode.POSITIVE:
            self.statuses[answer.status] += 1
        if answer.status == 400 and self.mode is GenerationMode.POSITIVE:
            self.refused[f"{name}: {json.loads(answer.body)['detail'][:150]}"] += 1
        assert answer.status < 500 or (answer.status == 503 and name in OFF), "a failure of the server"
        described = raw["responses"].get(str(answer.status))
        assert described or answer.status in (405, 404, 414), f"{name} may not answer {answer.status}"
        if not self.reads_hosts:
            whole = answer.body.decode("utf-8", "replace") + str(answer.headers)
            for text in self.canary.texts:
                assert text not in whole, f"{text} is of another tenant"
        if answer.status < 300:
            self.done.add(name)
        kind = answer.headers.get("content-type", "").partition(";")[0]
        if answer.status >= 400:
            assert kind == "application/problem+json", kind
            self.conforms("#/components/schemas/Problem", answer.json)
            return
        content = (described or {}).get("content", {})
        assert (not content and not answer.body) or kind in content, f"it is {kind!r}"
        if kind == "application/json":
            self.conforms(content[kind]["schema"], answer.json)
        elif kind == NDJSON:
            for line in answer.body.splitlines():
                if line.endswith(b"}"):
                    self.conforms(content[kind]["schema"], json.loads(line))

    def conforms(self, schema: Any, value: Any) -> None:
        schema = {"$ref": schema} if isinstance(schema, str) else schema
        key = json.dumps(schema)
        if key not in self._validators:
            whole = {**schema, "components": self.document["components"]}
            self._validators[key] = jsonschema_rs.validator_for(whole)
        wrong = next(self._validators[key].iter_errors(value), None)
        assert wrong is None, f"not as described: {wrong!s:.300}"


def as_text(headers: Any) -> dict[str, str]:
    return {
        str(name): value.decode("latin-1") if isinstance(value, bytes) else value for name, value in headers.items()
    }


def archive() -> bytes:
    """A tar with one file."""
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as tar:
        member = tarfile.TarInfo("file")
        member.size = 4
        tar.addfile(member, io.BytesIO(b"text"))
    return target.getvalue()


def received(sock: socket.socket) -> HttpAnswer:
    data = b""
    try:
        while b"\r\n\r\n" not in data and (piece := sock.recv(65536)):
            data += piece
        if b"content-length:" not in data.partition(b"\r\n\r\n")[0].lower():
            sock.settimeout(PATIENCE)
        while len(data) < READS and (piece := sock.recv(65536)):
            data += piece
    except TimeoutError:
        pass
    assert data, "there is no answer"
    top, _, body = data.partition(b"\r\n\r\n")
    line, *head = top.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (each.partition(":") for each in head)}
    if headers.get("transfer-encoding") == "chunked":
        body = b"".join(dechunked(body))
    return HttpAnswer(int(line.split()[1]), headers, body)


@pytest.fixture(scope="module")
def fuzzers(
    daemon: Daemon, document: dict[str, Any], houses: Houses, people: People, canary: Canary
) -> Iterator[dict[str, Fuzzer]]:
    """One for each role. Users that are made meanwhile are removed."""
    tenant, hosts = str(houses.acme.tenant), ("operator", "auditor")
    persons = {role: people.person(role, None if role in hosts else tenant, BY_UID.get(role)) for role in ROLES}
    modes = {path: path.stat().st_mode & 0o7777 for path in (daemon.path, daemon.path.parent)}
    for path in modes:
        path.chmod(0o711)
    before = {view["principal"]["name"] for view in people.operator.identities.users()}
    yield {role: Fuzzer(daemon, document, tenant, person, canary, BY_UID.get(role)) for role, person in persons.items()}
    for view in people.operator.identities.users():
        if view["principal"]["name"] not in before:
            people.operator.identities.remove_user(view["principal"]["name"])
    for path, mode in modes.items():
        path.chmod(mode)


def fuzz_all(fuzzer: Fuzzer, positive: int, negative: int) -> None:
    """Fuzz every operation with so many requests that fit the description, and so many that don't."""
    for number, operation in enumerate(fuzzer.operations()):
        fuzzer.canary.work()
        fuzzer.fuzz(operation, GenerationMode.POSITIVE, positive, number)
        if negative:
            fuzzer.fuzz(operation, GenerationMode.NEGATIVE, negative, number)
    sent, wrong = fuzzer.statuses.total(), fuzzer.statuses[400]
    print("\n".join(fuzzer.problems))
    print(f"{sent} requests that fit the description, {wrong} refused as wrong: {dict(fuzzer.statuses)}")
    for text, count in fuzzer.refused.most_common(20):
        print(f"{count:4} {text}")
    assert not fuzzer.problems, "\n".join(fuzzer.problems)
    assert sent > 100 and wrong < sent * 0.15, "most that fits is taken"


@pytest.mark.parametrize("role", ROLES)
def test_generated_requests(role: str, fuzzers: dict[str, Fuzzer], daemon: Daemon) -> None:
    pid = daemon.pid("insulad")
    if role in ("operator", "member"):
        fuzz_all(fuzzers[role], 2, 1)
    else:
        fuzz_all(fuzzers[role], 1, 0)
    assert daemon.pid("insulad") == pid, "it lives"
    assert ("create_service_account" in fuzzers[role].done) == (role in BY_UID), "the control: rights are given, too"


@pytest.mark.long
@pytest.mark.parametrize("role", ROLES)
def test_many_generated_requests(role: str, fuzzers: dict[str, Fuzzer]) -> None:
    fuzz_all(fuzzers[role], 60, 30)


def test_the_canary_would_be_noticed(fuzzers: dict[str, Fuzzer], canary: Canary) -> None:
    """A positive control: what is looked for is what the canary's own requests are answered with."""
    body = json.dumps(canary.client.instances.get(canary.tenant, "canaryweb")).encode()
    answer = HttpAnswer(200, {"content-type": "application/json"}, body)
    with pytest.raises(AssertionError, match="is of another tenant"):
        fuzzers["viewer"].check("x", {"responses": {"200": {"description": "it"}}}, answer)
    assert sum(text in body.decode() for text in canary.texts) >= 4
