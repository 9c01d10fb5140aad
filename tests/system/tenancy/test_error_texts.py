"""What a member is told when something fails shows nothing of the host and nothing of others.

Each way to fail is tried by a member over the API, some after the host was broken behind insulad's back. Then all that
the member can read is searched: the answers, the instance's status and `explain`, events.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from insula.client import Client
from tests.support.daemon import Daemon
from tests.support.images import member, tar
from tests.support.machine import Run
from tests.support.wait import patiently
from tests.system.tenancy.conftest import People, Person
from tests.system.tenancy.http import HttpAnswer, exchange

OWN, OTHER = "acme", "zebrafish"


LAST_PID = Path("/proc/sys/kernel/ns_last_pid")  # of this PID namespace, which is the tests' own


@pytest.fixture(scope="module")
def host(run_: Run) -> Iterator[Daemon]:
    daemon = Daemon(run_)
    try:
        large = max(20_000, int(LAST_PID.read_text()))  # a small number, as in "/24", is in many texts
        LAST_PID.write_text(str(large))
        daemon.start()
        operator = Client(str(daemon.run / "insulad.sock"), timeout=patiently(60))
        for tenant in (OTHER, OWN):
            operator.tenants.create(tenant)
            operator.networks.create(tenant, "default", "10.0.0.0/24")
            daemon.cli.of(tenant).ok("run", "-d", "--name", "web", "busybox", "sleep", "600")
        yield daemon
    finally:
        daemon.remove()


@pytest.fixture(scope="module")
def ann(host: Daemon, tmp_path_factory: pytest.TempPathFactory) -> Person:
    return People(host, tmp_path_factory.mktemp("tokens")).person("member", OWN)


class Secrets(NamedTuple):
    """What nobody but the operator may read: texts, and PIDs on the host."""

    texts: tuple[str, ...]
    pids: frozenset[str]

    def found_in(self, text: str) -> list[str]:
        numbers = set(re.findall(r"(?<![\w.:-])\d+(?![\w.:-])", text))
        return [each for each in self.texts if each in text] + sorted(self.pids & numbers)


def secrets_of(host: Daemon) -> Secrets:
    own = {str(host.pid(name)) for name in ("insulad", "monitor", "zygote")}
    status = [view["status"] for tenant in (OWN, OTHER) for view in host.cli.of(tenant).json("ps", "-a")]
    pids = own | {str(each["pid"]) for each in status if each.get("pid")}
    texts = (str(host.path), host.prefix, "/proc/", "/sys/fs/cgroup", "/var/lib/insula", "/run/insula", OTHER)
    return Secrets(texts, frozenset(pids))


class Member(NamedTuple):
    """The requests of a member, and all that was answered."""

    host: Daemon
    token: str
    heard: list[HttpAnswer]

    def __call__(self, method: str, path: str, body: object = None) -> HttpAnswer:
        answer = exchange(self.host.run / "users.sock", method, f"/v1/tenants/{OWN}/{path}", body, token=self.token)
        self.heard.append(answer)
        return answer

    def run(self, **spec: Any) -> HttpAnswer:
        return self("POST", "instances", {"image": "busybox", "command": ["true"], "name": "x", **spec})

    def upload(self, path: str, data: bytes, method: str = "POST") -> HttpAnswer:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(15)
            sock.connect(str(self.host.run / "users.sock"))
            head = f"{method} /v1/tenants/{OWN}/{path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
            head += f"authorization: Bearer {self.token}\r\ncontent-length: {len(data)}\r\n\r\n"
            sock.sendall(head.encode() + data)
            answer = b""
            while piece := sock.recv(65536):
                answer += piece
        status = int(answer.split()[1])
        self.heard.append(HttpAnswer(status, {}, answer))
        return self.heard[-1]


Way = Callable[[Member], object]


def imported(*members: Any) -> Way:
    """Run an image with these members beside a program that does not work anyway."""

    def way(member_: Member) -> None:
        member_.upload("images/import?name=odd", tar(member("sh", b"#!/no/interpreter\n", mode=0o755), *members))
        member_.run(image="odd", command=["/sh"])
        member_.run(image="odd", command=["/sh"], user="somebody", name="y")

    return way


def on(address: str) -> list[dict[str, str]]:
    """The default network, with this address there."""
    return [{"network": "default", "address": address}]


WAYS: dict[str, Way] = {
    "no such image": lambda m: m.run(image="nothing:here"),
    "no such program": lambda m: m.run(command=["/no/such/program"]),
    "a directory as program": lambda m: m.run(command=["/etc"]),
    "no such user": lambda m: m.run(user="nobody-here"),
    "a working directory that is a file": lambda m: m.run(working_dir="/etc/passwd"),
    "a mount on a file": lambda m: m.run(mounts=[{"type": "tmpfs", "path": "/etc/passwd"}]),
    "little memory": lambda m: m.run(resources={"memory": 1}),
    "one process": lambda m: m.run(resources={"pids": 1}, command=["sh", "-c", "true | true"]),
    "an address that is taken": lambda m: (m.run(networks=on("10.0.0.2")), m.run(networks=on("10.0.0.2"), name="y")),
    "an address outside": lambda m: m.run(networks=on("10.9.9.9")),
    "no such network": lambda m: m.run(networks=[{"network": "nowhere"}]),
    "a PID namespace of nobody": lambda m: m.run(options={"kind": "container", "pid_of": "nobody"}),
    "a capability": lambda m: m.run(options={"kind": "container", "cap_add": ["SYS_ADMIN"]}),
    "a health check that fails": lambda m: m.run(command=["sleep", "60"], healthcheck={"test": ["CMD", "/no/such"]}),
    "exec of nothing": lambda m: m("POST", "instances/web/processes", {"command": ["/no/such/program"]}),
    "exec in no directory": lambda m: m(
        "POST", "instances/web/processes", {"command": ["true"], "working_dir": "/no/such"}
    ),
    "exec as nobody": lambda m: m("POST", "instances/web/processes", {"command": ["true"], "user": "nobody-here"}),
    "exec in what doesn't run": lambda m: (
        m.run(),
        m("POST", "instances/x/wait"),
        m("POST", "instances/x/processes", {"command": ["true"]}),
        m("POST", "instances/x/pause"),
        m("GET", "instances/x/top"),
    ),
    "copy of nothing": lambda m: m("GET", "instances/web/archive?path=/no/such/file"),
    "copy through a file": lambda m: m("GET", "instances/web/archive?path=/etc/passwd/x"),
    "copy of a process": lambda m: m("GET", "instances/web/archive?path=/dev/shm/../../dev/console/x"),
    "copy into nothing": lambda m: m.upload("instances/web/archive?path=/no/such", tar(member("a", b"a")), "PUT"),
    "copy of no archive": lambda m: m.upload("instances/web/archive?path=/tmp", b"x" * 2000, "PUT"),
    "copy of a long name": lambda m: m.upload("instances/web/archive?path=/tmp", tar(member("a" * 300, b"a")), "PUT"),
    "copy onto a directory": lambda m: m.upload("instances/web/archive?path=/", tar(member("etc", b"a")), "PUT"),
    "import of no archive": lambda m: m.upload("images/import?name=odd", b"x" * 2000),
    "load of no archive": lambda m: m.upload("images/load", b"x" * 2000),
    "load of an empty archive": lambda m: m.upload("images/load", tar(member("a", b"a"))),
    "import of a path upward": lambda m: m.upload("images/import?name=odd", tar(member("../../a", b"a"))),
    "an image without interpreter": imported(),
    "an image whose proc is a file": imported(member("proc", b"x")),
    "an image whose etc is a link": imported(member("etc", linkname="/etc")),
    "an image whose passwd is a directory": imported(member("etc"), member("etc/passwd")),
    "an image whose dev is a link": imported(member("dev", linkname="../../../..")),
    "a network that overlaps": lambda m: m("POST", "networks", {"name": "n", "subnet": "10.0.0.0/16"}),
    "a network of the host": lambda m: m("POST", "networks", {"name": "n", "subnet": "127.0.0.0/8"}),
    "a network without room": lambda m: m("POST", "networks", {"name": "n", "subnet": "10.7.0.0/31"}),
    "a network that is used": lambda m: m("DELETE", "networks/default"),
    "a signal that doesn't exist": lambda m: m("POST", "instances/web/kill?signal=SIGNO"),
    "less memory than is used": lambda m: m("PATCH", "instances/web", {"memory": 6 << 20}),
    "another tenant's object": lambda m: m("POST", "apply", {"set": "s", "files": [], "allow_empty": False}),
}


@contextmanager
def moved(path: Path, replacement: str | None = None) -> Iterator[None]:
    """A path of the host is away, or has a file in its place."""
    aside = path.with_name(path.name + ".aside")
    path.rename(aside)
    try:
        if replacement is not None:
            path.write_text(replacement)
        yield
    finally:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        aside.rename(path)


def everything(m: Member) -> None:
    """What a member does in a day."""
    m.run(command=["sleep", "60"], stop_timeout=0)
    m("POST", "instances/x/processes", {"command": ["true"]})
    m("GET", "instances/x/archive?path=/etc/hostname")
    m.upload("instances/x/archive?path=/tmp", tar(member("a", b"a")), "PUT")
    m("GET", "instances/x/logs")
    m("POST", "instances/x/restart")
    m("POST", "networks", {"name": "n", "subnet": "10.77.0.0/24"})
    m("DELETE", "networks/n")
    m.upload("images/import?name=odd", tar(member("a", os.urandom(20))))


FAULTS: dict[str, Callable[[Daemon], Any]] = {
    "no layers": lambda host: moved(host.root / "images" / "layers"),
    "no blobs": lambda host: moved(host.root / "images" / "blobs", "x"),
    "no instances": lambda host: moved(host.root / "instances", "x"),
    "no mount points": lambda host: moved(host.root / "mountpoints", "x"),
    "no run directory": lambda host: moved(host.run / "containers", "x"),
}


def clean(m: Member) -> None:
    for name in ("x", "y"):
        m("DELETE", f"instances/{name}?force=true")
    m("DELETE", "images/odd")
    m("DELETE", "networks/n")


def read_all(m: Member) -> None:
    """All that shows how it went."""
    for path in ("", "/x", "/y", "/x/explain", "/y/explain", "/x/logs"):
        m("GET", f"instances{path}")
    m("GET", "usage")
    m("GET", "metrics")


def told(host: Daemon, ann: Person, way: Way) -> list[str]:
    """What a member could not know otherwise, in the answers to what was tried. At least one is an error."""
    secrets, m = secrets_of(host), Member(host, ann.secret, [])
    way(m)
    assert any(each.status >= 400 or b"error" in each.body for each in m.heard), [each.body[:300] for each in m.heard]
    read_all(m)
    late = secrets_of(host)
    clean(m)
    texts = [each.body.decode("utf-8", "replace") for each in m.heard]
    for text in texts:
        if os.environ.get("SHOW") and ('"code"' in text or '"error"' in text):
            print("   ", re.findall(r'"(?:detail|error)":"(.*?)","', text), re.findall(r'"hint":"(.*?)"[,}]', text))
    return [f"{found} in {text[:600]}" for text in texts for found in {*secrets.found_in(text), *late.found_in(text)}]


def test_what_is_searched_for_is_found(host: Daemon) -> None:
    """The positive control: what the operator reads has all of it."""
    secrets = secrets_of(host)
    shown = host.cli.of(OWN).ok("--json", "explain", "web") + host.cli.ok("tenant", "ls")
    assert {*secrets.found_in(shown)} >= {str(host.path), "/sys/fs/cgroup", OTHER}
    assert secrets.found_in(f"process {host.pid('insulad')} has failed") == [str(host.pid("insulad"))]


@pytest.mark.parametrize("name", WAYS)
def test_ways_to_fail(host: Daemon, ann: Person, name: str) -> None:
    assert told(host, ann, WAYS[name]) == []


@pytest.mark.parametrize("name", FAULTS)
def test_faults_of_the_host(host: Daemon, ann: Person, name: str) -> None:
    with FAULTS[name](host):
        found = told(host, ann, everything)
    assert found == []
