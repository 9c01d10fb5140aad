"""Fixtures of the peer tests: real engines whose OCI runtime is `insula-oci`.

engine   podman or docker
podman   podman alone; so are
docker   and
ctr
         After a test its containers are removed, and nothing may be there that was not before.
bench    makes the engines, and the files that they work on
oci      insula-oci, runc and crun, one after the other, without an engine

`pytest tests/peer --runtime runc` runs the same steps with another runtime: what fails there too is the engine's fault,
or the test's. test_control.py does so for one container of each engine, always.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from tests.support import machine, peers
from tests.support.peers import Containerd, Docker, Engine, Host, Missing, Podman
from tests.support.runtimes import HOST, NAMES, Runtime, runtimes
from tests.support.snapshot import Snapshot, assert_unchanged
from tests.support.wait import until


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = None if machine.possible() else "peer tests take root and the programs unshare, ip and tini"
    try:
        peers.require()
    except Missing as problem:
        reason = reason or str(problem)
    if reason is not None:
        for item in items:
            if "/peer/" in str(item.path):
                item.add_marker(pytest.mark.skip(reason=reason))


class Bench:
    """Makes each engine once, when a test first asks for it."""

    def __init__(self) -> None:
        self.run = machine.Run()
        self.path = self.run.path
        self.rootfs = peers.root_file_system(self.path / "rootfs")
        self.archive = peers.archive_of(self.rootfs, self.path / "rootfs.tar")
        self._made: dict[tuple[str, str], Engine] = {}

    def engine(self, kind: str, runtime: str) -> Engine:
        if (kind, runtime) not in self._made:
            program = peers.launcher(self.path) if runtime == "insula-oci" else f"/usr/sbin/{runtime}"
            name = f"{kind}-{runtime}"
            path, parent = self.path / name, f"{self.run.name}/{name}"
            match kind:
                case "podman":
                    engine: Engine = Podman(path, parent, program, self.archive)
                case "docker":
                    engine = Docker(path, parent, program, self.archive)
                case _:
                    engine = Containerd(path, parent, program)
            self._made[kind, runtime] = engine
            self.warm(engine)
        return self._made[kind, runtime]

    def warm(self, engine: Engine) -> None:
        """One container, because the first leaves directories and lock files that stay."""
        before = self.snapshot(engine).processes
        if isinstance(engine, Containerd):
            group = f"--cgroup=/{engine.parent}/warm"
            engine.ok("run", "--rm", group, *engine.options, "--rootfs", self.rootfs, "warm", "/bin/true")
        else:
            engine.ok("run", "--rm", peers.IMAGE, "true")
        until(lambda: self.snapshot(engine).processes <= before, "what cleans up has ended")

    def snapshot(self, engine: Engine) -> Snapshot:
        """A snapshot of everything that an engine could leave behind."""
        pid = engine.host.pid
        found = Snapshot.take(self.run.name, f"/proc/{pid}/ns/net", engine.host.root / "run", holder=pid)
        # podman mounts its store over itself while it is at work; docker0 gets addresses with its first port;
        # compiled seccomp programs are kept, and the group below which all containers are, in each hierarchy once used
        return replace(
            found,
            mounts=frozenset(m for m in found.mounts if "/data/overlay " not in m),
            cgroups=frozenset(c for c in found.cgroups if not c.endswith(engine.parent)),
            files=frozenset(f for f in found.files if "/insula-oci-seccomp" not in f),
            routes=frozenset(r for r in found.routes if "dev docker0" not in r),
        )

    def close(self) -> None:
        for engine in self._made.values():
            engine.close()
        self.run.close()


@pytest.fixture(scope="session")
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.close()


@pytest.fixture(scope="session")
def runtime(pytestconfig: pytest.Config) -> str:
    return str(pytestconfig.getoption("--runtime"))


@pytest.fixture(params=["podman", "docker"])
def engine(request: pytest.FixtureRequest, bench: Bench, runtime: str) -> Iterator[Engine]:
    yield from guarded(bench.engine(str(request.param), runtime), bench)


@pytest.fixture
def podman(bench: Bench, runtime: str) -> Iterator[Engine]:
    yield from guarded(bench.engine("podman", runtime), bench)


@pytest.fixture
def docker(bench: Bench, runtime: str) -> Iterator[Engine]:
    yield from guarded(bench.engine("docker", runtime), bench)


@pytest.fixture
def ctr(bench: Bench, runtime: str) -> Iterator[Containerd]:
    yield from guarded(bench.engine("ctr", runtime), bench)


@pytest.fixture(scope="session")
def three(bench: Bench) -> Iterator[dict[str, Runtime]]:
    path = bench.path / "runtimes"
    path.mkdir()
    host = Host(HOST)
    made = runtimes(path, host, f"{bench.run.name}/runtimes")
    yield made
    for each in made.values():
        each.close()
    host.close()


@pytest.fixture(params=NAMES)
def oci(request: pytest.FixtureRequest, three: dict[str, Runtime]) -> Iterator[Runtime]:
    runtime = three[request.param]
    yield runtime
    runtime.clear()


def guarded(engine: Any, bench: Bench) -> Iterator[Any]:
    """The engine; afterwards what the test left is removed, and nothing more may be there than before."""

    before = bench.snapshot(engine)
    yield engine
    engine.clear()
    assert_unchanged(before, lambda: bench.snapshot(engine))
