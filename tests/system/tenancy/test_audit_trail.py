"""The audit log as evidence: what was tried and by whom, broken and found, killed and closed, full and refused."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from insula.api.app import application
from insula.api.authorization import handlers, permission_of
from insula.audit.writer import FULL, UNKNOWN
from insula.client import Client
from insula.model.errors import Denied, InsulaError, Unavailable
from insula.model.permissions import NOT_BY_TOKEN, OF_EVERYBODY, permissions_of
from tests.support.daemon import Daemon
from tests.support.wait import patiently, until
from tests.system.tenancy.conftest import Houses, People, Person
from tests.unit.stub_plane import StubPlane


@pytest.fixture(scope="module")
def ann(people: People, houses: Houses) -> Person:
    return people.person("member", houses.acme.tenant)


def entries(daemon: Daemon) -> list[dict[str, Any]]:
    return [json.loads(line) for line in daemon.cli.ok("--json", "audit").splitlines()]


@pytest.fixture
def new(daemon: Daemon) -> Callable[[], list[dict[str, Any]]]:
    """What the log has got since the test began."""
    since = len(entries(daemon))
    return lambda: entries(daemon)[since:]


def ask(daemon: Daemon, method: str, path: str, token: str | None, body: bytes = b"{}", rest: bytes = b"") -> int:
    """Send a request at the users' socket; returns its status. `rest` is announced, and not sent."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(patiently(60))
        sock.connect(str(daemon.run / "users.sock"))
        head = f"{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n"
        head += f"content-length: {len(body) + len(rest)}\r\n"
        head += f"authorization: Bearer {token}\r\n\r\n" if token else "\r\n"
        sock.sendall(head.encode() + body)
        if rest:
            return 0
        data = b""
        while b"\r\n" not in data and (piece := sock.recv(65536)):
            data += piece
        return int(data.split(b" ", 2)[1])


# -- who may see it, and verify it ---------------------------------------------------------------------------------


def test_operator_and_auditor_verify_it_and_members_do_not_see_it(daemon: Daemon, people: People, ann: Person) -> None:
    auditor = people.person("auditor")
    for cli in (daemon.cli, auditor.cli):
        said = cli.ok("audit", "--verify")
        assert re.search(r"checked by \d of \d heads; none by key$", said), said
    report = json.loads(auditor.cli.ok("--json", "audit", "--verify"))
    assert report["wrong"] == 0 and report["lines"] > 10 and report["heads"] >= 1
    for words in (["audit", "--verify"], ["audit", "head"], ["audit"], ["audit", "key"]):
        assert "takes the permission" in ann.cli.fails(*words)
    assert "takes the permission audit.key" in auditor.cli.fails("audit", "key")


def test_a_kept_head_and_a_kept_key_verify_it(daemon: Daemon, cli: Any, tmp_path: Path) -> None:
    head = daemon.cli.ok("audit", "head")
    key = daemon.cli.ok("audit", "key")
    (tmp_path / "keys").write_text(key + "\n")
    cli.ok("run", "--rm", "busybox", "true")
    said = daemon.cli.ok("audit", "--verify", "--since-head", head, "--key", str(tmp_path / "keys"))
    assert re.search(r"checked by \d of \d heads; [1-9]\d* by key$", said), said
    forged = head[:-1] + ("0" if head[-1] != "0" else "1")
    assert "another line than the head" in daemon.cli.run("audit", "--verify", "--since-head", forged).out
    assert "is no head" in daemon.cli.fails("audit", "--verify", "--since-head", "17")
    kept = key.split(":")[2]
    for path in (*daemon.root.rglob("*"), daemon.log, *daemon.path.glob("audit.log*")):
        if path.is_file() and path.stat().st_size < 64 << 20:
            data = path.read_bytes()
            assert kept.encode() not in data and bytes.fromhex(kept) not in data, path


