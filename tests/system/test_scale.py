"""Many instances: all are adopted after crashes, all exits are seen, nothing is left; and a full bridge."""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from insula.client import Client
from insula.model.errors import Conflict
from insula.network.linux import naming
from tests.support.daemon import Daemon
from tests.support.lab import Lab, isolated
from tests.support.machine import Run
from tests.support.snapshot import Snapshot, assert_unchanged
from tests.support.wait import until

COUNT = 60


def all_at_once(act: Any, names: list[str]) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(act, names))


def test_sixty_instances(fresh: Daemon) -> None:
    client, names = Client(str(fresh.cli.socket)), [f"many{number:02}" for number in range(COUNT)]

    def run(name: str) -> None:
        client.instances.run("default", "busybox", ["sleep", "600"], name=name)

    def running() -> dict[str, int]:
        views = client.instances.list("default")
        return {v["instance"]["name"]: v["status"]["pid"] for v in views if v["status"]["state"] == "running"}

    all_at_once(run, ["first", "second", "third"])
    all_at_once(lambda name: client.instances.remove("default", name, force=True), ["first", "second", "third"])

    def snapshot() -> Snapshot:
        """Our processes come back with other numbers, in namespaces of their own; the host's limit of terminals stays
        raised until `insula down`, with a record, unless it was high enough before."""
        found = fresh.snapshot()
        files = found.files - {str(fresh.run / "terminals")}
        return replace(found, processes=frozenset(), namespaces=frozenset(), mounts=frozenset(), files=files)

    before = snapshot()
    all_at_once(run, names)
    pids = running()
    assert sorted(pids) == names

    fresh.stop()
    fresh.start()
    assert running() == pids, "after a stop"
    fresh.kill("insulad")
    fresh.start()
    assert running() == pids, "after kill -9"
    killed = fresh.pid("zygote")
    fresh.kill("zygote")  # its children are the monitor's now, which records their ends
    until(lambda: fresh.pid("zygote") not in (None, killed), "another zygote runs")
    assert running() == pids, "after the end of the zygote"
    assert fresh.cli.ok("exec", names[-1], "echo", "here") == "here"

    for name in names[: COUNT // 2]:
        os.kill(pids[name], 9)
    until(lambda: sorted(running()) == names[COUNT // 2 :], "half of them have ended")
    ended = {v["instance"]["name"]: v["status"]["exit"] for v in client.instances.list("default")}
    assert {ended[name]["signal"] for name in names[: COUNT // 2]} == {9}
    all_at_once(lambda name: client.instances.remove("default", name, force=True), names)
    assert not os.listdir(fresh.run / "containers")
    assert_unchanged(before, snapshot)


def test_descriptors_run_out(run_: Run) -> None:
    """An instance that would not get all of its streams is refused; others go on, and new ones fit when some end."""
    daemon = Daemon(run_)
    daemon.wrapper = ("prlimit", "--nofile=128:128")
    try:
        daemon.start()
        made = []
        while (done := daemon.cli.run("run", "-d", "busybox", "sleep", "600")).status == 0:
            made.append(done.out.strip())
            assert len(made) < 100
        assert done.err.startswith("error: ") and "oo many open files" in done.err and "LimitNOFILE" in done.err
        assert len(made) > 5, "the positive control"
        assert len(daemon.cli.json("ps")) == len(made)
        daemon.cli.ok("rm", "-f", *made[:3])
        assert daemon.cli.ok("exec", made[-1], "echo", "here") == "here"
        assert daemon.cli.ok("run", "--rm", "busybox", "echo", "again") == "again"
    finally:
        daemon.remove()


@isolated
def test_a_bridge_that_is_full() -> None:
    """The place of a port that goes is free at once, though its device may still be there; then it is said clearly."""
    cloud = Lab()
    cloud.tenant("acme")
    cloud.network("acme", "10.0.0.0/16")
    first, second = cloud.instance("acme", "first"), cloud.instance("acme", "second")
    cloud.unplug(second)
    others = naming.MAX_PORTS - 1  # both ends of a pair on the bridge
    fill = "".join(
        f"link add name a{n} master br1 type veth peer name b{n}\nlink set b{n} master br1\n"
        for n in range(others // 2)
    )
    command = ["nsenter", f"--net={cloud.fabric.naming.namespace('acme')}", "ip", "-batch", "-"]
    while cloud.fabric._tenant(cloud.tenants["acme"]).delete_marked():
        pass
    subprocess.run(command, input=fill, text=True, check=True)
    with pytest.raises(Conflict, match="as many ports as a bridge can have, 1023"):
        cloud.plug(second)
    cloud.unplug(first)
    cloud.plug(second)
    assert second.pings("10.0.0.1")
    with pytest.raises(Conflict):
        cloud.plug(first)
