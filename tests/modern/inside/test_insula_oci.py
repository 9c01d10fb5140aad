"""insula-oci on a host with systemd: containers in scopes, with limits, from create to delete."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from insula.kernel import cgroups
from insula.kernel.cgroups import Cgroup
from tests.support.oci import Bundle
from tests.support.wait import until

MIB = 1 << 20
UNIT = f"insula-oci{os.getpid()}.scope"
GROUP = f"insulatest.slice/{UNIT}"


@pytest.fixture
def bundle(tmp_path: Path) -> Iterator[Bundle]:
    bundle = Bundle(tmp_path / "bundle", GROUP)
    shutil.copy("/bin/busybox", bundle.path / "rootfs/bin/sleep")
    bundle.config["process"]["args"] = ["/bin/sleep", "1000"]
    bundle.config["process"]["terminal"] = False
    bundle.config["linux"]["cgroupsPath"] = f"insulatest.slice:insula:oci{os.getpid()}"
    bundle.config["linux"]["resources"] = {"memory": {"limit": 64 * MIB}, "devices": [{"allow": False}]}
    bundle.write(bundle.config)
    yield bundle
    bundle.oci.run("--systemd-cgroup", "delete", "--force", "web")
    assert not Cgroup(GROUP).exists()


def state_of_unit() -> str:
    command = ["systemctl", "show", "--value", "--property=ActiveState", UNIT]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_a_life_in_a_scope(bundle: Bundle) -> None:
    oci = bundle.oci
    oci.ok("--systemd-cgroup", "create", "--bundle", bundle.path, "web")
    pid = json.loads(oci.ok("state", "web"))["pid"]
    assert cgroups.of_process(pid) == GROUP and state_of_unit() == "active"
    oci.ok("start", "web")
    group = Cgroup(GROUP)
    assert group.values()["memory.max"] == str(64 * MIB)
    oci.ok("pause", "web")
    assert group.frozen() and oci.status("web") == "paused"
    oci.ok("resume", "web")
    oci.ok("--systemd-cgroup", "update", "--memory", str(128 * MIB), "web")
    subprocess.run(["systemctl", "daemon-reload"], check=True)
    assert group.values()["memory.max"] == str(128 * MIB)
    oci.ok("kill", "web", "KILL")
    until(lambda: oci.status("web") == "stopped", "it is dead")
    oci.ok("delete", "web")
    until(lambda: not group.exists() and state_of_unit() == "inactive", "the scope is gone")


def test_what_fails_leaves_no_scope(bundle: Bundle) -> None:
    bundle.config["process"]["args"] = ["/bin/nothing"]
    bundle.write(bundle.config)
    result = bundle.oci.run("--systemd-cgroup", "run", "--bundle", bundle.path, "web")
    assert result.status != 0 and "/bin/nothing" in result.err, result
    until(lambda: state_of_unit() == "inactive" and not Cgroup(GROUP).exists(), "the scope is gone")