def test_a_broken_log_is_found_with_and_without_insulad(unstarted: Daemon) -> None:
    witness = unstarted.path / "witness"
    unstarted.configure(audit=f'witness = "{witness}"')
    unstarted.start()
    for number in range(5):
        unstarted.cli.fails("stop", f"absent-{number}")
    unstarted.stop()
    state = str(unstarted.root / "audit.key")
    offline = ("audit", "--verify", "--log", str(unstarted.audit), "--state", state, "--witness", str(witness))
    assert "checked by 1 of 1 heads" in unstarted.cli.ok(*offline), "the positive control"
    content = unstarted.audit.read_bytes()
    assert b"absent-3" in content
    unstarted.audit.write_bytes(content.replace(b"absent-3", b"absent-4"))
    found = unstarted.cli.run(*offline)
    assert found.status == 1 and re.search(r"line \d+ \(audit.log:\d+\): it was changed", found.out), found
    lines = content.splitlines(keepends=True)
    unstarted.audit.write_bytes(b"".join(lines[:-2]))
    assert "are missing at the end" in unstarted.cli.run(*offline).out
    unstarted.start()
    until(lambda: "are missing from" in "\n".join(unstarted.cli.json("status")["problems"]), "status says so")
    online = unstarted.cli.run("audit", "--verify")
    assert online.status == 1 and f"lines {len(lines) - 1} to {len(lines)} are missing" in online.out, online


# -- every attempt is a line -----------------------------------------------------------------------------------------


def test_every_attempt_at_another_tenants_routes_is_one_line(
    daemon: Daemon, people: People, houses: Houses, new: Callable[[], list[dict[str, Any]]], tmp_path: Path
) -> None:
    """Of every route of the application, also those that only read, and whose success is not recorded."""
    ben = people.person("admin", houses.acme.tenant)
    sent = Counter[str]()
    for path, method, _ in handlers(application(StubPlane(tmp_path), None)):
        if "{tenant:" in path and method != "OPTIONS":
            named = path.replace("{tenant:str}", str(houses.globex.tenant))
            named = re.sub(r"\{(\w+):(\w+)\}", lambda match: "1" if match[2] == "int" else "x", named)
            assert ask(daemon, method, named, ben.secret) == 404
            sent[f"{method} {re.sub(r':(str|path|int)}', '}', path)}"] += 1
    found = [entry for entry in new() if entry.get("user") == ben.name]
    assert Counter(entry["verb"] for entry in found) == sent and len(sent) > 40
    assert {(entry["status"], entry["error"], entry["tenant"]) for entry in found} == {
        (404, "NotFound", houses.globex.tenant)
    }
    assert {entry["proof"] for entry in found} == {f"token {ben.secret.split('_')[1]}"}
    assert {entry["uid"] for entry in found} == {0} and all("phase" not in entry for entry in found)


def test_everything_that_a_viewer_may_not_is_one_line(
    daemon: Daemon, people: People, houses: Houses, new: Callable[[], list[dict[str, Any]]], tmp_path: Path
) -> None:
    eve, tenant = people.person("viewer", houses.acme.tenant), str(houses.acme.tenant)
    held = (permissions_of("viewer") | OF_EVERYBODY) - NOT_BY_TOKEN
    sent = Counter[str]()
    for path, method, handler in handlers(application(StubPlane(tmp_path), None)):
        if permission_of(handler, method) not in held:
            named = path.replace("{tenant:str}", tenant)
            named = re.sub(r"\{(\w+):(\w+)\}", lambda match: "1" if match[2] == "int" else "x", named)
            assert ask(daemon, method, named, eve.secret) == 403
            sent[f"{method} {re.sub(r':(str|path|int)}', '}', path)}"] += 1
    found = [entry for entry in new() if entry.get("user") == eve.name]
    assert Counter(entry["verb"] for entry in found) == sent and 40 < len(sent) < 120
    assert {(entry["status"], entry["error"]) for entry in found} == {(403, "Denied")}


def test_each_way_to_fail_is_one_line(
    daemon: Daemon, people: People, houses: Houses, new: Callable[[], list[dict[str, Any]]]
) -> None:
    viewer = people.person("viewer", houses.acme.tenant)
    admin = people.person("admin", houses.acme.tenant)
    at = f"/v1/tenants/{houses.acme.tenant}"
    wrong = viewer.secret[:-1] + ("0" if viewer.secret[-1] != "0" else "1")
    asked = [
        (401, ask(daemon, "POST", f"{at}/networks", wrong)),
        (401, ask(daemon, "GET", "/v1/whoami", "x")),
        (403, ask(daemon, "POST", f"{at}/networks", viewer.secret)),
        (403, ask(daemon, "GET", "/v1/status", viewer.secret)),
        (400, ask(daemon, "POST", f"{at}/networks", admin.secret, b"[")),
        (404, ask(daemon, "POST", f"{at}/instances/absent/stop", admin.secret)),
        (404, ask(daemon, "GET", "/v1/nowhere", admin.secret)),
        (409, ask(daemon, "DELETE", f"{at}/instances/web", admin.secret)),
    ]
    ask(daemon, "POST", f"{at}/images/import?name=x", admin.secret, b"x", rest=b"x" * 100)

    def told() -> list[Any]:
        names = (admin.name, viewer.name, "nobody")
        return [entry.get("status") for entry in new() if entry.get("user") in names]

    assert [status for status, _ in asked] == [status for _, status in asked]
    expected = [status for status, _ in asked]
    until(lambda: told()[: len(expected)] == expected and len(told()) == len(expected) + 1, "the upload that broke off")


