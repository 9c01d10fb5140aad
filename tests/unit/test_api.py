"""The API and the client of the command line against each other over a real unix socket."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from litestar import Request

from insula import __version__
from insula.api.daemon import locked
from insula.api.errors import on_bad_body
from insula.api.peer import Peer, allowed, group_id, listen
from insula.api.server import notify
from insula.client.http import Dechunker, Remote, connect, head, quote, request, target
from insula.model.errors import Conflict, Denied, Failed, Invalid, NotFound, Unavailable
from insula.model.quotas import QUOTAS
from insula.model.stream import Kind
from tests.support.wait import patiently, until
from tests.unit.conftest import StubDaemon


def raw(stub: StubDaemon, data: bytes) -> bytes:
    """The answer of the server to these bytes, until it closes."""
    with closing(connect(str(stub.path), 10)) as sock:
        answer = b""
        with suppress(BrokenPipeError):  # it may have seen enough
            sock.sendall(data)
        with suppress(ConnectionResetError):  # and closed without reading the rest
            while more := sock.recv(65536):
                answer += more
    return answer


def test_objects_travel_both_ways(stub: StubDaemon) -> None:
    made = stub.client.tenants.create("acme", {"team": "blue"}, cpus=1.5, memory=1 << 30)
    assert made["tenant"]["limits"]["memory"] == 1 << 30
    assert stub.client.tenants.list() == [made]
    assert stub.client.tenants.get("acme") == made
    stub.client.tenants.remove("acme")
    assert stub.client.tenants.list() == []


def test_errors_keep_their_type_message_and_hint(stub: StubDaemon) -> None:
    stub.client.tenants.create("acme")
    with pytest.raises(Conflict, match="a tenant acme already; hint: choose another name"):
        stub.client.tenants.create("acme")
    with pytest.raises(NotFound, match="there is no tenant globex; hint: "):
        stub.client.tenants.get("globex")
    with pytest.raises(Invalid, match="not a DNS label; hint: "):
        stub.client.tenants.create("A/b c%")


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ({"name": 3}, "name: Expected `str`, got `int`"),
        ({"name": "x", "foo": 1}, "unknown field `foo`"),
        ({}, "missing required field `name`"),
        ([], "Expected `object`, got `array`"),
        ({"name": "x", "limits": {"cpus": "many"}}, "Expected"),
    ],
)
def test_bodies_of_the_wrong_type_are_refused(stub: StubDaemon, body: object, complaint: str) -> None:
    with pytest.raises(Invalid, match=complaint):
        stub.client.call("POST", "tenants", body=body)
    assert stub.client.tenants.list() == []


@pytest.mark.parametrize(
    "host", ["1.1\r\nhost: x:y", "1.1\r\nhost:", "1.1\r\nhost: [", "1.0", "1.1\r\nhost: x"], ids=repr
)
@pytest.mark.parametrize(
    ("method", "where", "status"),
    [("GET", "/v1/nope", 404), ("PUT", "/v1/tenants", 405), ("GET", "/v1/tenants/a/instances/b/archive", 400)],
)
def test_the_field_host_is_nothing_to_an_error(
    stub: StubDaemon, host: str, method: str, where: str, status: int
) -> None:
    """Whatever a client writes there, a wrong request is no defect of insulad. What is no host is refused."""
    answer = raw(stub, f"{method} {where} HTTP/{host}\r\nconnection: close\r\n\r\n".encode())
    assert int(answer.split()[1]) == (400 if host.endswith((":y", "[")) else status), answer


@pytest.mark.parametrize(
    ("method", "where", "status", "kind"),
    [
        ("GET", "/v1/nope", 404, "NotFound"),
        ("PUT", "/v1/tenants", 405, "Invalid"),
        ("GET", "/v1/whois/me", 404, "NotFound"),
        ("GET", "/v1/tenants/a/instances/b/logs?tail=-1", 400, "Invalid"),
        ("GET", "/v1/tenants/a/instances/b/logs?follow=perhaps", 400, "Invalid"),
        ("GET", "/v1/tenants/a/instances/b/archive", 400, "Invalid"),
    ],
)
def test_wrong_requests_are_json_errors(stub: StubDaemon, method: str, where: str, status: int, kind: str) -> None:
    answer = raw(stub, head(method, where, "content-length: 0"))
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    error = json.loads(answer.partition(b"\r\n\r\n")[2])
    assert error["error"] == kind
    assert error["message"]
    assert error["hint"]


def test_a_body_that_nests_without_end(stub: StubDaemon) -> None:
    """A parser that recurses (CVE-2020-36518 and many more) must say so, and neither die nor blame itself."""
    for body, status in ((b"[" * 200_000, 400), (b'{"name":' * 100_000, 400), (b'{"name":"flat"}', 201)):
        request = head("POST", "/v1/tenants", f"content-length: {len(body)}", "content-type: application/json")
        answer = raw(stub, request + body)
        assert answer.startswith(b"HTTP/1.1 %d " % status), answer[:300]


def test_a_body_that_is_not_utf_8(stub: StubDaemon) -> None:
    for name, status in ((b"\xff\xfe", 400), (b"\xc0\xae", 400), ("ä".encode(), 400), (b"flat", 201)):
        body = b'{"name":"' + name + b'"}'
        request = head("POST", "/v1/tenants", f"content-length: {len(body)}", "content-type: application/json")
        answer = raw(stub, request + body)
        assert answer.startswith(b"HTTP/1.1 %d " % status), answer[:300]


def test_a_recursion_beyond_the_request_is_no_fault_of_the_request() -> None:
    """It is told as a defect, and not as a body that nests too deep."""
    scope: Any = {"type": "http", "method": "DELETE", "path": "/x", "headers": [], "query_string": b""}
    request = Request[Any, Any, Any](scope)
    for module, status in (("insula.control.deep", 500), ("insula.api.body", 400), ("msgspec", 400)):
        names: dict[str, Any] = {"__name__": module}
        exec("def recurse():\n    recurse()", names)
        with pytest.raises(RecursionError) as raised:
            names["recurse"]()
        assert on_bad_body(request, raised.value).status_code == status


def test_invalid_or_too_large_http_is_refused(stub: StubDaemon) -> None:
    assert raw(stub, b"\x16\x03\x01 hello\r\n\r\n").startswith(b"HTTP/1.1 400 ")
    assert raw(stub, b"GET / HTTP/1.1\r\nx: " + b"y" * (1 << 20)).startswith(b"HTTP/1.1 431 ")
    with pytest.raises(Invalid, match="too large"):
        stub.client.call("POST", "tenants", body={"name": "x" * (2 << 20)})
    assert stub.client.tenants.list() == []


def test_a_defect_shows_no_inner_details(stub: StubDaemon) -> None:
    def broken() -> None:
        raise RuntimeError("secret")

    stub.plane.tenants.list = broken
    with pytest.raises(Failed, match="insulad has a defect: RuntimeError") as caught:
        stub.client.tenants.list()
    assert "secret" not in str(caught.value)


def test_openapi_describes_every_route_with_its_structs(stub: StubDaemon) -> None:
    document = request(Remote(str(stub.path)), "GET", "/openapi.json").json()
    assert document["openapi"].startswith("3.")
    assert {"/v1/tenants", "/v1/tenants/{tenant}/instances/{name}/exec", "/v1/verify"} <= set(document["paths"])
    schemas = document["components"]["schemas"]
    assert schemas["InstanceSpec"]["properties"]["image"]["type"] == "string"
    assert {"InstanceView", "VerifyReport", "TenantSpec", "Explanation", "StatsSample"} <= set(schemas)
    patch = schemas["InstancePatch"]
    assert patch.get("required", []) == [], "all of a patch may be left out"
    assert {"type": "null"} in patch["properties"]["memory"]["anyOf"]
    for path in document["paths"].values():
        assert all(operation["summary"] for operation in path.values())


def test_fields_left_out_of_a_patch_stay(stub: StubDaemon) -> None:
    stub.client.tenants.create("acme", cpus=1.5, memory=1 << 30)
    view = stub.client.tenants.update("acme", memory=None, instances=3)
    given = {"cpus": 1.5, "memory": None, "instances": 3, "bandwidth": None, "pids": 16384}
    assert view["tenant"]["limits"] == {**dict.fromkeys(QUOTAS), **given}
    stub.client.instances.run("acme", "x", ["true"], name="web", start=False)
    view = stub.client.instances.update("acme", "web", cpus=0.5, pids=None)
    assert view["instance"]["spec"]["resources"] == {
        "cpus": 0.5,
        "memory": None,
        "pids": None,
        "disk": None,
        "inodes": None,
    }
    with pytest.raises(Invalid, match="nothing to change"):
        stub.client.instances.update("acme", "web")
    with pytest.raises(Invalid, match="unknown field `disks`"):
        stub.client.tenants.update("acme", disks=3)
    with pytest.raises(Invalid, match="Expected `int"):
        stub.client.call("PATCH", "tenants", "acme", "instances", "web", body={"memory": "64m"})


def test_pause_and_unpause(stub: StubDaemon) -> None:
    stub.client.instances.run("acme", "x", ["true"], name="web", start=False)
    assert stub.client.instances.pause("acme", "web")["status"]["state"] == "paused"
    assert stub.client.instances.unpause("acme", "web")["status"]["state"] == "running"
    with pytest.raises(NotFound):
        stub.client.instances.pause("acme", "nope")


def test_stats_once_and_as_a_series(stub: StubDaemon) -> None:
    [sample] = stub.client.instances.stats("acme", ["web", "db"])
    assert sample["instances"][0]["name"] == "web"
    series = list(stub.client.instances.stats(interval=0.5))
    assert [sample["instances"][0]["cpu"] for sample in series] == [0.0, 0.5, 1.0]
    assert stub.plane.stats.asked == [("acme", "web", "db", None), (None, 0.5)]
    with pytest.raises(NotFound, match="no instance nobody"):
        list(stub.client.instances.stats("acme", ["nobody"]))
    with pytest.raises(Invalid):
        list(stub.client.instances.stats("acme", interval=0.0))


def test_events_flow_and_an_error_at_their_end_is_raised(stub: StubDaemon) -> None:
    stub.plane.events.items = [{"kind": "tenant", "name": "a"}, {"kind": "tenant", "name": "b"}]
    seen = []
    with pytest.raises(Failed, match="the rest is lost"):
        for event in stub.client.host.events():
            seen.append(event["name"])
    assert seen == ["a", "b"]


def test_logs_carry_streams_and_times(stub: StubDaemon) -> None:
    stub.client.instances.run("acme", "x", ["true"], name="web", start=False)
    stub.plane.instances.log = [(Kind.STDOUT, b"one\n"), (Kind.STDERR, b"two\n")]
    assert list(stub.client.instances.logs("acme", "web")) == [(0.0, 1, b"one\n"), (1.0, 2, b"two\n")]
    with pytest.raises(NotFound):
        list(stub.client.instances.logs("acme", "nope"))


# -- archives ------------------------------------------------------------------------------------------------------


def test_archives_stream_both_ways(stub: StubDaemon) -> None:
    stub.client.instances.run("acme", "x", ["true"], name="web", start=False)
    stub.client.instances.archive_put("acme", "web", "/with space/ü", iter([b"a" * 100_000, b"", b"b"]))
    assert stub.plane.instances.uploads == {"/with space/ü": b"a" * 100_000 + b"b"}
    stub.plane.instances.archives["/x"] = [b"1" * 70_000, b"2"]
    with stub.client.instances.archive_get("acme", "web", "/x") as response:
        assert response.read() == b"1" * 70_000 + b"2"
    with pytest.raises(NotFound, match="/y is not there"):
        stub.client.instances.archive_get("acme", "web", "/y")


def test_a_broken_upload_is_not_taken_for_a_whole_one(stub: StubDaemon) -> None:
    stub.client.instances.run("acme", "x", ["true"], name="web", start=False)

    def pieces() -> Iterator[bytes]:
        yield b"first"
        raise OSError("the disk broke")

    with pytest.raises(OSError, match="the disk broke"):
        stub.client.instances.archive_put("acme", "web", "/x", pieces())
    until(lambda: stub.plane.instances.broken_uploads, "the server has noticed")
    assert stub.plane.instances.broken_uploads == 1
    assert stub.plane.instances.uploads == {}


def test_an_upload_that_is_refused_early_gives_the_reason(stub: StubDaemon) -> None:
    with pytest.raises(NotFound, match="no instance nope"):
        stub.client.instances.archive_put("acme", "nope", "/x", (b"x" * 65536 for _ in range(500)))


def test_a_download_that_is_cut_off_is_noticed(tmp_path: Path) -> None:
    path = str(tmp_path / "sock")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        client = socket.socket(socket.AF_UNIX)
        client.connect(path)
        served, _ = server.accept()
        served.sendall(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n")
        served.close()
        from insula.client.http import Response

        response = Response(client)
        with pytest.raises(Unavailable, match="closed the connection"):
            response.read()
        response.close()


# -- who may ---------------------------------------------------------------------------------------------------------


def test_root_and_the_group_are_allowed() -> None:
    assert allowed(Peer(1, 0, 0), None)
    assert allowed(Peer(1, 1000, 1000, (27, 900)), 900)
    assert allowed(Peer(1, 1000, 900), 900)
    assert not allowed(Peer(1, 1000, 1000, (27,)), 900)
    assert not allowed(Peer(1, 1000, 1000, (27,)), None)
    assert not allowed(Peer(1, 0x40000000, 0x40000000), 900)


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user takes root")
def test_the_kernel_tells_who_connects(stub: StubDaemon, tmp_path: Path) -> None:
    stub.path.chmod(0o666)  # somebody loosened it: the peer's credentials still decide
    for parent in (stub.path.parent, *stub.path.parent.parents):
        if parent.owner() == "root" and parent.is_relative_to("/tmp") and parent != Path("/tmp"):
            parent.chmod(0o755)
    source = Path(__file__).parents[2] / "src"
    script = "import sys; sys.path.append(sys.argv[2]); from insula.client import Client\n"
    script += "try: print(Client(sys.argv[1]).tenants.list())\nexcept Exception as e: print(type(e).__name__, e)"

    def ask(**identity: object) -> str:
        command = ["/usr/bin/python3", "-ISE", "-c", script, str(stub.path), str(source)]
        return subprocess.run(command, capture_output=True, text=True, timeout=patiently(20), **identity).stdout  # type: ignore[call-overload, no-any-return]

    assert ask() == "[]\n"
    if ask(user=65534, group=65534, extra_groups=[]) == "":
        pytest.skip("another user can't read this checkout")
    assert ask(user=65534, group=65534, extra_groups=[]).startswith("Denied user 65534 may not use insulad")
    if (group := group_id()) is not None:
        assert ask(user=65534, group=65534, extra_groups=[group]) == "[]\n"


def test_the_socket_is_private_from_the_start(tmp_path: Path) -> None:
    path = tmp_path / "sock"
    path.write_text("a stale file")
    with listen(path):
        assert path.stat().st_mode & 0o7777 == (0o600 if group_id() is None else 0o660)
        assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(Failed, match="can't be made"):
        listen(tmp_path / "missing" / "sock")


def test_the_client_may_not_open_the_socket(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may open everything")
    path = tmp_path / "sock"
    with listen(path):
        path.chmod(0)
        with pytest.raises(Denied, match="permission denied"):
            connect(str(path))


def test_two_daemons_cannot_have_one_root(tmp_path: Path) -> None:
    lock = tmp_path / "insulad.pid"
    with locked(lock), pytest.raises(Conflict, match=f"another insulad \\(process {os.getpid()}\\)"), locked(lock):
        pass
    with locked(lock):
        assert lock.read_text() == f"{os.getpid()}\n"


def test_systemd_is_notified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(path)
        systemd.settimeout(patiently(5))
        monkeypatch.setenv("NOTIFY_SOCKET", path)
        notify("READY=1")
        assert systemd.recv(100) == b"READY=1"
    notify("STOPPING=1")  # nobody listens any more: that is no error


# -- the wire --------------------------------------------------------------------------------------------------------


def test_targets_are_encoded() -> None:
    assert target("tenants", "a/b ü?", x="1&2", flag=True, nothing=None, many=[1, 2]) == (
        "/v1/tenants/a%2Fb%20%C3%BC%3F?x=1%262&flag=true&many=1&many=2"
    )
    assert quote("ⅷ²") == "%E2%85%B7%C2%B2"


@pytest.mark.parametrize("step", [1, 2, 3, 7, 1000])
def test_chunks_are_taken_apart_however_they_arrive(step: int) -> None:
    wire = b"5\r\nhello\r\n1;x=y\r\n,\r\n6\r\n world\r\n0\r\n\r\n"
    dechunker = Dechunker()
    body = b"".join(b"".join(dechunker.feed(wire[i : i + step])) for i in range(0, len(wire), step))
    assert body == b"hello, world"
    assert dechunker.done


@pytest.mark.parametrize("garbage", [b"xyz\r\n", b"z" * 5000])
def test_garbage_is_no_chunked_body(garbage: bytes) -> None:
    with pytest.raises(Failed, match="not a valid chunked body"):
        list(Dechunker().feed(garbage))


def test_the_client_needs_the_standard_library_only() -> None:
    source = str(Path(__file__).parents[2] / "src")
    code = f"import sys; sys.path.append({source!r}); import insula.client, insula.client.attachment"
    subprocess.run([sys.executable, "-IS", "-c", code], check=True)


def command(module: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", module, *words], capture_output=True, text=True)


def test_insulad_prints_help_and_refuses_unknown_options() -> None:
    assert "INSULA_ROOT" in command("insula.api.daemon", "--help").stdout
    wrong = command("insula.api.daemon", "--frobnicate")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == "error: unrecognized arguments: --frobnicate; hint: see `insulad --help`\n"


def test_all_commands_have_one_version() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", __version__)
    for module, name in (("insula.cli.main", "insula"), ("insula.api.daemon", "insulad")):
        assert command(module, "--version").stdout == f"{name} {__version__}\n"
    assert command("insula.oci.main", "--version").stdout.startswith(f"insula-oci version {__version__}\n")
    assert f"## [{__version__}]" in (Path(__file__).parents[2] / "CHANGELOG.md").read_text()
