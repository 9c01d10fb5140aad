"""sd_notify(3) compared with runc and crun: when `start` returns, and the messages to the supervisor."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.runtimes import NAME, Runtime
from tests.support.supervisor import Supervisor, send
from tests.support.wait import patiently, until


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    made = Supervisor(tmp_path / "supervisor")
    yield made
    made.close()


def test_a_start_returns_when_the_container_is_ready(oci: Runtime, supervisor: Supervisor) -> None:
    oci.environment["NOTIFY_SOCKET"] = str(supervisor.path)
    oci.write("exec sleep 600")
    oci.do("create", "--bundle", oci.path, NAME).ok()
    with (oci.path / "started").open("w") as output:
        starting = subprocess.Popen(oci.command("start", NAME), env=oci.environment, stdout=output, stderr=output)
    try:
        until(lambda: json.loads(oci.do("state", NAME).ok())["status"] == "running", "it runs")
        pid = json.loads(oci.do("state", NAME).ok())["pid"]
        until(lambda: Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"sleep"), "it is the program")
        environment = Path(f"/proc/{pid}/environ").read_text().split("\0")
        [path] = [each.partition("=")[2] for each in environment if each.startswith("NOTIFY_SOCKET=")]
        assert send(pid, path, "STATUS=loading").returncode == 0
        assert starting.poll() is None and not supervisor.hears()
        assert send(pid, path, "READY=1").returncode == 0
        expected = ["READY=1", *([] if oci.name == "crun" else [f"MAINPID={pid}"])]
        told: list[str] = []
        while len(told) < len(expected):  # in one message, or one each
            told += supervisor.receive()[0].splitlines()
        assert told == expected
        if oci.name != "runc":  # that of Debian 12 has no barrier
            message, [barrier] = supervisor.receive()
            assert message == "BARRIER=1"
            assert starting.poll() is None
            os.close(barrier)
        assert starting.wait(patiently(30)) == 0
    finally:
        starting.kill()
        starting.wait()


def test_a_start_returns_when_the_container_has_ended(oci: Runtime, supervisor: Supervisor) -> None:
    oci.environment["NOTIFY_SOCKET"] = str(supervisor.path)
    oci.write("exit 0")
    oci.do("create", "--bundle", oci.path, NAME).ok()
    assert oci.do("start", NAME).status == 0
    assert not supervisor.hears()