def test_too_many_requests_are_lines(daemon: Daemon, people: People, new: Callable[[], list[dict[str, Any]]]) -> None:
    """One for each, as long as they are no flood."""
    daemon.cli.ok("tenant", "create", "hurried", "--requests", "1")
    try:
        member = people.person("member", "hurried")
        asked = [ask(daemon, "GET", "/v1/tenants/hurried", member.secret) for _ in range(12)]
    finally:
        daemon.cli.ok("tenant", "rm", "hurried")
    found = [entry for entry in new() if entry.get("user") == member.name]
    assert 200 in asked and 429 in asked
    assert [entry["status"] for entry in found] == [status for status in asked if status == 429]
    assert {(entry["error"], entry["tenant"]) for entry in found} == {("TooManyRequests", "hurried")}


def test_what_is_not_http_is_one_line(daemon: Daemon, new: Callable[[], list[dict[str, Any]]]) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(patiently(60))
        sock.connect(str(daemon.run / "users.sock"))
        sock.sendall(b"\0nonsense\r\n\r\n")
        assert sock.recv(65536).startswith(b"HTTP/1.1 400 ")
    [entry] = [entry for entry in new() if entry["verb"] == "not HTTP"]
    assert (entry["status"], entry["uid"], entry["pid"]) == (400, 0, os.getpid())


def test_reads_and_changes_of_a_member_have_who_and_how(
    houses: Houses, ann: Person, new: Callable[[], list[dict[str, Any]]]
) -> None:
    ann.cli.ok("exec", "web", "echo", "one", "two")
    ann.cli.ok("ps")
    begun, ended = [entry for entry in new() if entry.get("user") == ann.name]
    assert (begun["phase"], ended["phase"], ended["status"]) == ("begun", "ended", 200)
    assert begun["id"] == ended["id"] and begun["principal"] == ended["principal"] is not None
    assert (begun["program"], begun["arguments"]) == ("echo", "2") and "command" not in begun
    assert ended["sent"] > 8 and ended["received"] > 20 and ended["ms"] > 0


def test_a_tenant_may_have_arguments_recorded(daemon: Daemon, new: Callable[[], list[dict[str, Any]]]) -> None:
    daemon.cli.ok("tenant", "create", "watched", "--label", "insula-audit-arguments=yes")
    cli = daemon.cli.of("watched")
    try:
        cli.ok("network", "create", "default", "--subnet", "10.0.0.0/24")
        cli.ok("run", "-d", "--name", "web", "busybox", "sleep", "600")
        cli.ok("exec", "web", "echo", "a b")
    finally:
        daemon.cli.ok("tenant", "rm", "-f", "watched")
    assert {entry["command"] for entry in new() if "command" in entry} == {shlex.join(["echo", "a b"])}


def test_floods_of_attempts_are_counted(unstarted: Daemon) -> None:
    """The first are lines, and the rest a count, when its minute is over or at the end."""
    unstarted.start()
    for number in range(300):
        assert ask(unstarted, "GET", f"/v1/tenants/t{number}", "x") == 401
    assert unstarted.audit.stat().st_size < 20 * 600
    unstarted.stop()
    found = [json.loads(line) for line in unstarted.audit.read_text().splitlines()]
    single = [entry for entry in found if entry.get("status") == 401]
    [counted] = [entry for entry in found if "failed" in entry]
    assert len(single) + counted["failed"] == 300 and len(single) == 10
    assert (counted["source"], counted["results"]) == ("uid 0", {"401": counted["failed"]})


# -- kills -----------------------------------------------------------------------------------------------------------


