"""Fixtures of the tests that are the same for all kinds of instances: containers, and machines of the same image.

kind    one of the kinds, for all tests of a module
sleeper an instance of that kind, shared by the tests of a module: it sleeps, and ends with 9 on SIGTERM
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from tests.support.cli import Cli, Result, Terminal
from tests.support.guests import kernel
from tests.support.wait import until
from tests.system.conftest import TenantFactory, remove_instances

LONG = 120.0
"""Seconds that a machine may take, whose processor is emulated."""


@dataclass(frozen=True)
class Kind:
    """A kind of instance. `options` of `insula run` make one of it; `cli` is the command line of a tenant."""

    name: Literal["container", "machine"]
    cli: Cli
    options: tuple[str, ...]

    def words(self, *words: str | Path) -> tuple[str | Path, ...]:
        """The words of `insula run` for an instance of this kind."""
        return ("run", *self.options, *words)

    def run(self, *words: str | Path, stdin: str = "") -> Result:
        return self.cli.run(*self.words(*words), stdin=stdin, timeout=LONG)

    def shell(self, script: str, *options: str | Path) -> str:
        """The output of a script in a new instance, which has to succeed."""
        return self.run("--rm", *options, "busybox", "sh", "-c", script).ok().rstrip("\n")

    def begin(self, name: str, *words: str | Path) -> None:
        """Start an instance in the background."""
        self.cli.ok(*self.words("-d", "--name", name, *words), timeout=LONG)

    def fails(self, *words: str | Path, status: int = 125) -> str:
        return self.cli.fails(*self.words(*words), status=status)

    def terminal(self, *words: str, rows: int = 24, columns: int = 80) -> Terminal:
        return self.cli.terminal(*self.words(*words), rows=rows, columns=columns)

    def status(self, name: str) -> dict[str, Any]:
        """The status of an instance; empty if it is gone."""
        found = [view["status"] for view in self.cli.json("ps", "-a") if view["instance"]["name"] == name]
        return dict(found[0]) if found else {}

    def becomes(self, name: str, state: str) -> dict[str, Any]:
        """Wait until an instance is in a state, and return its status."""

        def reached() -> dict[str, Any] | None:
            found = self.status(name)
            return found if found.get("state") == state else None

        return until(reached, f"{name} is {state}", LONG) or {}


@pytest.fixture(scope="module", params=["container", "machine"])
def kind(request: pytest.FixtureRequest, tenants: TenantFactory) -> Iterator[Kind]:
    if request.param == "machine" and kernel() is None:
        pytest.skip("the kernel of guests is not there: scripts/kernel fetches it")
    yield Kind(request.param, cli := tenants(), ("--vm",) if request.param == "machine" else ())
    remove_instances(cli)


_numbers = itertools.count()


@pytest.fixture
def name(kind: Kind) -> Iterator[str]:
    """A name for an instance of a test, which is removed."""
    name = f"one-{next(_numbers)}"
    yield name
    kind.cli.run("rm", "-f", name)


@pytest.fixture(scope="module")
def sleeper(kind: Kind) -> str:
    script = "trap 'exit 9' TERM; echo ready; while :; do sleep 0.1; done"
    kind.begin("sleeper", "-e", "FROM_RUN=1", "busybox", "sh", "-c", script)
    until(lambda: kind.cli.ok("logs", "sleeper") == "ready", "it sleeps", LONG)
    return "sleeper"
