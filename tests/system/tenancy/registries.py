"""A host with a registry outside, and members of two tenants who pull from it."""

from __future__ import annotations

import contextlib
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from insula.model.errors import InsulaError
from tests.support import machine
from tests.support.daemon import Daemon
from tests.support.machine import Namespaces
from tests.support.outside import PASSWORD, PORT
from tests.support.wait import patiently, until
from tests.system.tenancy.conftest import People, Person

OWN = Namespaces.OUTSIDE
LAN, METADATA = "10.88.0.1", "169.254.169.254"
STORE = 5000  # of a registry that takes images


class Server:
    """A process in a network namespace that prints lines, which `lines` collects."""

    def __init__(self, namespace: str, *words: str) -> None:
        command = Namespaces.wrap(namespace, sys.executable, "-m", "tests.support.outside", *words)
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3])
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        for _ in words[1:]:
            assert self.next() == "ready"

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self._lines.put(line.strip())

    def next(self) -> str:
        """The next line; waits for it."""
        return self._lines.get(timeout=patiently(20))

    def lines(self) -> list[str]:
        """The lines since the last call."""
        found = []
        with contextlib.suppress(queue.Empty):
            while True:
                found.append(self._lines.get_nowait())
        return found

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


class World(NamedTuple):
    daemon: Daemon
    people: People
    registry: Server
    ann: Person
    bob: Person

    def tenant(self, person: Person) -> str:
        return str(person.cli.tenant)

    def netns(self, person: Person) -> str:
        return str(machine.NETNS / f"{self.daemon.prefix}-{person.cli.tenant}")


@contextlib.contextmanager
def open_world(run: machine.Run, directory: Path) -> Iterator[World]:
    """An insulad whose name server is outside, and members of two tenants that have the same subnet."""
    with contextlib.ExitStack() as stack:
        daemon = Daemon(run)
        stack.callback(daemon.remove)
        spaces = daemon.namespaces
        registry = Server(spaces.outside, "registry", OWN)
        stack.callback(registry.close)
        daemon.configure(f'[network]\nresolvers = ["{OWN}"]\n')
        for name in ("http_proxy", "HTTPS_PROXY"):  # of the host; nobody is there, so a pull that uses it fails
            daemon.environment[name] = "http://127.0.0.1:9"
        daemon.environment["no_proxy"] = LAN
        spaces.ip(spaces.host, "link add lan0 type veth peer name lan1")
        spaces.ip(spaces.host, f"address add {LAN}/24 dev lan0")
        spaces.ip(spaces.host, "link set lan0 up")
        spaces.ip(spaces.outside, f"address add {METADATA}/32 dev lo")
        daemon.start()
        stack.enter_context(docker_registry(spaces.outside, directory))
        people = People(daemon, directory)
        for name in ("acme", "globex"):
            daemon.cli.ok("tenant", "create", name)
            daemon.cli.of(name).ok("network", "create", "default", "--subnet", "10.0.0.0/24")
        ann, bob = people.person("member", "acme"), people.person("member", "globex")
        yield World(daemon, people, registry, ann, bob)


@contextlib.contextmanager
def docker_registry(namespace: str, directory: Path) -> Iterator[None]:
    """Debian's docker-registry, which takes images, outside."""
    (directory / "config.yml").write_text(
        f"version: 0.1\nlog: {{level: error}}\nhttp: {{addr: '{OWN}:{STORE}'}}\n"
        f"storage: {{filesystem: {{rootdirectory: {directory}/data}}}}\n"
    )
    command = Namespaces.wrap(namespace, "docker-registry", "serve", str(directory / "config.yml"))
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until(lambda: connects(namespace, OWN, STORE) or process.poll() is not None, "docker-registry answers")
        yield
    finally:
        process.kill()
        process.wait()


def devices(world: World, person: Person) -> str:
    return world.daemon.namespaces.ip(world.netns(person), "-brief link")


def member_of_new(world: World, tenant: str) -> Person:
    world.daemon.cli.ok("tenant", "create", tenant)
    world.daemon.cli.of(tenant).ok("network", "create", "default", "--subnet", "10.0.0.0/24")
    return world.people.person("member", tenant)


def pull(person: Person, reference: str, **options: object) -> list[str]:
    """The lines of progress of a pull."""
    steps = person.client.images.pull(str(person.cli.tenant), reference, **{"insecure": True, **options})
    return [step["progress"] for step in steps if "progress" in step]


def refusal(person: Person, reference: str, **options: object) -> InsulaError:
    with pytest.raises(InsulaError) as error:
        pull(person, reference, **options)
    return error.value


def connects(namespace: str, address: str, port: int) -> bool:
    code = f"import socket; socket.create_connection(({address!r}, {port}), 1)"
    command = Namespaces.wrap(namespace, sys.executable, "-c", code)
    return subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode == 0


def pids(daemon: Daemon) -> list[int]:
    """skopeo and its parents that have its namespace."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            text = path.read_bytes()
            if b"skopeo" in text and str(daemon.root).encode() in text:
                found.append(int(path.parent.name))
    return found


@contextlib.contextmanager
def hanging(
    world: World, person: Person, reference: str = f"hang.test:{PORT}/app:1"
) -> Iterator[subprocess.Popen[str]]:
    """A pull that never ends, and waits for a layer; it has a login."""
    world.registry.lines()
    command = person.cli.command("image", "pull", "--insecure", "-u", "ada", reference)
    environment = {**person.cli.environment(), "INSULA_REGISTRY_PASSWORD": PASSWORD}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, text=True, stdout=pipe, stderr=pipe) as process:
        try:
            until(lambda: "/blobs/" in world.registry.next(), "it asks for a layer")
            assert pids(world.daemon) and "egress0" in devices(world, person)
            yield process
        finally:
            process.kill()
            process.communicate()
            until(lambda: nothing_is_left(world, person), "the pull leaves nothing")


def nothing_is_left(world: World, person: Person) -> bool:
    staged = list((world.daemon.root / "images" / "tmp").iterdir())
    return not pids(world.daemon) and "egress" not in devices(world, person) and not staged