def test_what_a_kill_interrupts_is_closed_as_unknown(unstarted: Daemon) -> None:
    """A change that is committed and not finished, and streams: each is there once, and said to be unknown."""
    daemon = unstarted
    daemon.start()
    daemon.cli.ok("run", "-d", "--name", "web", "busybox", "sh", "-c", "trap '' TERM; while :; do sleep 1; done")
    running = [daemon.cli.start("logs", "-f", "web"), daemon.cli.start("exec", "web", "sleep", "600")]
    try:

        def begun() -> bool:
            assert daemon.cli.ok("audit").count("  begun") == 2, daemon.cli.ok("audit")
            return True

        until(begun, "streams run")
        until(lambda: "sleep 600" in daemon.cli.ok("top", "web"), "the exec is not refused because of the stop")
        running.append(daemon.cli.start("stop", "-t", "600", "web"))
        until(lambda: daemon.cli.json("inspect", "web")[0]["instance"]["wanted"] == "stopped", "it is committed")
        daemon.kill("insulad")
    finally:
        for each in running:
            each.kill()
            each.communicate()
    daemon.launch()  # the stop goes on: it isn't waited for
    daemon.wait_until_it_answers()
    until(lambda: daemon.cli.ok("audit").count(UNKNOWN) == 3, "they are closed")
    closed = [entry for entry in entries(daemon) if entry.get("error") == UNKNOWN]
    verbs = sorted((entry["verb"].rpartition("/")[2], entry.get("phase"), entry["name"]) for entry in closed)
    assert verbs == [("exec", "ended", "web"), ("logs", "ended", "web"), ("stop", None, "web")]
    assert len({entry["id"] for entry in closed}) == 3 and all(entry["status"] is None for entry in closed)
    daemon.kill("insulad")
    daemon.launch()
    daemon.wait_until_it_answers()
    assert daemon.cli.ok("audit").count(UNKNOWN) == 3, "once"
    assert "checked by" in daemon.cli.ok("audit", "--verify")


def test_a_change_is_there_if_and_only_if_it_is_recorded(unstarted: Daemon) -> None:
    """insulad is killed while users are created: each one that exists has one line, and no other has one."""
    daemon, made = unstarted, 0

    def create_until_it_ends(first: int) -> None:
        client = Client(str(daemon.run / "insulad.sock"), timeout=patiently(30))
        for number in range(first, first + 10_000):
            try:
                client.identities.create_user(f"u{number}")
            except (InsulaError, OSError):
                return

    for kill in range(4):
        daemon.start()
        creators = [threading.Thread(target=create_until_it_ends, args=(10_000 * (4 * kill + n),)) for n in range(4)]
        for each in creators:
            each.start()
        until(lambda: len(daemon.cli.json("user", "ls")) > made + 20, "users are created")  # noqa: B023
        daemon.kill("insulad")
        for each in creators:
            each.join()
        made += 20
    daemon.start()
    users = {view["principal"]["name"] for view in daemon.cli.json("user", "ls")}
    lines = [entry for entry in entries(daemon) if entry["verb"] == "POST /v1/users"]
    assert len(users) > 80
    assert Counter(entry["name"] for entry in lines) == Counter(users)
    assert {entry["status"] for entry in lines} <= {201, None}
    assert "checked by" in daemon.cli.ok("audit", "--verify")


# -- a full disk -----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(unstarted: Daemon) -> Iterator[Path]:
    """A file system of 512 KiB that has the audit log."""
    path = unstarted.path / "disk"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k,nosuid,nodev", "audit", str(path)], check=True)
    try:
        yield path
    finally:
        unstarted.kill("insulad")
        subprocess.run(["umount", str(path)], check=True)


def test_changes_are_refused_while_they_can_not_be_recorded(unstarted: Daemon, small_disk: Path) -> None:
    daemon = unstarted
    daemon.audit = small_disk / "audit.log"
    daemon.configure()
    daemon.start()
    client = Client(str(daemon.run / "insulad.sock"), timeout=patiently(30))
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * (os.statvfs(small_disk).f_bavail * 4096))
    failures = 0
    for number in range(FULL + 100):
        try:
            client.instances.stop("default", f"absent-{number}")
        except Unavailable as error:
            assert "changes are refused" in error.message and "No space left" in error.message
            break
        except InsulaError:
            failures += 1
    else:
        raise AssertionError("all changes were served")
    assert failures >= FULL
    with pytest.raises(Unavailable, match="changes are refused"):
        client.tenants.create("refused")
    assert "refused" not in [view["tenant"]["name"] for view in client.tenants.list()], "reading goes on"
    assert any("audit log" in problem and "No space left" in problem for problem in client.host.status()["problems"])
    filler.unlink()

    def served() -> bool:
        try:
            client.tenants.create("served")
        except Unavailable:
            return False
        return True

    until(served, "changes are served again")
    client.tenants.remove("served")
    names = [entry["name"] for entry in client.host.audit()]
    assert [name for name in names if str(name).startswith("absent-")] == [f"absent-{n}" for n in range(failures + 1)]
    assert "checked by" in daemon.cli.ok("audit", "--verify")
    assert client.host.status()["problems"] == []


