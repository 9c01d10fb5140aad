"""linux.netDevices and linux.memoryPolicy of runtime-spec 1.3. Debian's runc and crun are older: insula-oci alone."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.cli import Result
from tests.support.runtimes import NAME, Runtime


@pytest.fixture
def oci(three: dict[str, Runtime]) -> Iterator[Runtime]:
    """With busybox's ip inside; what is left of devices is removed."""
    runtime = three["insula-oci"]
    yield runtime
    runtime.clear()
    ip(runtime, "link delete host7", check=False)


def ip(oci: Runtime, words: str, *, check: bool = True) -> Any:
    """ip(8) on the host of the runtimes; what it tells, decoded."""
    command = oci.host.command("ip", "-json", *words.split())
    done = subprocess.run(command, capture_output=True, text=True, check=check)
    return json.loads(done.stdout) if done.stdout.strip() else []


def device(oci: Runtime) -> None:
    """`veth7`, and its other end `host7`: the only kind of device that every kernel can make and move."""
    ip(oci, "link add veth7 mtu 1489 address 02:00:00:00:07:07 type veth peer name host7")
    ip(oci, "link set host7 up")
    ip(oci, "link set veth7 up")
    ip(oci, "address add 198.18.7.9/24 dev host7")
    for address in ("198.18.7.1/24", "198.18.7.2/24", "2001:2:7::1/64"):
        ip(oci, f"address add {address} dev veth7")
    ip(oci, "address add 198.18.7.77/32 scope link dev veth7")


def names(oci: Runtime) -> set[str]:
    return {link["ifname"] for link in ip(oci, "link show")}


@pytest.mark.parametrize(("entry", "name"), [({}, "veth7"), ({"name": "inner0"}, "inner0"), ({"name": "x%d"}, "x0")])
def test_a_device_is_moved_with_its_permanent_addresses(oci: Runtime, entry: dict[str, str], name: str) -> None:
    device(oci)
    oci.linux["netDevices"] = {"veth7": entry}
    for capabilities in oci.process["capabilities"].values():
        capabilities.append("CAP_NET_RAW")
    found = oci.out(f"ip addr show dev {name}; ping -c 1 -W 20 198.18.7.9")
    assert " 0% packet loss" in found
    assert "mtu 1489" in found and "02:00:00:00:07:07" in found and ",UP" in found
    assert "inet 198.18.7.1/24" in found and "inet 198.18.7.2/24" in found and "inet6 2001:2:7::1/64" in found
    assert "198.18.7.77" not in found, "its scope is not global"
    assert "veth7" not in names(oci), "a virtual device ends with its namespace"


def test_a_failed_creation_moves_the_device_back(oci: Runtime) -> None:
    device(oci)
    before = ip(oci, "address show dev veth7")
    oci.linux["netDevices"] = {"veth7": {"name": "inner0"}}
    oci.config["hooks"] = {"createRuntime": [{"path": "/bin/false"}]}
    assert oci.run("true").status == 1
    after = ip(oci, "address show dev veth7")
    kept = ("ifname", "mtu", "address", "operstate")
    assert [before[0][key] for key in kept] == [after[0][key] for key in kept]
    local = {a["local"] for a in after[0]["addr_info"]}
    assert {"198.18.7.1", "198.18.7.2", "2001:2:7::1"} <= local


def test_a_device_that_cannot_be_moved_is_named(oci: Runtime) -> None:
    oci.linux["netDevices"] = {"nosuch": {}}
    assert "cannot move the network device nosuch" in oci.run("true").err
    device(oci)
    oci.linux["netDevices"] = {"veth7": {"name": "lo"}}
    assert "linux.netDevices.veth7.name: is the loopback device" in oci.run("true").err
    oci.linux["netDevices"] = {"veth7": {}}
    oci.linux["namespaces"] = [n for n in oci.linux["namespaces"] if n["type"] != "network"]
    assert "linux.netDevices: there is no network namespace" in oci.run("true").err
    assert "veth7" in names(oci)


def test_a_name_that_is_taken_in_a_namespace_that_exists(oci: Runtime) -> None:
    """It stays where it was; without a clash it goes there, and stays when the container ends."""
    device(oci)
    oci.start()
    pid = json.loads(oci.do("state", NAME).ok())["pid"]
    for entry in oci.linux["namespaces"]:
        if entry["type"] == "network":
            entry["path"] = f"/proc/{pid}/ns/net"
    oci.linux["cgroupsPath"] += "-2"

    def second(wanted: str) -> Result:
        oci.linux["netDevices"] = {"veth7": {"name": wanted}}
        oci.write("true")
        return oci.do("run", "--bundle", oci.path, "second")

    second("inner0").ok()
    assert "inner0" in oci.do("exec", NAME, "ls", "/sys/class/net").ok().split()
    ip(oci, "link set host7 name host8")  # the other end of what is there
    device(oci)
    try:
        result = second("inner0")
        assert result.status == 1 and "has a device inner0 already" in result.err
        assert "veth7" in names(oci)
    finally:
        ip(oci, "link delete host8")


@pytest.mark.parametrize(
    ("policy", "shown"),
    [
        ({"mode": "MPOL_BIND", "nodes": "0", "flags": ["MPOL_F_STATIC_NODES"]}, "bind=static:0"),
        ({"mode": "MPOL_INTERLEAVE", "nodes": "0"}, "interleave:0"),
        ({"mode": "MPOL_PREFERRED_MANY", "nodes": "0"}, "prefer (many):0"),
        ({"mode": "MPOL_LOCAL"}, "local"),
        ({"mode": "MPOL_DEFAULT"}, "default"),
    ],
)
def test_memory_policy(oci: Runtime, policy: dict[str, Any], shown: str) -> None:
    if not Path("/proc/self/numa_maps").exists():
        pytest.skip("this kernel has no CONFIG_NUMA")
    oci.linux["memoryPolicy"] = policy
    assert f" {shown} " in oci.out(["/bin/head", "-n", "1", "/proc/self/numa_maps"])


def test_invalid_memory_policies_are_refused(oci: Runtime) -> None:
    for policy, complaint in (
        ({"mode": "MPOL_BIND"}, "memoryPolicy.nodes: MPOL_BIND needs nodes: invalid memory policy node"),
        ({"mode": "MPOL_LOCAL", "nodes": "0"}, "memoryPolicy.nodes: MPOL_LOCAL mode requires 0 nodes but got 1"),
        ({"mode": "MPOL_ODD"}, "memoryPolicy.mode: 'MPOL_ODD' is unknown"),
        ({"mode": "MPOL_BIND", "nodes": "60000"}, "there is no such memory node"),
        ({"mode": "MPOL_BIND", "nodes": "900"}, "cannot set the memory policy"),
    ):
        oci.linux["memoryPolicy"] = policy
        assert complaint in oci.run("true").err
