"""`insula stats`: resource usage as the kernel counts it, once or repeatedly."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from typing import Any

import pytest

from tests.support.cli import Cli
from tests.support.daemon import Daemon
from tests.support.wait import patiently, until
from tests.system.conftest import TenantFactory

BUSY = "while :; do :; done"
HOLD = "dd if=/dev/zero of=/dev/shm/full bs=1M count=20 2>/dev/null && echo full && exec sleep 600"


def once(cli: Cli, *words: str) -> dict[str, dict[str, Any]]:
    """The instances of one sample, by name."""
    sample = cli.json("stats", "--no-stream", *words)
    return {each["name"]: each for each in sample["instances"]}


def test_processor_memory_and_processes(cli: Cli) -> None:
    cli.ok("run", "-d", "--name", "busy", "--cpus", "0.5", "--pids", "9", "busybox", "sh", "-c", BUSY)
    cli.ok("run", "-d", "--name", "idle", "--memory", "64m", "busybox", "sh", "-c", HOLD)
    until(lambda: cli.ok("logs", "idle") == "full", "it has its memory")
    found = once(cli)
    assert set(found) == {"busy", "idle"}
    busy, idle = found["busy"], found["idle"]
    assert busy["cpu"] > 10 * idle["cpu"], "the idle one is the control"
    assert 0.01 < busy["cpu"] < 0.8
    assert busy["cpu_limit"] == 0.5
    assert (busy["pids"], busy["pids_limit"]) == (1, 9)
    assert 20 << 20 <= idle["memory"] <= 40 << 20
    assert busy["memory"] < 20 << 20
    assert (idle["memory_limit"], busy["memory_limit"]) == (64 << 20, None)
    later = once(cli, "busy")
    assert set(later) == {"busy"}, "only those asked for"
    assert later["busy"]["cpu_time"] > busy["cpu_time"]


def test_network_traffic(cli: Cli) -> None:
    """From one to the other: what is received here was sent there, and there is more of it than of anything else."""
    serve = "mkdir /www && dd if=/dev/zero of=/www/big bs=1M count=4 2>/dev/null; exec httpd -f -p 80 -h /www"
    cli.ok("run", "-d", "--name", "there", "busybox", "sh", "-c", serve)
    cli.ok("run", "-d", "--name", "here", "busybox", "sleep", "600")
    cli.ok("run", "-d", "--name", "alone", "--network", "none", "busybox", "sleep", "600")
    fetch = ("exec", "here", "sh", "-c", "wget -qO- http://there/big | wc -c")
    before = once(cli)
    until(lambda: cli.ok(*fetch) == str(4 << 20), "all of it has arrived")
    after = once(cli)
    assert after["here"]["received"] - before["here"]["received"] > 4 << 20
    assert after["there"]["sent"] - before["there"]["sent"] > 4 << 20
    assert after["here"]["sent"] - before["here"]["sent"] < 1 << 20
    assert (after["alone"]["received"], after["alone"]["sent"]) == (None, None)


def test_the_tenants_limits_are_shown_without_own_ones(tenants: TenantFactory) -> None:
    cli = tenants("--memory", "100m", "--cpus", "1.5")
    cli.ok("run", "-d", "--name", "a", "busybox", "sleep", "600")
    cli.ok("run", "-d", "--name", "b", "--memory", "32m", "busybox", "sleep", "600")
    cli.ok("tenant", "update", str(cli.tenant), "--memory", "80m")
    found = once(cli)
    assert (found["a"]["memory_limit"], found["b"]["memory_limit"]) == (80 << 20, 32 << 20)
    assert found["a"]["cpu_limit"] == 1.5


def test_stopped_instances(cli: Cli) -> None:
    cli.ok("run", "-d", "--name", "gone", "busybox", "true")
    cli.ok("wait", "gone")
    assert once(cli) == {}
    [gone] = once(cli, "gone").values()
    assert (gone["state"], gone["cpu"], gone["memory"], gone["received"]) == ("exited", None, None, None)
    cli.ok("run", "-d", "--name", "still", "busybox", "sleep", "600")
    cli.ok("pause", "still")
    [still] = once(cli).values()
    assert (still["state"], still["pids"]) == ("paused", 1)
    assert still["cpu"] < 0.01


def test_a_missing_instance(cli: Cli) -> None:
    assert "no instance nobody" in cli.fails("stats", "--no-stream", "nobody")
    cli.fails("stats", "-A", "somebody", status=2)
    cli.fails("stats", "--interval", "1ms", status=2)
    cli.of("no-such-tenant").fails("stats", "--no-stream")


def test_a_tenant_sees_its_own_and_all_tenants_on_demand(tenants: TenantFactory) -> None:
    one, other = tenants(), tenants()
    for cli in (one, other):
        cli.ok("run", "-d", "--name", "web", "busybox", "sleep", "600")
    assert [each["tenant"] for each in one.json("stats", "--no-stream")["instances"]] == [one.tenant]
    everybody = {each["tenant"] for each in one.json("stats", "--no-stream", "-A")["instances"]}
    assert {one.tenant, other.tenant} <= everybody
    assert "TENANT" in one.ok("stats", "--no-stream", "-A")


def test_the_table(cli: Cli) -> None:
    cli.ok("run", "-d", "--name", "web", "--memory", "32m", "busybox", "sleep", "600")
    header, line = cli.ok("stats", "--no-stream").splitlines()
    assert header.split()[:6] == ["NAME", "CPU", "MEMORY", "LIMIT", "PIDS", "NET"]
    words = line.split()
    assert words[0] == "web"
    assert words[1].endswith("%")
    assert words[3:5] == ["32M", "1/4096"]


def test_a_series_ends_when_the_last_instance_is_removed(cli: Cli) -> None:
    for name in ("a", "b"):
        cli.ok("run", "-d", "--name", name, "busybox", "sh", "-c", BUSY)
    following = cli.start("--json", "stats", "--interval", "0.1", "a", "b")
    patience = threading.Timer(patiently(40), following.kill)
    patience.start()
    try:
        assert following.stdout is not None
        samples = [json.loads(following.stdout.readline()) for _ in range(3)]
        assert [[each["name"] for each in sample["instances"]] for sample in samples] == [["a", "b"]] * 3
        first = samples[0]["instances"][0]["cpu_time"]
        while json.loads(following.stdout.readline())["instances"][0]["cpu_time"] <= first:
            pass  # until it has had its turn
        cli.ok("rm", "-f", "a")
        for line in following.stdout:
            if [each["name"] for each in json.loads(line)["instances"]] == ["b"]:
                break
        cli.ok("rm", "-f", "b")
        following.communicate(timeout=patiently(20))
        assert following.returncode == 0
    finally:
        patience.cancel()
        following.kill()
        following.wait()


def test_in_a_terminal_it_stays_in_place(cli: Cli) -> None:
    cli.ok("run", "-d", "--name", "web", "busybox", "sleep", "600")
    with cli.terminal("stats", "--interval", "0.1") as terminal:
        for _ in range(3):
            terminal.expect(r"\x1b\[H\x1b\[JNAME.*\r\n")
            terminal.expect(r"web .*%")
        terminal.type("\x03")
        assert terminal.wait() == 130


def test_through_the_api(daemon: Daemon, cli: Cli) -> None:
    """One line of JSON for curl(1), at three places."""
    cli.ok("run", "-d", "--name", "web", "busybox", "sleep", "600")
    for where in ("stats", f"tenants/{cli.tenant}/stats", f"tenants/{cli.tenant}/instances/web/stats"):
        url = f"http://insula/v1/{where}"
        command = ["curl", "-sf", "--unix-socket", str(daemon.cli.socket), url]
        sample = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        assert "web" in [each["name"] for each in sample["instances"]]


def test_disk_traffic(daemon: Daemon, cli: Cli) -> None:
    major = os.major(os.stat(daemon.root).st_dev)
    if major == 0:
        pytest.skip("the files of instances are on no block device")
    cli.ok("run", "-d", "--name", "web", "busybox", "sleep", "600")
    before = once(cli)["web"]
    cli.ok("exec", "web", "dd", "if=/dev/zero", "of=/blob", "bs=1M", "count=8", "conv=fsync")
    after = once(cli)["web"]
    if after["written"] is None:
        pytest.skip("control groups are of version 1, and this kernel counts no I/O that isn't limited")
    assert after["written"] - (before["written"] or 0) >= 8 << 20


def test_pressure_where_the_kernel_has_it(cli: Cli) -> None:
    cli.ok("run", "-d", "--name", "busy", "--cpus", "0.1", "busybox", "sh", "-c", f"({BUSY}) & {BUSY}")
    if not once(cli)["busy"]["pressure"]:
        pytest.skip("control groups are of version 1, or the kernel has no PSI")
    until(lambda: once(cli)["busy"]["pressure"]["cpu"]["some"] > 1, "its processes wait", timeout=20)