# -- secrets ---------------------------------------------------------------------------------------------------------

CANARY = "canary-5e4c-"


def watch(client: Client, told: list[str]) -> None:
    """Collect events, until the daemon or the role goes."""
    with suppress(InsulaError, OSError):
        for event in client.host.events():
            told.append(json.dumps(event))


def test_no_secret_of_a_request_is_in_any_output(
    daemon: Daemon, people: People, houses: Houses, ann: Person, tmp_path: Path
) -> None:
    """A canary in every field that may hold a secret, and all that insulad writes or says searched for it."""
    cli, told = ann.cli, list[str]()
    watching = threading.Thread(target=watch, args=(ann.client, told), daemon=True)
    watching.start()
    until(lambda: told or cli.run("run", "--rm", "busybox", "true").status, "events arrive", interval=0.1)
    cli.ok("run", "-d", "--name", "secretive", "-e", f"TOKEN={CANARY}env", "busybox", "sleep", "600")
    cli.ok("exec", "-e", f"TOKEN={CANARY}exec-env", "secretive", "true", f"{CANARY}argument")
    client = Client(str(daemon.run / "insulad.sock"), timeout=patiently(30))
    auth = {"username": "me", "password": f"{CANARY}password"}
    for reference in ("127.0.0.1:1/a/b", f"me:{CANARY}reference@127.0.0.1:1/a/b"):
        with pytest.raises(InsulaError) as refused:
            list(client.images.pull(str(houses.acme.tenant), reference, auth=auth, insecure=True))
        assert CANARY not in str(refused.value)
    other = Client(str(daemon.run / "users.sock"), token=f"insula_0123456789abcdef_{CANARY}token_00000000")
    with pytest.raises(InsulaError) as denied:
        other.identities.whoami()
    assert CANARY not in str(denied.value)
    assert ask(daemon, "GET", f"/v1/absent?token={CANARY}query", None) == 404
    assert (
        ask(daemon, "POST", f"/v1/tenants/{houses.acme.tenant}/instances", ann.secret, b'{"x":"' + CANARY.encode())
        == 400
    )
    daemon.cli.ok("audit", "head")
    until(lambda: any("secretive" in line for line in told), "the events have it")
    viewer = people.person("viewer", houses.acme.tenant)
    outputs = {
        "audit log": "".join(path.read_text() for path in daemon.path.glob("audit.log*")),
        "log": daemon.log.read_text(errors="replace"),
        "inspect of a viewer": viewer.cli.ok("inspect", "secretive"),
        "ps of a viewer": viewer.cli.ok("--json", "ps", "-a"),
        "dump of a viewer": viewer.cli.ok("dump"),
        "ps": cli.ok("ps", "-a"),
        "top": cli.ok("top", "secretive"),
        "explain of a viewer": viewer.cli.ok("--json", "explain", "secretive"),
        "usage": cli.ok("--json", "usage"),
        "metrics": client.host.metrics() + client.tenants.metrics(str(houses.acme.tenant)),
        "events": "\n".join(told),
        "arguments of processes": subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout,
        "status": daemon.cli.ok("--json", "status"),
    }
    assert [name for name, text in outputs.items() if CANARY in text] == []
    for name in ("audit log", "inspect of a viewer", "ps of a viewer", "dump of a viewer", "ps", "metrics", "events"):
        assert "secretive" in outputs[name], f"the control: {name} tells of the instance"
    assert f"{CANARY}env" in cli.ok("inspect", "secretive"), "the control: its owner may see it"
    cli.ok("rm", "-f", "secretive")
    with pytest.raises(Denied):
        viewer.client.instances.remove(str(houses.acme.tenant), "web")
