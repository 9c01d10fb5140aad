"""Every namespace, made or joined by path, and ID mappings, as seen inside and in the kernel."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.system.oci.conftest import NAME, Box

TYPES = {"pid": "pid", "network": "net", "ipc": "ipc", "uts": "uts", "cgroup": "cgroup", "time": "time"}
BASE = 0x50000000
READ = "readlink /proc/self/ns/{}"


def ours(file: str) -> str:
    return os.readlink(f"/proc/self/ns/{file}")


@pytest.mark.parametrize(("kind", "file"), TYPES.items())
def test_a_new_namespace(box: Box, kind: str, file: str) -> None:
    box.namespace(kind)
    assert box.out(READ.format(file)).strip() != ours(file)


@pytest.mark.parametrize(("kind", "file"), [item for item in TYPES.items() if item[0] != "network"])
def test_without_an_entry_the_namespace_is_the_callers(box: Box, kind: str, file: str) -> None:
    box.without(kind)
    if kind == "uts":
        box.config.pop("hostname", None)
    assert box.out(READ.format(file)).strip() == ours(file)


@pytest.mark.parametrize(("kind", "file"), TYPES.items())
def test_a_namespace_is_joined_by_path(box: Box, holder: int, kind: str, file: str) -> None:
    path = f"/proc/{holder}/ns/{file}"
    box.namespace(kind, path=path)
    if kind == "uts":
        box.config.pop("hostname", None)
    assert box.out(READ.format(file)).strip() == os.readlink(path) != ours(file)


def test_all_namespaces_are_joined_by_path(box: Box, holder: int) -> None:
    for kind, file in TYPES.items():
        box.namespace(kind, path=f"/proc/{holder}/ns/{file}")
    box.config.pop("hostname", None)
    found = box.out("; ".join(READ.format(file) for file in TYPES.values())).split()
    assert found == [os.readlink(f"/proc/{holder}/ns/{file}") for file in TYPES.values()]


def test_a_mount_namespace_by_path_is_refused(box: Box) -> None:
    """Mounts in it, such as a /proc without masks, would be reachable for the container."""
    with subprocess.Popen(["unshare", "--mount", "sleep", "600"]) as holder:
        try:
            box.namespace("mount", path=f"/proc/{holder.pid}/ns/mnt")
            assert "linux.namespaces: a container can't join a mount namespace" in box.refused()
        finally:
            holder.kill()


def test_a_path_that_is_no_such_namespace(box: Box, holder: int) -> None:
    box.namespace("network", path=f"/proc/{holder}/ns/uts")
    assert "network namespace" in box.refused()
    box.namespace("network", path=str(box.path / "config.json"))
    assert "is no network namespace" in box.refused()
    box.namespace("network", path="/nowhere")
    assert "/nowhere" in box.refused()


def test_processes_of_a_joined_pid_namespace_see_each_other(box: Box, holder: int) -> None:
    box.namespace("pid", path=f"/proc/{holder}/ns/pid")
    found = box.out("cat /proc/1/comm; echo $$").split()
    assert found[0] == "sleep"
    assert int(found[1]) > 1


def test_a_joined_network_is_left_as_it_is(box: Box, holder: int) -> None:
    """A new one has its loopback up; whose network another's is decides about its own."""
    box.namespace("network")
    assert "UP" in box.out("ip link show lo")
    box.namespace("network", path=f"/proc/{holder}/ns/net")
    assert "UP" not in box.out("ip link show lo")


# -- time --------------------------------------------------------------------------------------------------------------


def test_clocks_of_a_time_namespace(box: Box) -> None:
    box.namespace("time")
    box.linux["timeOffsets"] = {"monotonic": {"secs": 1000}, "boottime": {"secs": 10_000_000, "nanosecs": 5}}
    uptime = float(box.out("cat /proc/uptime").split()[0])
    assert uptime > 10_000_000
    offsets = dict(line.split(None, 1) for line in box.out("cat /proc/self/timens_offsets").splitlines())
    assert offsets["monotonic"].split() == ["1000", "0"]
    assert offsets["boottime"].split() == ["10000000", "5"]


def test_time_and_user_namespace_together(box: Box) -> None:
    box.map_ids((0, BASE, 65536))
    box.namespace("time")
    box.linux["timeOffsets"] = {"boottime": {"secs": 10_000_000}}
    assert float(box.out("cat /proc/uptime").split()[0]) > 10_000_000


def test_exec_is_in_the_same_time(box: Box) -> None:
    box.namespace("time")
    box.linux["timeOffsets"] = {"boottime": {"secs": 10_000_000}}
    box.start()
    assert float(box.oci.ok("exec", NAME, "cat", "/proc/uptime").split()[0]) > 10_000_000


# -- user --------------------------------------------------------------------------------------------------------------


