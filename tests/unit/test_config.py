"""Validation of config.json: valid ones pass, and every error names its field."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from insula.container.config import check, check_process, check_resources, schema
from insula.model.errors import Invalid
from tests.unit.valid_config import FULL, MISSING, changed, paths, value_at

# maps of the user's own names: `paths` and `changed` can't tell a dot in a name
OPEN = ("annotations.", "linux.sysctl.", "linux.resources.unified.")
FIELDS = [path for path in paths(FULL) if not path.startswith(OPEN)]


def refused(config: object) -> Invalid:
    with pytest.raises(Invalid) as caught:
        check(config, bundle="")
    message = str(caught.value)
    assert message.isprintable() and len(message) < 600
    return caught.value


def test_every_field_of_the_spec_is_accepted() -> None:
    config = copy.deepcopy(FULL)
    assert check(config, bundle="") is config
    assert config == FULL


def test_the_valid_config_uses_every_field() -> None:
    """Else the tests below would miss some."""

    def used(kind: object, value: Any, path: str) -> list[str]:
        if isinstance(kind, list):
            merged: dict[str, Any] = {}
            for item in value:
                merged |= item if isinstance(item, dict) else {}
            return used(kind[0], merged, f"{path}[]") if isinstance(kind[0], dict) else []
        if not isinstance(kind, dict) or str in kind:
            return []
        lacking = []
        for name, inner in kind.items():
            name = name.rstrip("!")
            where = f"{path}.{name}"
            lacking += used(inner, value[name], where) if name in value else [where]
        return lacking

    times = [f".process.scheduler.{name}" for name in ("runtime", "deadline", "period")]
    assert used(schema.CONFIG, FULL, "") == times  # SCHED_DEADLINE alone has them: see below


def test_a_minimal_config_is_accepted() -> None:
    config = {
        "ociVersion": "1.0.2-dev",
        "root": {"path": "rootfs"},
        "process": {"cwd": "/", "args": ["sh"]},
        "linux": {"namespaces": [{"type": "mount"}]},
    }
    assert check(config, bundle="") is config


@pytest.mark.parametrize("path", FIELDS)
def test_every_field_has_a_type(path: str) -> None:
    wrongs: list[object] = [1.5, "\0", [[]], [None]]
    for wrong in wrongs if isinstance(value_at(path), dict) else [*wrongs, {"x": 1}]:
        error = refused(changed(path, wrong))
        assert error.message.startswith(path), "the field's path comes first"


@pytest.mark.parametrize("path", FIELDS)
def test_null_is_absent(path: str) -> None:
    if path.endswith("]"):
        assert refused(changed(path, None)).message.startswith(f"{path}: None is not")
        return
    outcomes = []
    for value in (None, MISSING):
        try:
            outcomes.append(check(changed(path, value), bundle=""))
        except Invalid as error:
            outcomes.append({"error": str(error)})
    assert outcomes[0] == outcomes[1]


def test_configs_of_the_container_driver_are_accepted() -> None:
    """`container.spec` writes the configs of instances, and the runtime carries them out without another check."""
    from insula.control.instances.drivers.container.spec import config
    from insula.control.instances.drivers.container.users import User
    from insula.model.objects import ImageConfig, InstanceSpec, Resources

    instance = InstanceSpec(image="busybox", command=["true"], resources=Resources(cpus=0.5, memory=64 << 20, pids=9))
    made = config(instance, ImageConfig(), user=User(), id_base=1 << 20, hostname="web", cgroup="insula/acme/web")
    warnings: list[str] = []
    assert check(copy.deepcopy(made), bundle="", warn=warnings.append) == made
    assert warnings == []


def test_unknown_fields_are_ignored_at_any_depth() -> None:
    for path in ("extra", "process.extra", "linux.extra", "linux.resources.cpu.extra", "mounts[0].extra"):
        config = changed(path, {"any": [object]})
        assert check(config, bundle="") is config


REQUIRED = [
    "ociVersion",
    "root",
    "root.path",
    "process",
    "process.args",
    "process.cwd",
    "process.consoleSize.height",
    "process.rlimits[0].type",
    "process.rlimits[0].soft",
    "process.rlimits[0].hard",
    "process.scheduler.policy",
    "process.ioPriority.class",
    "linux.memoryPolicy.mode",
    "mounts[0].destination",
    "hooks.poststop[0].path",
    "linux",
    "linux.namespaces[0].type",
    "linux.uidMappings[0].containerID",
    "linux.uidMappings[0].hostID",
    "linux.uidMappings[0].size",
    "linux.uidMappings",
    "linux.gidMappings",
    "linux.devices[0].type",
    "linux.devices[0].path",
    "linux.devices[0].major",
    "linux.devices[0].minor",
    "linux.personality.domain",
    "linux.resources.devices[0].allow",
    "linux.resources.blockIO.throttleReadBpsDevice[0].rate",
    "linux.resources.blockIO.weightDevice[0].major",
    "linux.resources.hugepageLimits[0].pageSize",
    "linux.resources.hugepageLimits[0].limit",
    "linux.resources.network.priorities[0].name",
    "linux.seccomp.defaultAction",
    "linux.seccomp.syscalls[0].names",
    "linux.seccomp.syscalls[0].action",
    "linux.seccomp.syscalls[1].args[0].index",
    "linux.seccomp.syscalls[1].args[0].op",
    "linux.seccomp.listenerPath",
]


@pytest.mark.parametrize("path", REQUIRED)
def test_required_fields(path: str) -> None:
    assert refused(changed(path, MISSING)).message.startswith(f"{path}: is missing")


MAPPING = {"containerID": 0, "hostID": 0, "size": 1}
WRONG: list[tuple[str, object, str]] = [
    # path, what is put there, what the complaint says
    ("ociVersion", "0.5.0", "not version 1"),
    ("ociVersion", "2.0.0", "not version 1"),
    ("ociVersion", "1.2", "not a version"),
    ("root.path", "", "is empty"),
    ("hostname", "x" * 65, "longer than 64 bytes"),
    ("domainname", "ü" * 33, "longer than 64 bytes"),
    ("process.args", [], "no program"),
    ("process.args", [""], "no program"),
    ("process.args[0]", "a\0b", "NUL"),
    ("process.args[0]", "\ud800", "surrogate"),
    ("process.env[0]", "=x", "no name"),
    ("process.env[0]", "", "no name"),
    ("process.cwd", "tmp", "not an absolute path"),
    ("process.cwd", "", "not an absolute path"),
    ("process.user.uid", -1, "not from 0"),
    ("process.user.uid", (1 << 32) - 1, "not from 0"),
    ("process.user.uid", 65536, "not mapped"),
    ("process.user.gid", 65536, "not mapped"),
    ("process.user.umask", 0o1000, "not from 0 to 511"),
    ("process.rlimits[0].type", "RLIMIT_FOO", "unknown"),
    ("process.rlimits[1].type", "RLIMIT_NOFILE", "there twice"),
    ("process.rlimits[0].soft", 21, "above hard"),
    ("process.rlimits[0].hard", 1 << 64, "not from 0"),
    ("process.oomScoreAdj", -1001, "not from -1000 to 1000"),
    ("process.scheduler.policy", "SCHED_ISO", "unknown"),
    ("process.scheduler.nice", 20, "not from -20 to 19"),
    ("process.scheduler.priority", 0, "no priority of SCHED_FIFO"),
    ("process.scheduler.flags[0]", "RESET", "unknown"),
    ("process.scheduler.policy", "SCHED_FIFO ", "unknown"),
    ("process.ioPriority.class", "IOPRIO_CLASS_NONE", "unknown"),
    ("process.ioPriority.priority", 8, "not from 0 to 7"),
    ("process.execCPUAffinity.initial", "3-1", "not a list"),
    ("process.execCPUAffinity.final", "0,", "not a list"),
    ("process.execCPUAffinity.final", "100000", "not a list"),
    ("process.selinuxLabel", "system_u:object_r:x:s0", "no SELinux"),
    ("mounts[0].type", "", "no bind mount"),
    ("mounts[1].source", "", "a bind mount needs it"),
    ("mounts[2].uidMappings[0].size", 0, "not from 1"),
    ("mounts[0].destination", "", "is empty"),
    ("hooks.prestart[0].path", "true", "not an absolute path"),
    ("hooks.prestart[0].timeout", 0, "not from 1"),
    ("hooks.prestart[0].env[0]", "=", "no name"),
    ("linux.namespaces[0].type", "mnt", "unknown"),
    ("linux.namespaces[1].type", "pid", "there twice"),
    ("linux.namespaces[1].path", "run/netns/x", "not an absolute path"),
    ("linux.uidMappings", [MAPPING] * 2, "in two ranges"),
    ("linux.gidMappings", [{"containerID": 1, "hostID": (1 << 32) - 1, "size": 2}], "beyond 32 bits"),
    ("linux.uidMappings", [{"containerID": i, "hostID": i, "size": 1} for i in range(341)], "too many"),
    ("linux.timeOffsets.realtime", {"secs": 1}, "not a clock"),
    ("linux.timeOffsets.boottime.nanosecs", 10**9, "not from 0"),
    ("linux.devices[0].type", "a", "unknown"),
    ("linux.devices[0].path", "dev/fuse", "not an absolute path"),
    ("linux.devices[0].major", 4096, "not from 0 to 4095"),
    ("linux.cgroupsPath", "/a/../../b", "upward"),
    ("linux.rootfsPropagation", "none", "unknown"),
    ("linux.maskedPaths[0]", "proc/kcore", "not an absolute path"),
    ("linux.readonlyPaths[0]", "", "not an absolute path"),
    ("linux.mountLabel", "system_u:object_r:x:s0", "no SELinux"),
    ("linux.personality.domain", "BSD", "unknown"),
    ("linux.personality.flags", ["ADDR_NO_RANDOMIZE"], "no flags"),
    ("linux.intelRdt", {}, "Intel RDT is not supported"),
    ("linux.memoryPolicy.mode", "MPOL_ODD", "'MPOL_ODD' is unknown: invalid memory policy mode"),
    ("linux.memoryPolicy.mode", MISSING, "is missing: invalid memory policy mode"),
    ("linux.memoryPolicy", {"mode": "MPOL_DEFAULT", "nodes": "0-1"}, "MPOL_DEFAULT mode requires 0 nodes but got 2"),
    ("linux.memoryPolicy.nodes", "", "needs nodes"),
    ("linux.memoryPolicy.nodes", "1-0", "'1-0' is not a list as in 0-3,7: invalid memory policy node"),
    ("linux.memoryPolicy.flags[0]", "odd", "'odd' is unknown: invalid memory policy flag"),
    ("linux.memoryPolicy.flags", ["MPOL_F_STATIC_NODES", "MPOL_F_RELATIVE_NODES"], "not both"),
    ("linux.netDevices.eth0.name", "", "not the name of a network device"),
    ("linux.netDevices.eth0.name", "a" * 16, "not the name of a network device"),
    ("linux.netDevices.eth0.name", "a/b", "not the name of a network device"),
    ("linux.netDevices.eth0.name", "a%s", "not the name of a network device"),
    ("linux.netDevices.eth0.name", "%d%d", "not the name of a network device"),
    ("linux.netDevices.eth0.name", "lo", "loopback"),
    ("linux.netDevices.eth1.name", "x y", "not the name of a network device"),
    ("vm", {}, "not supported"),
    ("linux.resources.devices[1].type", "a", "means all"),
    ("linux.resources.devices[1].access", "x", "r, w and m"),
    ("linux.resources.devices[1].major", -2, "not from -1"),
    ("linux.resources.memory.limit", "1g", "not a whole number"),
    ("linux.resources.memory.limit", True, "not a whole number"),
    ("linux.resources.memory.limit", 1e6, "not a whole number"),
    ("linux.resources.memory.limit", 10**4400, "a huge number"),
    ("linux.resources.memory.limit", -2, "not from -1"),
    ("linux.resources.memory.swap", 5, "below limit"),
    ("linux.resources.memory.swappiness", 101, "not from 0 to 100"),
    ("linux.resources.cpu.burst", 50001, "above quota"),
    ("linux.resources.cpu.period", 999, "not from 1000"),
    ("linux.resources.cpu.cpus", "a", "not a list"),
    ("linux.resources.cpu.idle", 2, "not from 0 to 1"),
    ("linux.resources.pids.limit", -2, "not from -1"),
    ("linux.resources.blockIO.weight", 1001, "not from 0 to 1000"),
    ("linux.resources.blockIO.weightDevice[0]", {"major": 8, "minor": 0}, "neither"),
    ("linux.resources.hugepageLimits[0].pageSize", "2mb", "not a page size"),
    ("linux.resources.hugepageLimits[1].pageSize", "2MB", "there twice"),
    ("linux.resources.rdma.mlx5_1", {}, "neither"),
    ("linux.seccomp.defaultAction", "SCMP_ACT_FOO", "unknown"),
    ("linux.seccomp.architectures[0]", "x86_64", "unknown"),
    ("linux.seccomp.flags[0]", "SECCOMP_FILTER_FLAG_NEW_LISTENER", "unknown"),
    ("linux.seccomp.defaultErrnoRet", 4096, "above 4095"),
    ("linux.seccomp.syscalls[0].errnoRet", 1, "SCMP_ACT_ALLOW has no errno"),
    ("linux.seccomp.syscalls[0].names", [], "names no system call"),
    ("linux.seccomp.syscalls[0].names[0]", "", "is empty"),
    ("linux.seccomp.syscalls[1].args[0].index", 6, "not from 0 to 5"),
    ("linux.seccomp.syscalls[1].args[0].op", "EQ", "unknown"),
]


@pytest.mark.parametrize(
    ("path", "value", "complaint"), WRONG, ids=lambda value: repr(value)[:40] if isinstance(value, str) else ""
)
def test_wrong_values(path: str, value: object, complaint: str) -> None:
    error = refused(changed(path, value))
    assert error.message.startswith(f"{path}: ") or error.message.startswith((f"{path}[", f"{path}."))
    assert complaint in error.message
    assert error.hint


def elsewhere(message: str, *changes: tuple[str, object]) -> None:
    """After `changes` the error begins with `message`."""
    config = FULL
    for path, value in changes:
        config = changed(path, value, config)
    assert refused(config).message.startswith(message)


def without(*kinds: str) -> list[dict[str, str]]:
    return [entry for entry in FULL["linux"]["namespaces"] if entry["type"] not in kinds]


def test_conditions_between_fields() -> None:
    namespaces = "linux.namespaces"
    elsewhere("linux.namespaces: the mount namespace would be the host's", (namespaces, without("mount")))
    ours = [*without("mount"), {"type": "mount", "path": "/proc/self/ns/mnt"}]
    elsewhere("linux.namespaces: the mount namespace would be the host's", (namespaces, ours))
    foreign = [*without("mount"), {"type": "mount", "path": "/proc/1/ns/mnt-of-another"}]
    elsewhere("linux.namespaces: a container can't join a mount namespace", (namespaces, foreign))
    elsewhere("linux.uidMappings: there is no user namespace", (namespaces, without("user")))
    elsewhere("hostname: there is no UTS namespace", (namespaces, without("uts")))
    elsewhere("domainname: there is no UTS", (namespaces, without("uts")), ("hostname", MISSING))
    elsewhere("linux.timeOffsets: there is no new time namespace", (namespaces, without("time")))
    joined = [*without("time"), {"type": "time", "path": "/proc/1/ns/time"}]
    elsewhere("linux.timeOffsets: there is no new time namespace", (namespaces, joined))
    elsewhere("linux.sysctl.net.ipv4.ip_forward: there is no network namespace", (namespaces, without("network")))
    elsewhere("mounts[2]: uidMappings is alone", ("mounts[2].gidMappings", MISSING))
    elsewhere("mounts[0].type: only a bind mount", ("mounts[0].options", ["idmap"]))
    elsewhere("linux.resources.memory.swap: there is no limit", ("linux.resources.memory.limit", MISSING))
    elsewhere("process.user.gid: 65536 is not mapped", ("process.user.additionalGids", [65536]))
    quota = ("linux.resources.cpu.quota", 999)
    elsewhere("linux.resources.cpu.quota: 999 is below 1000", quota, ("linux.resources.cpu.burst", 0))
    listener = ("linux.seccomp.listenerPath", MISSING)
    elsewhere("linux.seccomp.listenerMetadata: there is no", listener, ("linux.seccomp.syscalls", []))
    notify = ("linux.seccomp.defaultAction", "SCMP_ACT_NOTIFY")
    elsewhere("linux.seccomp.defaultAction: may not be", notify, ("linux.seccomp.defaultErrnoRet", MISSING))


def test_an_idmapped_mount_needs_a_mapping() -> None:
    """Its own, or that of the container's user namespace."""
    own = {"uidMappings": MISSING, "gidMappings": MISSING}
    config = FULL
    for name, value in own.items():
        config = changed(f"mounts[2].{name}", value, config)
    check(copy.deepcopy(config), bundle="")
    for path, value in {"linux.namespaces": without("user"), **{f"linux.{name}": MISSING for name in own}}.items():
        config = changed(path, value, config)
    assert refused(config).message.startswith("mounts[2].options: there is no mapping")


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("kernel.core_pattern", "not of any namespace"),
        ("kernel.hostname", "not of any namespace"),
        ("vm.overcommit_memory", "not of any namespace"),
        ("fs.file-max", "not of any namespace"),
        ("net", "not of any namespace"),
        ("net/../kernel/core_pattern", "not the name"),
        ("/net/ipv4/ip_forward", "not the name"),
        ("net..x", "not the name"),
        ("", "is empty"),
    ],
)
def test_a_sysctl_is_of_a_namespace_of_the_container(name: str, complaint: str) -> None:
    error = refused(changed("linux.sysctl", {name: "1"}))
    assert error.message.startswith("linux.sysctl") and complaint in error.message


