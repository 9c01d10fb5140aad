"""The verbs on containers that `create` and `start` have made."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.machine import Run
from tests.support.oci import Bundle
from tests.support.wait import patiently, until

LOOP = "trap 'exit 7' USR1; (while :; do :; done) & i=0; while :; do i=$((i+1)); echo $i > /tmp/count; done"


@pytest.fixture
def bundle(run_: Run) -> Iterator[Bundle]:
    """A container `web` that counts in /tmp, not yet created."""
    path = run_.path / "verbs"
    bundle = Bundle(path, f"{run_.name}verbs/web")
    (path / "rootfs/tmp").mkdir()
    bundle.config["root"]["readonly"] = False
    bundle.config["process"]["args"] = ["/bin/sh", "-c", LOOP]
    bundle.config["annotations"] = {"org.example.key": "value"}
    bundle.write(bundle.config)
    yield bundle
    bundle.oci.ok("delete", "--force", "web")
    assert bundle.left() == []
    shutil.rmtree(path)


def count(bundle: Bundle) -> int:
    return int((bundle.path / "rootfs/tmp/count").read_text() or 0)


def goes_on(bundle: Bundle) -> None:
    before = count(bundle)
    until(lambda: count(bundle) != before, "it counts")


def stands_still(bundle: Bundle) -> None:
    before = count(bundle)
    with pytest.raises(AssertionError):
        until(lambda: count(bundle) != before, "it counts", timeout=0.2)


def test_a_life(bundle: Bundle) -> None:
    oci = bundle.oci
    oci.ok("create", "--bundle", bundle.path, "web")
    state = oci.json("state", "web")
    assert (state["status"], state["bundle"]) == ("created", str(bundle.path))
    assert (state["rootfs"], state["annotations"]) == (f"{bundle.path}/rootfs", {"org.example.key": "value"})
    assert Path(f"/proc/{state['pid']}").exists()
    assert oci.json("ps", "--format", "json", "web") == [state["pid"]]

    oci.ok("start", "web")
    until((bundle.path / "rootfs/tmp/count").exists, "it began to count")
    until(lambda: len(oci.json("ps", "--format", "json", "web")) == 2, "its child is there")
    assert oci.json("list", "--format", "json")[0]["status"] == "running"
    goes_on(bundle)

    oci.ok("pause", "web")
    assert oci.status("web") == "paused"
    stands_still(bundle)
    oci.ok("resume", "web")
    goes_on(bundle)

    oci.ok("update", "--pids-limit", "7", "web")
    config = json.loads((oci.root / "web/config.json").read_text())
    assert config["linux"]["resources"]["pids"] == {"limit": 7}
    assert oci.json("events", "--stats", "web")["data"]["pids"] == {"current": 2, "limit": 7}

    oci.ok("kill", "web", "USR1")
    until(lambda: oci.status("web") == "stopped", "it ended")
    assert oci.json("ps", "--format", "json", "web") == [], "its PID namespace ended with it"
    assert "container not running" in oci.fails("kill", "web", "KILL")
    oci.ok("delete", "web")
    assert oci.json("list", "--format", "json") == []


def test_delete_by_a_regular_expression(bundle: Bundle) -> None:
    """It is found anywhere in the ID, as crun does it. One that can't be deleted keeps none of the others."""
    oci = bundle.oci
    for name in ("web", "web-1", "db"):
        bundle.config["linux"]["cgroupsPath"] = f"/{bundle.group.path}-{name}"
        bundle.write(bundle.config)
        oci.ok("create", "--bundle", bundle.path, name)
    oci.ok("start", "web")
    assert "no regular expression" in oci.fails("delete", "--regex", "we(b")
    assert "does not exist" in oci.fails("delete", "we"), "an ID is an ID"
    assert oci.fails("delete", "--regex", "we.").startswith("cannot delete container web that is not stopped")
    assert oci.ok("list", "--quiet").split() == ["db", "web"]
    oci.ok("delete", "--force", "--regex", "eb|b$")
    assert oci.ok("list", "--quiet") == ""
    oci.ok("delete", "--force", "--regex", ".")


def test_a_paused_container_dies_of_a_kill(bundle: Bundle) -> None:
    oci = bundle.oci
    oci.ok("run", "--detach", "--bundle", bundle.path, "web")
    oci.ok("pause", "web")
    oci.ok("kill", "web", "KILL")
    until(lambda: oci.status("web") == "stopped", "it died")


def test_a_created_container_can_be_killed(bundle: Bundle) -> None:
    oci = bundle.oci
    oci.ok("create", "--bundle", bundle.path, "web")
    oci.ok("kill", "web", "KILL")
    until(lambda: oci.status("web") == "stopped", "it died")
    oci.fails("start", "web")


def test_events_end_with_the_container(bundle: Bundle) -> None:
    oci = bundle.oci
    oci.ok("run", "--detach", "--bundle", bundle.path, "web")
    watching = oci.start("events", "--interval", "1h", "web")
    try:
        assert watching.stdout and json.loads(watching.stdout.readline())["type"] == "stats"
        oci.ok("delete", "--force", "web")
        assert watching.wait(patiently(10)) == 0
    finally:
        watching.kill()
        watching.wait()