def test_mappings_of_many_lines(box: Box) -> None:
    lines = [(0, BASE, 1000), (1000, BASE + 5000, 1), (2000, BASE + 9000, 30)]
    box.map_ids(*lines)
    box.process["user"] = {"uid": 2003, "gid": 1000, "additionalGids": [5]}
    pid = box.start("id -u; id -G; cat /proc/self/uid_map; exec sleep 600")
    status = Path(f"/proc/{pid}/status").read_text()
    assert f"Uid:\t{BASE + 9003}\t" in status
    assert f"Gid:\t{BASE + 5000}\t" in status
    assert [[int(n) for n in line.split()] for line in Path(f"/proc/{pid}/gid_map").read_text().splitlines()] == [
        list(line) for line in lines
    ]


def test_root_inside_is_nobody_outside(box: Box) -> None:
    box.map_ids((0, BASE, 65536))
    secret = box.path / "secret"
    secret.write_text("x")
    secret.chmod(0o600)
    box.bind(secret, "/secret")
    result = box.run("id -u; cat /secret")
    assert (result.status, result.out) == (1, "0\n")
    assert "Permission denied" in result.err
    box.linux.pop("uidMappings")
    box.linux.pop("gidMappings")
    box.without("user")
    assert box.out("id -u; cat /secret") == "0\nx"


def test_without_mappings_every_id_is_that_of_the_host(box: Box) -> None:
    """A user namespace all the same: its root has no right over what belongs to the host's, as its other namespaces."""
    box.namespace("user")
    assert "uidMappings" not in box.linux
    box.without("uts")
    box.config.pop("hostname")
    result = box.run("cat /proc/self/uid_map /proc/self/gid_map; readlink /proc/self/ns/user; hostname other")
    assert result.err.startswith("warning: linux.uidMappings: is missing")
    assert "hostname: sethostname: Operation not permitted" in result.err, "the UTS namespace is the host's"
    *maps, namespace = result.out.splitlines()
    assert [line.split() for line in maps] == [["0", "0", "4294967295"]] * 2
    assert namespace != os.readlink("/proc/self/ns/user")
    box.linux["uidMappings"] = [{"containerID": 0, "hostID": 0, "size": 1}]
    assert box.refused().startswith("linux.gidMappings: is missing beside uidMappings")


def test_a_user_namespace_by_path(box: Box) -> None:
    """All others are made in it, and so are its root's."""
    box.map_ids((0, BASE, 65536))
    pid = box.start()
    path = f"/proc/{pid}/ns/user"
    other = box.path / "other"
    second = Box(other, f"{box.group.path}2")
    second.map_ids((0, BASE, 65536))
    second.linux.pop("uidMappings")
    second.linux.pop("gidMappings")
    second.namespace("user", path=path)
    second.namespace("pid", path=f"/proc/{pid}/ns/pid")
    assert second.out("readlink /proc/self/ns/user; id -u").split() == [os.readlink(path), "0"]
    assert second.out("cat /proc/1/comm").strip() == "sleep"
    assert second.left() == []


def test_namespaces_of_a_foreign_user_namespace_are_joined(box: Box) -> None:
    """The network namespace belongs to the user namespace, so only a process in that one may join it."""
    command = ["unshare", "--user", "--map-root-user", "--net", "sh", "-c", "echo ready; exec sleep 600"]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert holder.stdout and holder.stdout.readline() == b"ready\n"
        box.namespace("user", path=f"/proc/{holder.pid}/ns/user")
        box.namespace("network", path=f"/proc/{holder.pid}/ns/net")
        box.linux.pop("uidMappings", None)
        box.linux.pop("gidMappings", None)
        devpts = next(mount for mount in box.mounts if mount["type"] == "devpts")
        devpts["options"].remove("gid=5")  # only root is mapped
        found = box.out("readlink /proc/self/ns/user; readlink /proc/self/ns/net").split()
        assert found == [os.readlink(f"/proc/{holder.pid}/ns/{file}") for file in ("user", "net")]
    finally:
        holder.kill()
        holder.wait()
        if holder.stdout:
            holder.stdout.close()


def test_exec_joins_all_namespaces(box: Box) -> None:
    box.map_ids((0, BASE, 65536))
    box.namespace("time")
    pid = box.start()
    files = ["user", "mnt", *TYPES.values()]
    script = "; ".join(READ.format(file) for file in files)
    found = box.oci.ok("exec", NAME, "/bin/sh", "-c", script).split()
    assert found == [os.readlink(f"/proc/{pid}/ns/{file}") for file in files]


def test_names(box: Box) -> None:
    box.namespace("uts")
    box.config |= {"hostname": "inside", "domainname": "example.org"}
    before = os.uname().nodename
    assert box.out("hostname; cat /proc/sys/kernel/domainname").split() == ["inside", "example.org"]
    assert os.uname().nodename == before