@pytest.mark.parametrize("name", ["kernel.domainname", "kernel/domainname"])
def test_the_domain_name_is_set_once(name: str) -> None:
    elsewhere(f"linux.sysctl.{name}: is not what domainname says", ("linux.sysctl", {name: "other.org"}))
    check(changed("linux.sysctl", {name: FULL["domainname"]}), bundle="")


@pytest.mark.parametrize("name", ["net.core.somaxconn", "net/ipv4/conf/eth0.1/forwarding", "kernel.shmmax"])
def test_sysctls_of_namespaces(name: str) -> None:
    check(changed("linux.sysctl", {name: "1"}), bundle="")


def test_the_hosts_network_namespace_by_its_path_is_still_the_hosts() -> None:
    error = refused(changed("linux.namespaces[1].path", "/proc/self/ns/net"))
    assert error.message == "linux.sysctl.net.ipv4.ip_forward: the network namespace is the host's"


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("memory/high", "not a file"),
        ("../memory.high", "not a file"),
        ("memory", "not a file"),
        ("cgroup.procs", "own"),
    ],
)
def test_unified_names_files_of_controllers(name: str, complaint: str) -> None:
    error = refused(changed("linux.resources.unified", {name: "1"}))
    assert error.message.startswith("linux.resources.unified") and complaint in error.message


