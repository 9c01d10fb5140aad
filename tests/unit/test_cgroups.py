"""linux.resources as files of both cgroup versions; paths of groups; writes of settings."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from insula.kernel.cgroups import (
    Cgroup,
    Hierarchy,
    base,
    detect,
    files,
    locate,
    resources_v1,
    resources_v2,
    settings,
)
from insula.kernel.cgroups.settings import Setting

CgroupV1, CgroupV2 = Cgroup.implementation(1), Cgroup.implementation(2)
Lines = list[str]


def lines(found: list[Setting]) -> Lines:
    return [f"{setting.file} {setting.value}" for setting in found]


def second(resources: dict[str, Any], **content: str) -> Lines:
    """The writes of version 2; `content` is the current content of files, with _ for the dots."""
    return lines(resources_v2.settings(resources, lambda file: content.get(file.replace(".", "_"))))


# resources, version 1, version 2; None: refused
BOTH: list[tuple[dict[str, Any], Lines | None, Lines | None]] = [
    ({}, [], []),
    (
        {"memory": {"limit": 100, "swap": 300, "reservation": 50}},
        [
            "memory.limit_in_bytes 100",
            "memory.memsw.limit_in_bytes 300",
            "memory.soft_limit_in_bytes 50",
            "memory.kmem.tcp.limit_in_bytes 100",
        ],
        ["memory.max 100", "memory.swap.max 200", "memory.low 50"],
    ),
    (
        {"memory": {"limit": 100, "swap": -1}},
        ["memory.limit_in_bytes 100", "memory.memsw.limit_in_bytes -1", "memory.kmem.tcp.limit_in_bytes 100"],
        ["memory.max 100", "memory.swap.max max"],
    ),
    (
        {"memory": {"limit": -1}},
        ["memory.limit_in_bytes -1", "memory.kmem.tcp.limit_in_bytes -1", "memory.memsw.limit_in_bytes -1"],
        ["memory.max max", "memory.swap.max max"],
    ),
    (
        {"memory": {"limit": 100, "swap": 100}},
        ["memory.limit_in_bytes 100", "memory.memsw.limit_in_bytes 100", "memory.kmem.tcp.limit_in_bytes 100"],
        ["memory.max 100", "memory.swap.max 0"],
    ),
    # version 1 leaves the refusal to the kernel
    (
        {"memory": {"limit": 200, "swap": 100}},
        ["memory.limit_in_bytes 200", "memory.memsw.limit_in_bytes 100", "memory.kmem.tcp.limit_in_bytes 200"],
        None,
    ),
    ({"memory": {"kernel": 100}}, ["memory.kmem.limit_in_bytes 100"], None),
    ({"memory": {"kernel": -1}}, ["memory.kmem.limit_in_bytes -1"], []),
    (
        {"memory": {"limit": 100, "kernelTCP": 50}},
        ["memory.limit_in_bytes 100", "memory.kmem.tcp.limit_in_bytes 50"],
        None,
    ),
    ({"memory": {"kernelTCP": -1}}, ["memory.kmem.tcp.limit_in_bytes -1"], []),
    ({"memory": {"kernelTCP": 100}}, ["memory.kmem.tcp.limit_in_bytes 100"], None),
    ({"memory": {"swappiness": 0}}, ["memory.swappiness 0"], None),
    ({"memory": {"disableOOMKiller": True}}, ["memory.oom_control 1"], None),
    ({"memory": {"disableOOMKiller": False}}, ["memory.oom_control 0"], []),
    ({"memory": {"useHierarchy": True}}, ["memory.use_hierarchy 1"], []),
    ({"memory": {"useHierarchy": False}}, ["memory.use_hierarchy 0"], None),
    ({"cpu": {"shares": 1024}}, ["cpu.shares 1024"], ["cpu.weight 100"]),
    ({"cpu": {"shares": 2}}, ["cpu.shares 2"], ["cpu.weight 1"]),
    ({"cpu": {"shares": 262144}}, ["cpu.shares 262144"], ["cpu.weight 10000"]),
    (
        {"cpu": {"quota": 5000, "period": 20000, "burst": 100}},
        ["cpu.cfs_period_us 20000", "cpu.cfs_quota_us 5000", "cpu.cfs_burst_us 100"],
        ["cpu.max 5000 20000", "cpu.max.burst 100"],
    ),
    ({"cpu": {"quota": 5000}}, ["cpu.cfs_quota_us 5000"], ["cpu.max 5000"]),
    ({"cpu": {"quota": -1}}, ["cpu.cfs_quota_us -1"], ["cpu.max max"]),
    ({"cpu": {"period": 20000}}, ["cpu.cfs_period_us 20000"], ["cpu.max max 20000"]),
    ({"cpu": {"realtimeRuntime": 5, "realtimePeriod": 9}}, ["cpu.rt_period_us 9", "cpu.rt_runtime_us 5"], None),
    ({"cpu": {"cpus": "0-1", "mems": "0"}}, ["cpuset.cpus 0-1", "cpuset.mems 0"], ["cpuset.cpus 0-1", "cpuset.mems 0"]),
    ({"cpu": {"idle": 1, "shares": 100}}, ["cpu.idle 1"], ["cpu.idle 1"]),
    ({"cpu": {"idle": 0, "shares": 2}}, ["cpu.idle 0", "cpu.shares 2"], ["cpu.idle 0", "cpu.weight 1"]),
    ({"pids": {"limit": 5}}, ["pids.max 5"], ["pids.max 5"]),
    ({"pids": {"limit": -1}}, ["pids.max max"], ["pids.max max"]),
    ({"blockIO": {"weight": 500}}, ["blkio.bfq.weight 500"], ["io.bfq.weight 500"]),
    ({"blockIO": {"leafWeight": 500}}, ["blkio.leaf_weight 500"], None),
    (
        {"blockIO": {"weightDevice": [{"major": 8, "minor": 0, "weight": 10}]}},
        ["blkio.bfq.weight_device 8:0 10"],
        ["io.bfq.weight 8:0 10"],
    ),
    (
        {"blockIO": {"weightDevice": [{"major": 8, "minor": 0, "leafWeight": 10}]}},
        ["blkio.leaf_weight_device 8:0 10"],
        None,
    ),
    (
        {
            "blockIO": {
                "throttleReadBpsDevice": [{"major": 8, "minor": 1, "rate": 9}],
                "throttleWriteIOPSDevice": [{"major": 8, "minor": 0, "rate": 0}],
            }
        },
        ["blkio.throttle.read_bps_device 8:1 9", "blkio.throttle.write_iops_device 8:0 0"],
        ["io.max 8:1 rbps=9", "io.max 8:0 wiops=max"],
    ),
    (
        {"hugepageLimits": [{"pageSize": "2MB", "limit": 100}]},
        ["hugetlb.2MB.limit_in_bytes 100", "hugetlb.2MB.rsvd.limit_in_bytes 100"],
        ["hugetlb.2MB.max 100", "hugetlb.2MB.rsvd.max 100"],
    ),
    ({"hugepageLimits": [{"pageSize": "../x", "limit": 100}]}, None, None),
    ({"network": {"classID": 0x100001}}, ["net_cls.classid 1048577"], None),
    ({"network": {"priorities": [{"name": "eth0", "priority": 5}]}}, ["net_prio.ifpriomap eth0 5"], None),
    ({"network": {"classID": 0, "priorities": []}}, [], []),
    ({"rdma": {"m": {"hcaHandles": 3, "hcaObjects": 0}}},) + (["rdma.max m hca_handle=3 hca_object=0"],) * 2,
    ({"rdma": {"m": {"hcaObjects": 7}}},) + (["rdma.max m hca_object=7"],) * 2,
    (
        {"unified": {"memory.high": "9", "io.max": "8:0 rbps=1\n8:1 rbps=2\n"}},
        None,
        ["memory.high 9", "io.max 8:0 rbps=1", "io.max 8:1 rbps=2"],
    ),
    ({"unified": {"../memory.high": "9"}}, None, None),
    # what engines send for options that were not given
    ({"cpu": {"shares": 0, "quota": 0, "period": 0, "cpus": ""}, "pids": {"limit": 0}}, [], []),
    ({"memory": {"limit": 0, "swap": 0}, "blockIO": {"weight": 0}}, [], []),
]


@pytest.mark.parametrize(("resources", "first_version", "second_version"), BOTH)
def test_both_versions(
    resources: dict[str, Any],
    first_version: Lines | None,
    second_version: Lines | None,
) -> None:
    for version, wanted in ((lambda r: lines(resources_v1.settings(r)), first_version), (second, second_version)):
        if wanted is None:
            section = next(iter(resources))
            with pytest.raises(OSError, match=rf"linux\.resources\.{section}") as caught:
                version(resources)
            assert caught.value.errno == errno.EOPNOTSUPP
        else:
            assert version(resources) == wanted


def test_half_a_value_keeps_the_other_half() -> None:
    assert second({"cpu": {"period": 50000}}, cpu_max="25000 100000") == ["cpu.max 25000 50000"]
    assert second({"memory": {"swap": 300}}, memory_max="100") == ["memory.swap.max 200"]
    with pytest.raises(OSError, match=r"memory\.swap"):
        second({"memory": {"swap": 300}}, memory_max="max")


def test_weights_without_bfq() -> None:
    (weight,) = resources_v2.settings({"blockIO": {"weight": 10}}, lambda _: None)
    assert weight.instead is not None and (weight.instead.file, weight.instead.value) == ("io.weight", "1")
    (weight,) = resources_v2.settings({"blockIO": {"weight": 1000}}, lambda _: None)
    assert weight.instead is not None and weight.instead.value == "10000"


@given(st.integers(0, 1 << 20), st.integers(0, 1 << 20))
def test_shares_keep_their_order(one: int, other: int) -> None:
    weights = resources_v2.weight_of_shares(one), resources_v2.weight_of_shares(other)
    assert all(1 <= weight <= 10000 for weight in weights)
    assert one > other or weights[0] <= weights[1]


# -- paths ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "group"),
    [
        ("/a/b", "a/b"),
        ("//a/./b/", "a/b"),
        ("a/b", "insula-oci/a/b"),
        (None, "insula-oci/c1"),
        ("", "insula-oci/c1"),
        ("/..a", "..a"),
    ],
)
def test_cgroups_path(path: str | None, group: str) -> None:
    assert locate(path, "c1") == group


@pytest.mark.parametrize("path", ["/", "/a/../b", "..", "a/\0", "//"])
def test_a_path_outside_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match=r"linux\.cgroupsPath"):
        locate(path, "c1")


def test_hierarchies_are_detected(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(
        "cgroup2 /c/unified cgroup2 rw 0 0\n"
        "cgroup /c/memory cgroup rw,memory 0 0\n"
        "cgroup /c/cpu,cpuacct cgroup rw,cpu,cpuacct 0 0\n"
    )
    found = detect(str(mounts))
    assert (found.version, found.controllers["cpu"], found.controllers["cpuacct"]) == (
        1,
        "/c/cpu,cpuacct",
        "/c/cpu,cpuacct",
    )
    assert (found.unified, found.beside) == (None, "/c/unified")
    with mounts.open("a") as file:
        file.write("none /c/unified tmpfs rw 0 0\n")
    hidden = detect(str(mounts))
    assert (hidden.beside, hidden.controllers) == (None, found.controllers), "another mount is on top"
    mounts.write_text("cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n")
    assert (detect(str(mounts)).version, detect(str(mounts)).unified) == (2, "/sys/fs/cgroup")
    assert detect(str(mounts)).beside is None


# -- writing ----------------------------------------------------------------------------------------------------------


def test_lines_of_a_keyed_file_are_put_back(tmp_path: Path) -> None:
    (tmp_path / "io.max").write_text("8:0 rbps=5\n8:16 rbps=7\n")
    undo: list[tuple[str, str]] = []
    for device in ("8:0", "8:32"):
        setting = Setting("blockIO", "io", "io.max", f"{device} rbps=1", reset="rbps=max")
        (tmp_path / "io.max").write_text("8:0 rbps=5\n8:16 rbps=7\n")  # a plain file is replaced by a write
        settings.write_all(lambda _: str(tmp_path), [setting], undo=undo)
    path = f"{tmp_path}/io.max"
    assert undo == [(path, "8:0 rbps=5"), (path, "8:32 rbps=max")]


def test_missing_controllers_are_named(tmp_path: Path) -> None:
    (tmp_path / "there").touch()
    instead = Setting("blockIO.weight", "io", "there", 7)
    settings.write_all(lambda _: str(tmp_path), [Setting("blockIO.weight", "io", "not there", 5, instead=instead)])
    assert files.read(f"{tmp_path}/there") == "7"
    settings.write_all(lambda _: str(tmp_path), [Setting("x", "io", "not there", 5, optional=settings.always)])
    with pytest.raises(OSError, match=r"linux\.resources\.a\.b is not supported here: this host has no file not there"):
        settings.write_all(lambda _: str(tmp_path), [Setting("a.b", "io", "not there", 5)])
    with pytest.raises(OSError, match="has no controller rdma"):
        Cgroup("nowhere", Hierarchy(None, {})).limit({"rdma": {"x": {"hcaHandles": 1}}})
    with pytest.raises(FileNotFoundError):  # the group itself
        settings.write_all(lambda _: f"{tmp_path}/gone", [Setting("a.b", "io", "there", 5)])


# -- the interface ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [CgroupV1, CgroupV2])
def test_each_version_has_the_whole_interface(version: type[Cgroup]) -> None:
    abstract = {name for name, method in vars(Cgroup).items() if "NotImplementedError" in names_in(method)}
    assert {"create", "kill", "thaw", "frozen", "oom_kills", "_settings"} <= abstract
    assert abstract - vars(version).keys() == set()


def names_in(method: object) -> tuple[str, ...]:
    code = getattr(method, "__code__", None)
    return code.co_names if code else ()


@pytest.mark.parametrize(
    ("tree", "version", "directories"),
    [
        (Hierarchy("/c", {}), CgroupV2, {"": "/c/a/b"}),
        (Hierarchy(None, {"memory": "/c/memory"}), CgroupV1, {"memory": "/c/memory/a/b"}),
        (Hierarchy(None, {"cpu": "/c/cpu", "pids": "/c/pids"}, "/c/unified"), CgroupV1,
         {"cpu": "/c/cpu/a/b", "pids": "/c/pids/a/b"}),
    ],
)  # fmt: skip
def test_the_class_is_that_of_the_tree(tree: Hierarchy, version: type[Cgroup], directories: dict[str, str]) -> None:
    group = Cgroup("a/b", tree)
    assert type(group) is version
    assert (group.path, group.directories()) == ("a/b", directories)


def test_controllers_share_a_directory() -> None:
    assert base.distinct({"cpu": "/c/cpu,cpuacct/g", "cpuacct": "/c/cpu,cpuacct/g", "memory": "/c/memory/g"}) == [
        "/c/cpu,cpuacct/g",
        "/c/memory/g",
    ]
