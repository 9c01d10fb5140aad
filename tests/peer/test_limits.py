"""podman and docker show and change the limits of a running container: update, stats, top."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.peers import IMAGE, Engine
from tests.support.wait import until

NAME = "limited"
V1 = Path("/sys/fs/cgroup/memory").exists()


@pytest.fixture
def limited(engine: Engine) -> Engine:
    """An engine with a container `limited`, of one busy and one sleeping process."""
    options = ("--memory=64m", "--pids-limit=50", "--cpus=0.5")
    engine.ok("run", "-d", f"--name={NAME}", *options, IMAGE, "sh", "-c", "sleep 1000 & while :; do :; done")
    return engine


def value(engine: Engine, v1: str, v2: str) -> str:
    return engine.ok("exec", NAME, "cat", f"/sys/fs/cgroup/{v1 if V1 else v2}")


def test_update(limited: Engine) -> None:
    swap = [] if limited.name == "podman" else ["--memory-swap=96m", "--pids-limit=60"]
    limited.ok("update", "--memory=48m", "--cpus=0.25", *swap, NAME)
    assert value(limited, "memory/memory.limit_in_bytes", "memory.max") == str(48 << 20)
    assert value(limited, "cpu/cpu.cfs_quota_us", "cpu.max").split()[0] == "25000"
    assert value(limited, "pids/pids.max", "pids.max") == ("60" if limited.name == "docker" else "50")


def test_an_invalid_update_is_refused(limited: Engine) -> None:
    assert limited.run("update", "--cpuset-cpus=4000", NAME).status != 0
    assert value(limited, "memory/memory.limit_in_bytes", "memory.max") == str(64 << 20)


def test_stats(limited: Engine) -> None:
    line = "{{json .}}" if limited.name == "docker" else "json"

    def processes() -> int:
        said = json.loads(limited.ok("stats", "--no-stream", "--format", line, NAME))
        first = said[0] if isinstance(said, list) else said
        return int(first["PIDs"] if "PIDs" in first else first["pids"])

    until(lambda: processes() == 2, "two processes are seen")


def test_top(limited: Engine) -> None:
    columns = ["-o", "pid,comm"] if limited.name == "docker" else ["pid", "comm"]

    def both() -> bool:
        rows = [line.split() for line in limited.ok("top", NAME, *columns).splitlines()[1:]]
        assert sorted(row[1] for row in rows) == ["sh", "sleep"], rows
        return True

    until(both, "both processes are seen")