def test_an_annotation_has_a_name() -> None:
    assert refused(changed("annotations", {"": "x"})).message == "annotations['']: is empty"
    assert refused(changed("annotations", {"a b\n": 1})).message == "annotations['a b\\n']: 1 is not a string"


def test_unknown_capabilities_are_left_out_with_a_warning() -> None:
    """The spec: a runtime SHOULD NOT fail, and MUST warn."""
    warnings: list[str] = []
    config = changed("process.capabilities.bounding", ["CAP_KILL", "CAP_OF_TOMORROW"])
    assert check(config, bundle="", warn=warnings.append)["process"]["capabilities"]["bounding"] == ["CAP_KILL"]
    assert warnings == ["process.capabilities.bounding: there is no capability 'CAP_OF_TOMORROW'; it is left out"]


@pytest.mark.skipif(Path("/sys/module/apparmor/parameters/enabled").exists(), reason="this kernel has AppArmor")
def test_a_profile_needs_apparmor() -> None:
    error = refused(changed("process.apparmorProfile", "docker-default"))
    assert error.message == "process.apparmorProfile: this kernel has no AppArmor"


def test_the_root_is_a_directory(tmp_path: Path) -> None:
    config = copy.deepcopy(FULL)
    with pytest.raises(Invalid, match=r"^root.path: there is no directory"):
        check(config, bundle=str(tmp_path))
    (tmp_path / "rootfs").mkdir()
    assert check(config, bundle=str(tmp_path)) is config
    assert check(changed("root.path", str(tmp_path)), bundle="/nowhere")


