"""Defaults: each by its value."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from insula.cli.options import parse, split_global
from insula.cli.verbs import run
from insula.container import log
from insula.container.service import relay
from insula.control import plane
from insula.control.instances import health, restart_policy
from insula.control.instances.drivers.container.spec import CPU_PERIOD, DEFAULT_SHARES
from insula.model import quotas, rules
from insula.model.health import LEAST, HealthPlan, plan
from insula.model.objects import Healthcheck, ImageConfig, InstanceSpec, Limits, RestartPolicy, TmpfsMount
from insula.model.views import ExecSpec, NetworkSpec
from insula.settings import Settings

SPEC: dict[str, Any] = {
    "name": "",
    "image": "x",
    "networks": [
        {"network": "default", "address": None, "address6": None, "mac": None, "allowed_pairs": []},
    ],
    "stop_timeout": 10.0,
    "resources": {"cpus": None, "memory": None, "pids": 4096, "disk": None, "inodes": None},
    "restart": {"name": "no", "max_retries": 0},
    "log_size": 10485760,
    "log_files": 3,
}
OPTIONS: dict[str, Any] = {"kind": "container", "shm_size": 67108864}
OFF: tuple[object, ...] = (None, False, [], {}, "")


def given(*words: str) -> InstanceSpec:
    return msgspec.convert(
        run.build_spec(parse(run.COMMANDS["run"], "run", [*words, "x"], split_global([])[0])), InstanceSpec
    )


def test_an_instance() -> None:
    found = msgspec.to_builtins(InstanceSpec(image="x"))
    options = found.pop("options")
    assert {name: options[name] for name in OPTIONS} == OPTIONS
    assert {name: value for name, value in options.items() if name not in OPTIONS and value not in OFF} == {}
    assert {name: found[name] for name in SPEC} == SPEC
    assert {name: value for name, value in found.items() if name not in SPEC and value not in OFF} == {}


def test_the_command_line_asks_for_no_more() -> None:
    assert given() == InstanceSpec(image="x")
    assert given("--nesting").resources.pids == 16384


def test_a_health_check() -> None:
    asked = Healthcheck(test=["CMD", "true"])
    expected = HealthPlan(["true"], interval=30.0, timeout=30.0, retries=3, start_period=0.0, start_interval=5.0)
    assert plan(asked, None) == plan(None, asked) == expected
    assert (LEAST, health.AT_ONCE) == (1.0, 8)
    assert msgspec.to_builtins(Healthcheck()) == dict.fromkeys(
        ("test", "interval", "timeout", "retries", "start_period", "start_interval")
    )


@pytest.mark.parametrize(
    ("option", "value", "field", "expected"),
    [
        ("--health-interval", "1m30s", "interval", 90.0),
        ("--health-timeout", "2s", "timeout", 2.0),
        ("--health-retries", "5", "retries", 5),
        ("--health-start-period", "1m", "start_period", 60.0),
        ("--health-start-interval", "2500ms", "start_interval", 2.5),
    ],
)
def test_one_option_of_a_health_check_leaves_the_others(option: str, value: str, field: str, expected: float) -> None:
    made = plan(given("--health-cmd", "true", option, value).healthcheck, None)
    usual = plan(given("--health-cmd", "true").healthcheck, None)
    assert made is not None
    assert usual == HealthPlan(["/bin/sh", "-c", "true"], 30.0, 30.0, 3, 0.0, 5.0)
    assert made == HealthPlan(**{**usual._asdict(), field: expected})


def test_the_guides_defaults_of_health_checks_are_true() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "guide.md").read_text()
    said = dict(re.findall(r"^\| `--health-([a-z-]+)` \|.*\| ([^|]+) \|$", guide, re.MULTILINE))
    assert said == {
        "cmd": "the image's",
        "interval": "30s",
        "timeout": "30s",
        "retries": "3",
        "start-period": "0s",
        "start-interval": "5s",
    }


def test_restarts() -> None:
    assert RestartPolicy() == RestartPolicy(name="no", max_retries=0)
    assert [restart_policy.delay(n) for n in (0, 1, 2, 9, 10, 10_000)] == [0.1, 0.2, 0.4, 51.2, 60.0, 60.0]
    assert restart_policy.STEADY == 10.0


def test_the_others() -> None:
    assert msgspec.to_builtins(TmpfsMount(path="/t")) == {
        "type": "tmpfs",
        "path": "/t",
        "size": 67108864,
        "mode": 0o1777,
        "uid": 0,
        "gid": 0,
        "executable": False,
        "read_only": False,
    }
    assert msgspec.to_builtins(Limits()) == {**dict.fromkeys(quotas.QUOTAS), "pids": 16384}
    assert NetworkSpec(name="n", subnet="10.0.0.0/24").mtu == 1500
    found = msgspec.to_builtins(ExecSpec(command=["x"]))
    assert {name: value for name, value in found.items() if value not in OFF} == {"command": ["x"]}
    found = msgspec.to_builtins(ImageConfig())
    assert {n: v for n, v in found.items() if v not in OFF} == {"working_dir": "/", "stop_signal": "SIGTERM"}
    assert rules.MIN_MEMORY == 6 << 20
    assert (CPU_PERIOD, DEFAULT_SHARES) == (100_000, 1024)
    assert (relay.RATE, relay.BURST, relay.LEAST) == (8 << 20, 64 << 20, 1024)
    assert log.MIN_SIZE == 4096
    assert plane.REPAIR_EVERY == 60.0
    assert Settings().spares == 2
