"""The process that waits between `create` and `start`: its user, its rights, and its open files of the host."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from tests.support.runtimes import NAME, Runtime
from tests.support.wait import until

FIELDS = ("Uid", "Gid", "Groups", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs")


def test_a_created_process_has_the_rights_of_its_program(oci: Runtime) -> None:
    oci.process |= {
        "user": {"uid": 1000, "gid": 1001, "additionalGids": [1002]},
        "capabilities": {name: ["CAP_CHOWN", "CAP_KILL"] for name in ("bounding", "effective", "permitted")},
        "noNewPrivileges": True,
    }
    oci.write("exec sleep 600")
    oci.do("create", "--bundle", oci.path, NAME).ok()
    state = json.loads(oci.do("state", NAME).ok())
    assert state["status"] == "created"
    lines = Path(f"/proc/{state['pid']}/status").read_text().splitlines()
    found = {line.split(":")[0]: line.split(":")[1].split() for line in lines if line.split(":")[0] in FIELDS}
    assert found == {
        "Uid": ["1000"] * 4,
        "Gid": ["1001"] * 4,
        "Groups": ["1002"],
        **{name: ["0000000000000021"] for name in ("CapPrm", "CapEff", "CapBnd")},
        "CapAmb": ["0000000000000000"],
        "NoNewPrivs": ["1"],
    }


def test_no_directory_and_no_control_group_of_the_host_is_open(oci: Runtime) -> None:
    oci.write("exec sleep 600")
    oci.do("create", "--bundle", oci.path, NAME).ok()
    pid = json.loads(oci.do("state", NAME).ok())["pid"]
    opened = {int(number): os.readlink(f"/proc/{pid}/fd/{number}") for number in os.listdir(f"/proc/{pid}/fd")}
    assert {0, 1, 2} <= opened.keys(), "the control"
    directories = [link for fd, link in opened.items() if stat.S_ISDIR(os.stat(f"/proc/{pid}/fd/{fd}").st_mode)]
    assert directories == []
    assert [link for link in opened.values() if "cgroup" in link] == []


def test_a_signal_ends_a_created_container(oci: Runtime) -> None:
    """As process 1 of a PID namespace it must handle SIGTERM to get it."""
    if oci.name == "crun":
        pytest.skip("crun of Debian 12 doesn't handle it: only SIGKILL ends its created containers")
    oci.write("exec sleep 600")
    oci.do("create", "--bundle", oci.path, NAME).ok()
    oci.do("kill", NAME, "TERM").ok()
    until(lambda: json.loads(oci.do("state", NAME).ok())["status"] == "stopped", "it has ended")


def test_a_created_container_can_be_deleted(oci: Runtime) -> None:
    oci.write("exec sleep 600")
    oci.do("create", "--bundle", oci.path, NAME).ok()
    pid = json.loads(oci.do("state", NAME).ok())["pid"]
    oci.do("delete", NAME).ok()
    assert oci.do("state", NAME).status != 0
    until(lambda: not Path(f"/proc/{pid}").exists(), "its process is gone")