@pytest.mark.parametrize("config", [None, 1, "x", [], [{}]])
def test_a_config_is_an_object(config: object) -> None:
    assert refused(config).message.startswith("the config: ")


def test_a_process_that_joins() -> None:
    process = {"cwd": "/", "args": ["sh"], "user": {"uid": 5, "gid": 5}}
    assert check_process(process, FULL) is process
    with pytest.raises(Invalid, match=r"^process.user.uid: 65536 is not mapped"):
        check_process({**process, "user": {"uid": 65536}}, FULL)
    with pytest.raises(Invalid, match=r"^process.cwd: is missing"):
        check_process({"args": ["sh"]}, FULL)


def test_limits_alone() -> None:
    resources = {"memory": {"limit": 5, "swap": None}}
    assert check_resources(resources) == {"memory": {"limit": 5}}
    with pytest.raises(Invalid, match=r"^resources.memory.limit: 'x' is not a whole number"):
        check_resources({"memory": {"limit": "x"}})


# -- fuzzing -----------------------------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=())),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
known_words = st.sampled_from(
    [
        "/",
        "..",
        "a/../b",
        "\0",
        "user",
        "mount",
        "SCMP_ACT_NOTIFY",
        "bind",
        "-1",
        "0-3",
        "CAP_KILL",
        "\ud800",
        "x" * 5000,
    ]
)
known_numbers = st.sampled_from([-(1 << 63), -1, 0, 1, 999, (1 << 32) - 1, 1 << 32, (1 << 63) - 1, 1 << 64, 10**5000])
mutations = st.tuples(st.sampled_from(FIELDS), json_values | known_words | known_numbers | st.just(MISSING))


@settings(max_examples=400, deadline=None)
@given(st.lists(mutations, min_size=1, max_size=5))
def test_a_mutated_config_is_valid_or_refused_in_one_line(changes: list[tuple[str, object]]) -> None:
    config = copy.deepcopy(FULL)
    for path, value in changes:
        try:
            config = changed(path, value, config)
        except (KeyError, IndexError, TypeError):
            continue  # an earlier change took away what this one would spoil
    try:
        result = check(config, bundle="")
    except Invalid as error:
        assert str(error).isprintable()
        assert len(str(error)) < 700
        assert error.message.split(": ")[0].split(".")[0].split("[")[0] in FULL
    else:
        assert result is config
        check(config, bundle="")  # what passed once passes again


@settings(max_examples=200, deadline=None)
@given(json_values)
def test_any_json_is_valid_or_refused(config: object) -> None:
    refused(config)
