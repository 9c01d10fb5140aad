"""The OCI config of a launch: Docker's defaults, the differences, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from insula.cli.verbs import run
from insula.control.instances.drivers.container import seccomp_default
from insula.control.instances.drivers.container import spec as module
from insula.control.instances.drivers.container.spec import config
from insula.control.instances.drivers.container.users import User
from insula.kernel import capabilities
from insula.model.errors import Invalid
from insula.model.objects import ContainerOptions, ImageConfig, InstanceSpec, Resources, Rlimit, TmpfsMount

BASE = 1 << 20


def make(
    image: ImageConfig | None = None, *, user: User | None = None, hostname: str = "web", **spec: Any
) -> dict[str, Any]:
    """The config of an instance for which this is asked: fields of the spec, or of its options."""
    options = {name: spec.pop(name) for name in ContainerOptions.__struct_fields__ if name in spec}
    spec = {"image": "busybox", "command": ["true"], "options": ContainerOptions(**options), **spec}
    return config(
        InstanceSpec(**spec),
        image or ImageConfig(),
        user=user or User(),
        id_base=BASE,
        hostname=hostname,
        cgroup="insula/acme/0123",
        etc=Path("/etc"),
    )


def mount(made: dict[str, Any], destination: str) -> dict[str, Any]:
    (found,) = [m for m in made["mounts"] if m["destination"] == destination]
    assert isinstance(found, dict)
    return found


def test_the_options_that_open_system_calls() -> None:
    assert run.FAMILIES == seccomp_default.FAMILIES, "what is completed is what there is"
    plain, opened = make()["linux"]["seccomp"], make(aio=True, socket_families=["can"])["linux"]["seccomp"]
    assert plain == seccomp_default.profile(capabilities.to_names(capabilities.DEFAULT))
    names = capabilities.to_names(capabilities.DEFAULT)
    assert opened == seccomp_default.profile(names, aio=True, families=["can"]) != plain
    with pytest.raises(Invalid, match="socket family 'alg'"):
        make(socket_families=["alg"])


def test_isolation_is_the_default() -> None:
    made = make()
    assert {n["type"] for n in made["linux"]["namespaces"]} == {
        "user",
        "pid",
        "mount",
        "network",
        "ipc",
        "uts",
        "cgroup",
    }
    mapping = [{"containerID": 0, "hostID": BASE, "size": 65536}]
    assert made["linux"]["uidMappings"] == made["linux"]["gidMappings"] == mapping
    assert made["process"]["noNewPrivileges"] is True
    assert made["linux"]["resources"]["devices"][0] == {"allow": False, "access": "rwm"}
    assert made["linux"]["seccomp"]["defaultAction"] == "SCMP_ACT_ERRNO"
    assert made["linux"]["cgroupsPath"] == "/insula/acme/0123"
    assert {"/proc/kcore", "/proc/keys", "/sys/firmware", "/proc/timer_list"} <= set(made["linux"]["maskedPaths"])
    assert {"/proc/sys", "/proc/sysrq-trigger"} <= set(made["linux"]["readonlyPaths"])
    assert "ro" in mount(made, "/sys")["options"]
    assert "ro" in mount(made, "/sys/fs/cgroup")["options"]
    for destination in ("/proc", "/dev", "/dev/pts", "/dev/shm", "/dev/mqueue", "/sys"):
        assert "nosuid" in mount(made, destination)["options"]
    assert made["linux"]["resources"]["pids"] == {"limit": 4096}
    json.dumps(made)


def test_root_has_dockers_capabilities_and_others_none() -> None:
    names = capabilities.to_names(capabilities.DEFAULT)
    assert make()["process"]["capabilities"] == {
        "bounding": names, "effective": names, "permitted": names, "inheritable": [], "ambient": [],
    }  # fmt: skip
    other = make(user=User(33, 34, (34,), "/var/www"))["process"]
    assert other["capabilities"]["bounding"] == names
    assert other["capabilities"]["effective"] == other["capabilities"]["permitted"] == []
    assert other["user"] == {"uid": 33, "gid": 34, "additionalGids": [34], "umask": 0o022}


def test_capabilities_change_the_seccomp_profile_too() -> None:
    def calls(made: dict[str, Any]) -> set[str]:
        rules = made["linux"]["seccomp"]["syscalls"]
        return {n for rule in rules if rule["action"] == "SCMP_ACT_ALLOW" for n in rule["names"]}

    assert "mount" not in calls(make())
    admin = make(cap_add=["sys_admin"], cap_drop=["ALL"])
    assert "mount" in calls(admin)
    assert admin["process"]["capabilities"]["bounding"] == ["CAP_SYS_ADMIN"]


@pytest.mark.parametrize(
    ("entrypoint", "command", "image_entrypoint", "image_cmd", "args"),
    [
        (None, [], ["/entry"], ["a", "b"], ["/entry", "a", "b"]),
        (None, ["c"], ["/entry"], ["a", "b"], ["/entry", "c"]),
        (None, [], [], ["sh"], ["sh"]),
        (["/own"], [], ["/entry"], ["a"], ["/own"]),
        (["/own"], ["c"], ["/entry"], ["a"], ["/own", "c"]),
        ([], ["c"], ["/entry"], ["a"], ["c"]),
        ([""], ["c"], ["/entry"], ["a"], ["c"]),
    ],
)
def test_command_as_docker_combines_it(
    entrypoint: list[str] | None, command: list[str], image_entrypoint: list[str], image_cmd: list[str], args: list[str]
) -> None:
    image = ImageConfig(entrypoint=image_entrypoint, cmd=image_cmd)
    assert make(image, entrypoint=entrypoint, command=command)["process"]["args"] == args


def allowed(made: dict[str, Any]) -> set[str]:
    """System calls that some rule of the profile allows whatever their arguments are."""
    rules = made["linux"]["seccomp"]["syscalls"]
    return {n for r in rules if r["action"] == "SCMP_ACT_ALLOW" and not r.get("args") for n in r["names"]}


def test_nesting_allows_namespaces_and_mounts_and_nothing_else() -> None:
    strict, nesting = make(), make(nesting=True)
    runtime = {"clone", "clone3", "mount", "pivot_root", "setns", "umount2", "unshare", "fsopen", "move_mount"}
    assert not runtime & allowed(strict)
    assert runtime <= allowed(nesting)
    dangerous = {"bpf", "keyctl", "perf_event_open", "quotactl", "syslog", "open_by_handle_at", "init_module", "reboot"}
    assert not dangerous & allowed(nesting), "although it has CAP_SYS_ADMIN"
    assert "bpf" in allowed(make(nesting=True, cap_add=["SYS_ADMIN"])), "the control: that was asked for"
    more = set(nesting["process"]["capabilities"]["bounding"]) - set(strict["process"]["capabilities"]["bounding"])
    assert more == {"CAP_SYS_ADMIN", "CAP_NET_ADMIN"}
    assert nesting["linux"]["maskedPaths"] == strict["linux"]["maskedPaths"]
    assert "ro" not in mount(nesting, "/dev/.insula/proc")["options"]
    assert not any(m["destination"].startswith("/dev/.insula") for m in strict["mounts"])


def test_environment_defaults_image_and_user() -> None:
    image = ImageConfig(env=["PATH=/image", "A=image", "B=image", "EMPTY"])
    made = make(image, env={"B": "own", "HOME": "/own"}, tty=True, user=User(home="/root"))
    env = dict(entry.split("=", 1) for entry in made["process"]["env"])
    assert env == {
        "PATH": "/image", "HOSTNAME": "web", "HOME": "/own", "TERM": "xterm", "A": "image", "B": "own", "EMPTY": "",
    }  # fmt: skip
    plain = dict(entry.split("=", 1) for entry in make(user=User(home="/root"))["process"]["env"])
    assert plain == {"PATH": module.PATH, "HOSTNAME": "web", "HOME": "/root"}


def test_resources() -> None:
    made = make(resources=Resources(cpus=0.5, memory=64 << 20, pids=100))["linux"]["resources"]
    assert made["cpu"] == {"quota": 50000, "period": 100000, "shares": 512}
    assert made["memory"] == {"limit": 64 << 20, "swap": 64 << 20}
    assert made["pids"] == {"limit": 100}
    unlimited = make(resources=Resources(pids=None))["linux"]["resources"]
    assert set(unlimited) == {"devices", "memory"}
    assert unlimited["memory"] == {"kernelTCP": -1}, "no limit, but version 1 counts for the tenant's"


def test_the_devices_of_every_container() -> None:
    """devices.txt: null, zero, full, random, urandom, tty, console, ptmx, all pseudoterminals, and no other."""
    first, *allowed = make()["linux"]["resources"]["devices"]
    assert first == {"allow": False, "access": "rwm"}
    assert all((rule["allow"], rule["type"], rule["access"]) == (True, "c", "rwm") for rule in allowed)
    numbers = [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 1), (5, 2), (136, None)]
    assert [(rule["major"], rule.get("minor")) for rule in allowed] == numbers


def test_resources_of_an_update() -> None:
    """Removed limits are written as unlimited; a limit below usage is refused when it is set."""
    none = {"quota": -1, "period": 100000, "shares": 1024}
    assert module.update(Resources(pids=None)) == {
        "cpu": none,
        "memory": {"limit": -1, "swap": -1, "checkBeforeUpdate": True},
        "pids": {"limit": -1},
    }
    assert module.update(Resources(cpus=2.0, memory=64 << 20, pids=7)) == {
        "cpu": {"quota": 200000, "period": 100000, "shares": 2048},
        "memory": {"limit": 64 << 20, "swap": 64 << 20, "checkBeforeUpdate": True},
        "pids": {"limit": 7},
    }


def test_the_score_of_the_process_and_the_range_of_its_ids() -> None:
    made = make()
    assert made["process"]["oomScoreAdj"] == 0, "not insulad's own, which the kernel kills last"
    assert made["linux"]["sysctl"] == {
        "net.ipv4.ip_unprivileged_port_start": "0",
        "net.ipv4.ping_group_range": "0 65535",
    }
    assert {"newinstance", "ptmxmode=0666", "mode=0620", "gid=5", "max=64"} <= set(mount(made, "/dev/pts")["options"])


LARGEST: list[dict[str, Any]] = [
    {"command": ["x" * ((128 << 10) - 1)]},
    {"command": ["x" * 991] * 2090},
    {"env": {"A": "x" * ((128 << 10) - 3)}},
    {"working_dir": "/" + "a" * 4094},
    {"hostname": "x" * 64},
    {"hostname": "x"},
    {"hostname": "a-b.c-d"},
    {"mounts": [TmpfsMount(path="/" + "a" * 4094)]},
    *({"mounts": [TmpfsMount(path="/a", size=size)]} for size in (4096, (1 << 63) - 1)),
    *({"mounts": [TmpfsMount(path="/a", mode=mode)]} for mode in (0, 0o1777)),
    *({"mounts": [TmpfsMount(path="/a", uid=number, gid=number)]} for number in (0, 65535)),
    *({"mounts": [TmpfsMount(path=path)]} for path in ("/process", "/system", "/devices", "/a/proc")),
    *({"shm_size": size} for size in (4096, (1 << 63) - 1)),
    *({"resources": Resources(cpus=cpus)} for cpus in (0.01, 65536)),
    *({"resources": Resources(memory=memory)} for memory in (6 << 20, (1 << 63) - 1)),
    *({"resources": Resources(pids=pids)} for pids in (1, 1 << 22)),
    *({"rlimits": [Rlimit(name="nofile", soft=soft, hard=hard)]} for soft, hard in ((0, 0), (7, 7), (0, -1), (-1, -1))),
    {"sysctls": {"net.ipv4.ip_forward": "x" * 1024}},
]
BEYOND: list[dict[str, Any]] = [
    {"command": ["x" * (128 << 10)]},
    {"env": {"A": "x" * ((128 << 10) - 2)}},
    {"working_dir": "/" + "a" * 4095},
    {"mounts": [TmpfsMount(path="/" + "a" * 4095)]},
    {"mounts": [TmpfsMount(path="/a", size=4095)]},
    {"resources": Resources(cpus=0.0099)},
    {"resources": Resources(cpus=65536.5)},
    {"resources": Resources(memory=(6 << 20) - 1)},
    {"resources": Resources(pids=(1 << 22) + 1)},
    {"sysctls": {"net.ipv4.ip_forward": "x" * 1025}},
]


@pytest.mark.parametrize("good", LARGEST, ids=lambda good: repr(good)[:60])
def test_values_just_within_bounds_are_accepted(good: dict[str, Any]) -> None:
    json.dumps(make(**good))


@pytest.mark.parametrize("bad", BEYOND, ids=lambda bad: repr(bad)[:60])
def test_values_just_beyond_bounds_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(Invalid):
        make(**bad)


def test_errors_name_the_wrong_part() -> None:
    for bad, says in (({"memory": 5 << 20}, "bytes of memory"), ({"pids": 0}, "processes"), ({"cpus": 0.0}, "CPUs")):
        with pytest.raises(Invalid, match=says):
            make(resources=Resources(**bad))


def test_the_ranges_of_ids_that_a_tenant_may_have() -> None:
    def mapped(base: int) -> int:
        made = config(
            InstanceSpec(image="x", command=["x"]), ImageConfig(), user=User(), id_base=base, hostname="x", cgroup="x"
        )
        return int(made["linux"]["uidMappings"][0]["hostID"])

    last = (1 << 32) - 1 - 65536  # 2³² - 1 is no ID: chown(2) takes it for "as it is"
    assert (mapped(65536), mapped(last)) == (65536, last)
    for base in (65535, last + 1):
        with pytest.raises(Invalid):
            mapped(base)


def test_mounts_of_the_user_are_before_the_files_of_etc_and_outer_ones_first() -> None:
    made = make(mounts=[TmpfsMount(path="/etc/x", size=1 << 20), TmpfsMount(path="/etc", size=1 << 20)])
    order = [m["destination"] for m in made["mounts"]]
    assert order.index("/etc") < order.index("/etc/x") < order.index("/etc/hosts")
    assert {"nosuid", "nodev", "noexec", "size=1048576"} <= set(mount(made, "/etc")["options"])
    assert {"nosuid", "nodev", "noexec"} <= set(mount(made, "/etc/resolv.conf")["options"])


def test_the_options_of_a_tmpfs() -> None:
    usual = ["nosuid", "nodev", "noexec", "mode=1777", f"size={64 << 20}"]
    assert mount(make(mounts=[TmpfsMount(path="/t")]), "/t")["options"] == usual
    own = TmpfsMount(path="/t", size=1 << 20, mode=0o750, uid=1000, gid=100, executable=True, read_only=True)
    assert mount(make(mounts=[own]), "/t")["options"] == [
        *("nosuid", "nodev", "ro", "mode=750", "size=1048576", "uid=1000", "gid=100")
    ]


def test_the_size_of_shared_memory() -> None:
    assert "size=65536k" not in mount(make(), "/dev/shm")["options"]
    assert f"size={64 << 20}" in mount(make(), "/dev/shm")["options"]
    assert mount(make(shm_size=1 << 30), "/dev/shm")["options"] == [
        *("nosuid", "noexec", "nodev", "mode=1777", f"size={1 << 30}")
    ]


def test_volumes_of_the_image() -> None:
    image = ImageConfig(volumes=["/data", "logs", "/a//b/../c", "/", "/proc/x", "/dev", "/sys", "/tmp"])
    made = make(image, mounts=[TmpfsMount(path="/tmp")])
    found = [(m["destination"], m["options"]) for m in made["mounts"] if m["type"] == "insula.volume"]
    assert found == [("/a/c", []), ("/data", []), ("/logs", [])]
    made = make(image, read_only=True)
    found = [(m["destination"], m["options"]) for m in made["mounts"] if m["type"] == "insula.volume"]
    assert found == [("/a/c", ["rw"]), ("/data", ["rw"]), ("/logs", ["rw"]), ("/tmp", ["rw"])]


@pytest.mark.parametrize("volumes", [["/a\0b"], ["/" + "a" * 5000], [f"/{n}" for n in range(65)]])
def test_volumes_that_no_image_may_have(volumes: list[str]) -> None:
    with pytest.raises(Invalid, match="the image declares"):
        make(ImageConfig(volumes=volumes))


def test_init_read_only_and_rlimits() -> None:
    made = make(init=True, read_only=True, rlimits=[Rlimit(name="nofile", soft=100, hard=-1)])
    assert made["process"]["args"] == ["/dev/init", "--", "true"]
    assert mount(made, "/dev/init")["source"].startswith("/usr/bin/tini")
    assert made["root"]["readonly"] is True
    assert made["process"]["rlimits"] == [{"type": "RLIMIT_NOFILE", "soft": 100, "hard": (1 << 64) - 1}]


def test_namespaced_sysctls() -> None:
    asked = {"net.ipv4.ip_forward": "1", "kernel.shmmax": "65536", "fs.mqueue.msg_max": "20", "kernel.sem": "1 2 3 4"}
    assert asked.items() <= make(sysctls=asked)["linux"]["sysctl"].items()


BAD: list[dict[str, Any]] = [
    {"command": []},
    {"command": [""]},
    {"command": ["a\0b"]},
    {"command": ["x" * (128 << 10)]},
    {"command": ["x" * 1000] * 2100},
    {"command": ["\udcff" * 3 + "\ud800"]},
    {"env": {"": "x"}},
    {"env": {"A=B": "x"}},
    {"env": {"A\0": "x"}},
    {"env": {"A": "x\0"}},
    {"env": {"A": "x" * (128 << 10)}},
    {"working_dir": "relative"},
    {"working_dir": "/a\0"},
    {"working_dir": "/" + "a" * 4096},
    {"hostname": "-x"},
    {"hostname": "a..b"},
    {"hostname": "x" * 65},
    {"hostname": "a b"},
    {"hostname": "a\n"},
    {"hostname": ""},
    {"cap_add": ["EVERYTHING"]},
    {"cap_drop": ["CAP_"]},
    {"rlimits": [Rlimit(name="files", soft=1, hard=1)]},
    {"rlimits": [Rlimit(name="RLIMIT_NOFILE", soft=1, hard=1)]},
    {"rlimits": [Rlimit(name="nofile", soft=2, hard=1)]},
    {"rlimits": [Rlimit(name="nofile", soft=-1, hard=1)]},
    {"rlimits": [Rlimit(name="nofile", soft=-2, hard=1)]},
    {"rlimits": [Rlimit(name="nofile", soft=1, hard=1 << 65)]},
    {"sysctls": {"kernel.core_pattern": "|/x"}},
    {"sysctls": {"vm.overcommit_memory": "1"}},
    {"sysctls": {"kernel.shm_next_id": "1"}},
    {"sysctls": {"kernel.randomize_va_space": "0"}},
    {"sysctls": {"net": "1"}},
    {"sysctls": {"net..x": "1"}},
    {"sysctls": {"net.../kernel/core_pattern": "1"}},
    {"sysctls": {"net.ipv4.ip_forward\n": "1"}},
    {"sysctls": {"net.ipv4.ip_forward": "1\n2"}},
    {"sysctls": {"net.ipv4.ip_forward": ""}},
    *(
        {"mounts": [TmpfsMount(path=p)]}
        for p in ("/", "", "x", "/proc", "/proc/x", "/sys", "/dev", "/dev/shm", "/a/../proc")
    ),
    *({"mounts": [TmpfsMount(path=p)]} for p in ("/a//b", "/a/", "/./a", "//", "/a\0b", "/" + "a" * 4096)),
    {"mounts": [TmpfsMount(path="/a", size=0)]},
    *({"mounts": [TmpfsMount(path="/a", mode=mode)]} for mode in (-1, 0o2000, 0o4755, 1 << 40)),
    *({"mounts": [TmpfsMount(path="/a", uid=uid)]} for uid in (-1, 65536)),
    *({"mounts": [TmpfsMount(path="/a", gid=gid)]} for gid in (-1, 65536)),
    *({"shm_size": size} for size in (0, -1, 4095, 1 << 63)),
    {"mounts": [TmpfsMount(path="/a", size=-1)]},
    {"mounts": [TmpfsMount(path="/a", size=1 << 63)]},
    *({"resources": Resources(cpus=c)} for c in (0, -1, float("nan"), float("inf"), 1e9)),
    *({"resources": Resources(memory=m)} for m in (0, -1, 1 << 20, 1 << 63)),
    *({"resources": Resources(pids=p)} for p in (0, -1, 1 << 23)),
]


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: repr(bad)[:60].encode("ascii", "replace").decode())
def test_refused_in_one_line_with_a_hint(bad: dict[str, Any]) -> None:
    with pytest.raises(Invalid) as caught:
        make(**bad)
    assert caught.value.hint
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_an_image_cannot_break_the_config_either() -> None:
    for image in (
        ImageConfig(env=["=x"]),
        ImageConfig(env=["A=\0"]),
        ImageConfig(working_dir="../.."),
        ImageConfig(entrypoint=["a\0"]),
    ):
        with pytest.raises(Invalid):
            make(image)


def test_a_range_of_the_host_itself_is_refused() -> None:
    for base in (0, 1000, 65535, 1 << 32):
        with pytest.raises(Invalid):
            config(
                InstanceSpec(image="x", command=["x"]),
                ImageConfig(),
                user=User(),
                id_base=base,
                hostname="x",
                cgroup="x",
            )


@given(
    st.builds(
        lambda **fields: fields,
        command=st.lists(st.text(max_size=8), max_size=3),
        env=st.dictionaries(st.text(max_size=4), st.text(max_size=8), max_size=3),
        working_dir=st.one_of(st.none(), st.text(max_size=8), st.just("/x")),
        hostname=st.one_of(st.text(max_size=8), st.just("web")),
        sysctls=st.dictionaries(st.from_regex(r"(net|kernel|vm)\.[a-z./]{0,8}"), st.text(max_size=4), max_size=2),
        mounts=st.lists(st.builds(TmpfsMount, path=st.from_regex(r"/[a-z./]{0,6}"), size=st.integers()), max_size=2),
        cap_add=st.lists(st.sampled_from(["all", "chown", "CAP_X", ""]), max_size=2),
    )
)
@settings(max_examples=200, deadline=None)
def test_anything_is_either_refused_or_sound(fields: dict[str, Any]) -> None:
    try:
        made = make(**fields)
    except Invalid as error:
        assert "\n" not in str(error)
        return
    text = json.dumps(made)
    assert "\\u0000" not in text
    assert made["process"]["args"][0]
    assert made["process"]["cwd"].startswith("/")
    assert all(m["destination"].startswith("/") and ".." not in m["destination"].split("/") for m in made["mounts"])
    assert all("/" not in key for key in made["linux"]["sysctl"])
