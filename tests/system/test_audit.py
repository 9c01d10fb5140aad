"""The audit log of a real daemon: each change and each read of an instance's data once, with user and result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from insula.client import Client
from insula.model.errors import InsulaError
from tests.support.cli import Cli
from tests.support.daemon import Daemon
from tests.support.wait import patiently

NOBODY = 65534
SECRET = "correct-horse-battery"


@pytest.fixture
def since(daemon: Daemon) -> int:
    """How many lines the log has when the test begins."""
    return len(daemon.cli.ok("--json", "audit").splitlines())


def entries(daemon: Daemon, since: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in daemon.cli.ok("--json", "audit").splitlines()[since:]]


def told(found: list[dict[str, Any]]) -> list[tuple[str, str | None, Any]]:
    """(what was asked for, the object's name, status or that it has begun)."""
    return [(e["verb"].replace("/v1/tenants/{tenant}/", ""), e["name"], e.get("status", e.get("phase"))) for e in found]


def test_each_change_is_recorded_once(daemon: Daemon, cli: Cli, since: int) -> None:
    before = datetime.now(UTC)
    cli.ok("run", "-d", "--name", "web", "busybox", "sleep", "600")
    cli.ok("ps")
    cli.ok("inspect", "web")
    cli.ok("top", "web")
    cli.ok("exec", "web", "true")
    cli.ok("logs", "web")
    cli.raw("cp", "web:/etc/hosts", "-")
    cli.ok("rename", "web", "site")
    cli.ok("kill", "-s", "USR1", "site")
    cli.fails("rm", "site")
    cli.fails("stop", "absent")
    cli.fails("run", "-d", "--name", "site", "busybox", "true", status=125)
    cli.ok("rm", "-f", "site")
    found = entries(daemon, since)
    assert told(found) == [
        ("POST instances", "web", 201),
        ("POST instances/{name}/exec", "web", "begun"),
        ("POST instances/{name}/exec", "web", 200),
        ("GET instances/{name}/logs", "web", "begun"),
        ("GET instances/{name}/logs", "web", 200),
        ("GET instances/{name}/archive", "web", "begun"),
        ("GET instances/{name}/archive", "web", 200),
        ("POST instances/{name}/rename", "web", 200),
        ("POST instances/{name}/kill", "site", "begun"),
        ("POST instances/{name}/kill", "site", 204),
        ("DELETE instances/{name}", "site", 409),
        ("POST instances/{name}/stop", "absent", 404),
        ("POST instances", "site", 409),
        ("DELETE instances/{name}", "site", 204),
    ]
    assert {(entry["tenant"], entry["uid"], entry["gid"]) for entry in found} == {(cli.tenant, 0, 0)}
    assert all(entry["socket"] == str(daemon.run / "insulad.sock") for entry in found)
    failed = [entry for entry in found if entry.get("status", 0) >= 400]
    assert [entry["error"] for entry in failed] == ["Conflict", "NotFound", "Conflict"]
    assert [entry["to"] for entry in found if "to" in entry] == ["site"]
    assert len({entry["id"] for entry in found}) == len(found) - 4, "four have two lines"
    assert len({entry["pid"] for entry in found}) == len(found) - 4, "each command was a process of its own"
    assert [entry["seq"] for entry in found] == [*range(found[0]["seq"], found[0]["seq"] + len(found))]
    [executed] = [entry for entry in found if entry["verb"].endswith("/exec") and entry["phase"] == "ended"]
    assert (executed["program"], executed["arguments"]) == ("true", "0")
    [copied] = [entry for entry in found if entry["verb"].endswith("/archive") and entry["phase"] == "ended"]
    assert copied["sent"] >= 1024, "a tar"
    times = [datetime.fromisoformat(entry["time"]) for entry in found]
    assert times == sorted(times)
    assert before <= times[0] <= times[-1] <= datetime.now(UTC)


def test_a_foreground_run_is_one_record_and_waiting_none(daemon: Daemon, cli: Cli, since: int) -> None:
    assert cli.ok("run", "--name", "job", "busybox", "echo", "hi") == "hi"
    cli.ok("wait", "job")
    found = told(entries(daemon, since))
    assert found == [("POST run", "job", "begun"), ("POST run", "job", 200)]


def test_changes_of_tenants_networks_and_images_are_recorded(daemon: Daemon, since: int) -> None:
    cli = daemon.cli
    cli.ok("tenant", "create", "audited")
    own = cli.of("audited")
    own.ok("network", "create", "lan", "--subnet", "10.0.0.0/24")
    own.ok("image", "tag", "busybox", "mine")
    own.ok("image", "rm", "mine")
    own.ok("network", "rm", "lan")
    cli.ok("tenant", "rm", "audited")
    found = entries(daemon, since)
    assert {entry["tenant"] for entry in found} == {"audited"}
    assert told(found) == [
        ("POST /v1/tenants", "audited", 201),
        ("POST networks", "lan", 201),
        ("POST images/tag", "busybox", 201),
        ("DELETE images/{name}", "mine", 204),
        ("DELETE networks/{network}", "lan", 204),
        ("DELETE /v1/tenants/{tenant}", None, 204),
    ]


def test_the_log_has_no_secrets(daemon: Daemon, cli: Cli, since: int) -> None:
    cli.ok("run", "-d", "--name", "web", "-e", f"TOKEN={SECRET}", "busybox", "sleep", "600")
    cli.ok("exec", "-e", f"TOKEN={SECRET}", "web", "echo", SECRET)
    client = Client(str(daemon.run / "insulad.sock"), timeout=patiently(30))
    auth = {"username": "me", "password": SECRET}
    for reference in ("127.0.0.1:1/a/b", f"me:{SECRET}@127.0.0.1:1/a/b"):
        with suppress(InsulaError):
            list(client.images.pull(str(cli.tenant), reference, auth=auth, insecure=True))
    found = entries(daemon, since)
    found = [entry for entry in found if entry.get("phase") != "begun"]
    assert [entry["name"] for entry in found] == ["web", "web", "127.0.0.1:1/a/b", "127.0.0.1:1/a/b"], "the control"
    assert all("error" in entry for entry in found[2:]), "the pulls failed after their answers had begun"
    assert SECRET not in daemon.audit.read_text()


def ask_as(uid: int, daemon: Daemon, head: bytes) -> bytes:
    """The answer to one request of a process of this user, which connects by a relative path."""
    program = (
        "import os, socket, sys\n"
        f"os.setgroups([]); os.setgid({uid}); os.setuid({uid})\n"
        "s = socket.socket(socket.AF_UNIX); s.connect('insulad.sock')\n"
        "s.sendall(sys.stdin.buffer.read())\n"
        "while data := s.recv(65536): sys.stdout.buffer.write(data)\n"
    )
    command = [sys.executable, "-c", program]
    return subprocess.run(command, input=head, capture_output=True, check=True, cwd=daemon.run).stdout


def test_denied_users_are_recorded(daemon: Daemon, since: int) -> None:
    socket = daemon.run / "insulad.sock"
    mode = socket.stat().st_mode & 0o777
    socket.chmod(0o666)
    try:
        answer = ask_as(NOBODY, daemon, b"GET /v1/tenants HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    finally:
        socket.chmod(mode)
    assert answer.startswith(b"HTTP/1.1 403 ")
    [entry] = entries(daemon, since)
    assert (entry["uid"], entry["gid"], entry["status"], entry["error"]) == (NOBODY, NOBODY, 403, "Denied")
    assert entry["verb"] == "GET /v1/tenants"
    assert f"nobody({NOBODY})" in daemon.cli.ok("audit", "--who", "nobody")


HOSTILE = "x%0A%7B%22uid%22%3A7%7D%0A%1B%5B2J"


def test_names_cannot_forge_a_line(daemon: Daemon, since: int) -> None:
    for path in (f"/v1/tenants/{HOSTILE}/instances/{HOSTILE}/stop", f"/v1/{HOSTILE}"):
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        assert ask_as(0, daemon, head.encode()).startswith(b"HTTP/1.1 4")
    found = entries(daemon, since)
    assert len(found) == 2
    assert [entry["uid"] for entry in found] == [0, 0]
    assert found[0]["name"] == 'x\n{"uid":7}\n\x1b[2J'
    content = daemon.audit.read_bytes()
    assert content.isascii()
    assert all("seq" in json.loads(line) for line in content.splitlines())
    assert b"\x1b" not in content
    assert "\x1b" not in daemon.cli.ok("audit")


def test_events_show_requests_between_changes(daemon: Daemon, cli: Cli) -> None:
    revision = cli.json("status")["revision"]
    found: list[dict[str, Any]] = []
    with cli.start("--json", "events", "--audit", "--from-revision", str(revision)) as watching:
        assert watching.stdout
        cli.ok("network", "create", "marker", "--subnet", "10.7.0.0/24")
        found.append(json.loads(watching.stdout.readline()))  # it watches by now
        cli.ok("network", "rm", "marker")
        cli.fails("network", "rm", "marker")
        while not (found[-1]["kind"] == "request" and found[-1]["status"] == 404):
            found.append(json.loads(watching.stdout.readline()))
        watching.kill()
    removed = [(e["kind"], e["action"]) for e in found if e["name"] == "marker" and "create" not in e["action"]]
    assert sorted(removed)[:2] == [
        ("network", "removed"),
        ("request", "DELETE /v1/tenants/{tenant}/networks/{network}"),
    ]
    assert [(e["uid"], e["status"]) for e in found if e["kind"] == "request"][-2:] == [(0, 204), (0, 404)]
    assert isinstance(found[-1]["time"], float)
    with cli.start("events", "--from-revision", str(revision)) as watching:  # the control: without the option
        cli.ok("network", "create", "last", "--subnet", "10.8.0.0/24")
        cli.ok("network", "rm", "last")
        assert watching.stdout
        lines: list[str] = []
        while not lines or "network removed" not in lines[-1] or "last" not in lines[-1]:
            lines.append(watching.stdout.readline())
        watching.kill()
    assert not [line for line in lines if "request" in line]


def test_filters_of_the_command(daemon: Daemon, cli: Cli) -> None:
    cli.ok("run", "-d", "--name", "web", "busybox", "sleep", "600")
    mine = daemon.cli.ok("-T", str(cli.tenant), "audit").splitlines()
    assert mine
    assert all(str(cli.tenant) in line for line in mine)
    assert len(mine) < len(daemon.cli.ok("audit").splitlines())
    assert f"POST /v1/tenants/{{tenant}}/instances {cli.tenant}/web  201" in mine[-1]
    assert daemon.cli.ok("audit", "--since", "2100-01-01") == ""
    hour_ago = (datetime.now(UTC) - timedelta(hours=1)).isoformat()
    assert daemon.cli.ok("audit", "--since", hour_ago) == daemon.cli.ok("audit", "--since", "1d")
    assert "root(0)" in daemon.cli.ok("audit", "--who", "root")
    assert daemon.cli.ok("audit", "--who", "4294967294") == ""
    assert "there is no user" in daemon.cli.fails("audit", "--who", "no-such-user", status=2)


def test_an_orderly_end_loses_nothing_and_the_next_daemon_goes_on(unstarted: Daemon) -> None:
    unstarted.configure(audit='size = "64k"\nfiles = 9')
    unstarted.start()
    client = Client(str(unstarted.run / "insulad.sock"), timeout=patiently(30))
    for number in range(300):  # about a hundred kilobytes: more than one file
        with suppress(InsulaError):
            client.instances.stop("default", f"absent-{number}")
    unstarted.stop()
    unstarted.start()
    found = [json.loads(line) for line in unstarted.cli.ok("--json", "audit").splitlines()]
    assert [entry["name"] for entry in found] == [f"absent-{number}" for number in range(300)]
    assert {"audit.log", "audit.log.1"} < {path.name for path in unstarted.path.glob("audit.log*")}
    assert "checked by" in unstarted.cli.ok("audit", "--verify")
    assert unstarted.audit.stat().st_mode & 0o7777 == 0o640
    assert all(path.stat().st_size <= 64 << 10 for path in unstarted.path.glob("audit.log*"))


def test_a_log_that_cannot_be_written_is_a_problem_and_stops_nobody(unstarted: Daemon) -> None:
    unstarted.audit.mkdir()
    unstarted.start()
    unstarted.cli.ok("run", "--rm", "busybox", "true")
    assert f"audit log: {unstarted.audit} can't be written" in "\n".join(unstarted.cli.json("status")["problems"])
    unstarted.audit.rmdir()
    unstarted.cli.ok("tenant", "create", "acme")
    verbs = [json.loads(line)["verb"].rpartition("/")[2] for line in unstarted.cli.ok("--json", "audit").splitlines()]
    assert verbs == ["run", "run", "tenants"], "what happened meanwhile is there"
    assert unstarted.cli.json("status")["problems"] == []
    assert os.path.isfile(Path(unstarted.audit))
