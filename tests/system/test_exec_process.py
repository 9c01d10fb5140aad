"""Attributes of a process when it executes the user's program, as the program and /proc show them."""

from __future__ import annotations

import errno
import os
import re
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from insula.container.create.exec_process import Filter, exec_process
from insula.container.create.steps import StepError, forbid_imports
from insula.kernel import capabilities as caps
from insula.kernel import scheduling, syscalls
from insula.kernel.seccomp import compiler
from tests.forked import forked

USER = 1234
OPTIONS = ("keep", "personality", "memory_policy", "joins", "warn", "wait", "listener", "last")


class Refused(Exception):
    """A step was refused: its name, the error, and its number."""

    def __init__(self, step: str, error: str, number: int) -> None:
        super().__init__(step, error, number)
        self.number = number

    def __str__(self) -> str:
        return f"{self.args[0]}: {self.args[1]}"


def became(script: str, before: Callable[[], object] = lambda: None, program: Filter | None = None, **more: Any) -> str:
    """The output of `script`, run by sh as the program of a process; `more` are fields of it and options of
    exec_process."""
    options = {name: more.pop(name) for name in OPTIONS if name in more}
    process = {"args": ["/bin/sh", "-c", script], "env": ["PATH=/usr/bin:/bin"], "cwd": "/", **more}
    process.setdefault("capabilities", {name: list(caps.NAMES) for name in ("bounding", "effective", "permitted")})
    readable, writable = os.pipe()

    def child() -> None:
        before()
        os.dup2(writable, 1)
        os.dup2(writable, 2)
        try:
            exec_process(process, program, **options)
        except StepError as error:
            raise Refused(error.text, error.message["error"], error.message["errno"]) from None

    try:
        forked(child)
    except EOFError:  # execve closed the pipe of its answer
        os.close(writable)
        with os.fdopen(readable) as output:
            return output.read().strip()
    raise AssertionError("departure returned")


def field(status: str, name: str) -> list[str]:
    found = re.search(rf"^{name}:[ \t]*(.*)$", status, re.MULTILINE)
    assert found, name
    return found[1].split()


# -- user, groups, directory, environment ------------------------------------------------------------------------------


def test_user_and_groups_are_set() -> None:
    user = {"uid": USER, "gid": 77, "additionalGids": [5, 99], "umask": 0o027}
    status = became("umask; cat /proc/self/status", user=user)
    assert status.splitlines()[0] == "0027"
    assert field(status, "Uid") == [str(USER)] * 4
    assert field(status, "Gid") == ["77"] * 4
    assert field(status, "Groups") == ["5", "99"]


def test_groups_of_the_caller_are_dropped() -> None:
    status = became("umask; cat /proc/self/status", before=lambda: os.setgroups([6, 7]))
    assert field(status, "Groups") == []
    assert status.splitlines()[0] == "0022"


def test_groups_where_a_user_namespace_denies_setgroups() -> None:
    """An ordinary user's namespace maps his own groups only; asking for none is no error, asking for some is."""

    def enter() -> None:
        uid = USER
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        syscalls.prctl(syscalls.PR_SET_DUMPABLE, 1)  # or /proc/self would be root's
        syscalls.unshare(syscalls.CLONE_NEWUSER)
        for name, line in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {uid} 1")):
            Path(f"/proc/self/{name}").write_text(line)

    assert became("id -u", before=enter) == "0"
    with pytest.raises(Refused, match="change the user"):
        became("id -u", before=enter, user={"additionalGids": [0]})


# -- what can't be given up is no start --------------------------------------------------------------------------------


def without(*names: str) -> Callable[[], None]:
    """For `before`: these capabilities are gone, so that what takes them is refused."""

    def lower() -> None:
        os.setgroups([6, 7])
        now, gone = caps.current(), caps.to_mask(names)
        caps.after_setuid(caps.Capabilities(0, now.effective & ~gone, now.permitted & ~gone))

    return lower


SOME = {"bounding": ["CAP_CHOWN"], "effective": ["CAP_CHOWN"], "permitted": ["CAP_CHOWN"]}
ENTRIES: list[tuple[str, str, dict[str, Any]]] = [
    ("SETPCAP", "drop capabilities", {"capabilities": SOME}),
    ("SETGID", "change the user", {}),
    ("SETGID", "change the user", {"user": {"additionalGids": [5]}}),
    ("SETGID", "change the user", {"user": {"gid": 77}}),
    ("SETUID", "change the user", {"user": {"uid": USER}}),
    (
        "SYS_ADMIN",
        "load the seccomp filter",
        {"program": Filter(compiler.compile({"defaultAction": "SCMP_ACT_ALLOW"}))},
    ),
]


@pytest.mark.parametrize(("missing", "step", "process"), ENTRIES)
def test_a_privilege_that_cannot_be_dropped_prevents_the_start(
    missing: str, step: str, process: dict[str, Any]
) -> None:
    """The bounding set, other groups, another user, the filter: the program doesn't run with what it shouldn't have."""
    with pytest.raises(Refused, match=f"{step}: ") as refused:
        became("echo it runs", before=without(missing), **process)
    assert refused.value.number in (errno.EPERM, errno.EACCES)
    assert became("echo it runs", before=without(), **process) == "it runs", "the control"


def test_dropping_a_missing_privilege_needs_no_right() -> None:
    def bounded() -> None:
        caps.before_setuid(caps.Capabilities.from_oci(SOME))
        without("SETPCAP")()

    status = became("cat /proc/self/status", before=bounded, capabilities=SOME)
    assert int(field(status, "CapBnd")[0], 16) == caps.to_mask(["CHOWN"])
    assert field(status, "Groups") == []


def test_the_working_directory_may_be_out_of_the_users_reach(tmp_path: Path) -> None:
    """As with runc: root enters it before the user is changed."""
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    assert became("pwd -P", cwd=str(private)) == str(private)
    assert became("readlink /proc/self/cwd", cwd=str(private), user={"uid": USER}) == str(private)


def test_the_working_directory_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="enter the working directory: No such file"):
        became("true", cwd=str(tmp_path / "missing"))


def test_the_working_directory_is_never_outside_of_the_root(tmp_path: Path) -> None:
    """CVE-2024-21626: a descriptor of a host's directory that was left open, as /proc/self/fd/N."""
    (tmp_path / "proc").mkdir()
    descriptor = os.open("/etc", os.O_PATH)

    def enter(root: Path) -> None:
        syscalls.unshare(syscalls.CLONE_NEWNS)
        syscalls.mount(None, "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
        syscalls.mount("/", str(root), None, syscalls.MS_BIND | syscalls.MS_REC)
        os.chdir(root)
        syscalls.pivot_root(".", ".")
        syscalls.umount2(".", syscalls.MNT_DETACH)
        os.chdir("/")

    cwd = f"/proc/self/fd/{descriptor}"
    try:
        # the control: without a change of root the same directory is inside, and so it can be entered
        assert became("pwd -P", cwd=cwd) == "/etc"
        with pytest.raises(Refused, match="enter the working directory: it is outside"):
            became("pwd -P", before=lambda: enter(tmp_path), cwd=cwd)
    finally:
        os.close(descriptor)


def test_home_is_that_of_passwd_unless_given() -> None:
    assert became("echo $HOME", env=["PATH=/bin", "HOME=/somewhere"]) == "/somewhere"
    assert became("echo $HOME", env=["PATH=/bin"]) == Path("~root").expanduser().as_posix()
    assert became("echo $HOME", env=["PATH=/bin"], user={"uid": 987654}) == "/"


def test_home_is_that_of_the_users_number_and_of_no_other(tmp_path: Path) -> None:
    lines = [
        "",
        "short:x:77:77",
        "group:x:5:77::/wrong:",
        "none:x:77:5:::",
        "first:x:77:5::/right:",
        "second:x:77:5::/late:",
    ]
    (tmp_path / "passwd").write_text("\n".join(lines))

    def replace() -> None:
        syscalls.unshare(syscalls.CLONE_NEWNS)
        syscalls.mount(None, "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
        syscalls.mount(tmp_path / "passwd", "/etc/passwd", None, syscalls.MS_BIND)

    assert became("echo $HOME", before=replace, user={"uid": 77, "gid": 5}) == "/right"
    assert became("echo $HOME", before=replace, user={"uid": 78, "gid": 77}) == "/"


def test_descriptors_are_closed_unless_kept(tmp_path: Path) -> None:
    def leak() -> None:
        for number in (3, 4, 5, 9):
            os.dup2(os.open(tmp_path, os.O_PATH), number, inheritable=number > 4)

    # 10 is sh's own while ls runs, and 3 there is the directory that ls reads
    everything = became("ls -l /proc/$$/fd", before=leak)
    assert str(tmp_path) not in everything
    kept = became("ls -l /proc/$$/fd", before=leak, keep=2)
    assert [line.split()[-3] for line in kept.splitlines() if line.endswith(str(tmp_path))] == ["3", "4"]


# -- limits and scheduling ---------------------------------------------------------------------------------------------


def test_limits() -> None:
    infinity = (1 << 64) - 1
    limits = [
        {"type": "RLIMIT_NOFILE", "soft": 100, "hard": 200},
        {"type": "RLIMIT_CORE", "soft": 0, "hard": 0},
        {"type": "RLIMIT_CPU", "soft": infinity, "hard": infinity},
        {"type": "RLIMIT_LOCKS", "soft": 5, "hard": 7},
    ]
    printed = became("cat /proc/self/limits", rlimits=limits)
    assert re.search(r"^Max open files +100 +200 ", printed, re.MULTILINE)
    assert re.search(r"^Max core file size +0 +0 ", printed, re.MULTILINE)
    assert re.search(r"^Max cpu time +unlimited +unlimited ", printed, re.MULTILINE)
    assert re.search(r"^Max file locks +5 +7 ", printed, re.MULTILINE)


def test_a_limit_above_the_maximum_is_an_error() -> None:
    def drop() -> None:
        without = caps.ALL & ~caps.to_mask(["SYS_RESOURCE"])
        caps.after_setuid(caps.Capabilities(0, *(caps.current().permitted & without,) * 2))
        os.sched_yield()

    lower = [{"type": "RLIMIT_NOFILE", "soft": 100, "hard": 100}]
    higher = [{"type": "RLIMIT_NOFILE", "soft": 100, "hard": 1 << 40}]
    assert became("ulimit -n", before=drop, rlimits=lower) == "100"
    with pytest.raises(Refused, match="set RLIMIT_NOFILE"):
        became("ulimit -n", before=drop, rlimits=higher)
    with pytest.raises(Refused, match="above what Linux counts to"):
        became("ulimit -n", rlimits=[{"type": "RLIMIT_CPU", "soft": 1, "hard": (1 << 64) - 2}])


@pytest.mark.parametrize(
    ("scheduler", "policy", "priority"),
    [
        ({"policy": "SCHED_OTHER", "nice": 7}, "SCHED_OTHER", 0),
        ({"policy": "SCHED_BATCH", "nice": 3}, "SCHED_BATCH", 0),
        ({"policy": "SCHED_IDLE"}, "SCHED_IDLE", 0),
        ({"policy": "SCHED_FIFO", "priority": 12}, "SCHED_FIFO", 12),
        ({"policy": "SCHED_RR", "priority": 99, "flags": ["SCHED_FLAG_RESET_ON_FORK"]}, "SCHED_RR", 99),
    ],
)
def test_scheduler(scheduler: dict[str, Any], policy: str, priority: int) -> None:
    printed = became("chrt -p $$; cat /proc/$$/stat", scheduler=scheduler)
    reset = "|SCHED_RESET_ON_FORK" if scheduler.get("flags") else ""
    assert re.search(rf"policy: {policy}{re.escape(reset)}$", printed, re.MULTILINE), printed
    assert re.search(rf"priority: {priority}$", printed, re.MULTILINE), printed
    if "nice" in scheduler:
        assert printed.splitlines()[-1].rpartition(")")[2].split()[16] == str(scheduler["nice"])


def test_deadline() -> None:
    times = {"runtime": 2_000_000, "deadline": 10_000_000, "period": 20_000_000}
    scheduler = {"policy": "SCHED_DEADLINE", "flags": ["SCHED_FLAG_RESET_ON_FORK"], **times}
    printed = became("chrt -p $$", scheduler=scheduler)
    assert "policy: SCHED_DEADLINE" in printed
    assert printed.splitlines()[-1].endswith("2000000/10000000/20000000")


def test_a_scheduler_that_is_refused() -> None:
    with pytest.raises(Refused, match="set the scheduler") as caught:
        became("true", scheduler={"policy": "SCHED_ISO"})
    assert caught.value.number == 22
    with pytest.raises(Refused, match="set the scheduler") as caught:
        became("true", before=lambda: os.setresuid(USER, USER, USER), scheduler={"policy": "SCHED_RR", "priority": 1})
    assert caught.value.number == 1


@pytest.mark.parametrize(
    ("name", "priority", "printed"),
    [
        ("IOPRIO_CLASS_BE", 6, "best-effort: prio 6"),
        ("IOPRIO_CLASS_RT", 1, "realtime: prio 1"),
        ("IOPRIO_CLASS_IDLE", 0, "idle"),
    ],
)
def test_io_priority(name: str, priority: int, printed: str) -> None:
    assert became("ionice -p $$", ioPriority={"class": name, "priority": priority}) == printed


def test_inherited_attributes_need_no_right() -> None:
    """In a user namespace no process may set a real-time policy; its creator may give it one."""
    wanted: dict[str, Any] = {"policy": "SCHED_FIFO", "priority": 5}
    first = {"class": "IOPRIO_CLASS_RT", "priority": 2}

    def enter() -> None:
        syscalls.unshare(syscalls.CLONE_NEWUSER)
        for name, line in (("setgroups", "deny"), ("uid_map", "0 0 1"), ("gid_map", "0 0 1")):
            Path(f"/proc/self/{name}").write_text(line)

    def prepared() -> None:
        scheduling.set_scheduler(wanted)
        scheduling.set_io_priority(first)
        enter()

    printed = became("chrt -p $$; ionice -p $$", before=prepared, scheduler=wanted, ioPriority=first)
    assert "SCHED_FIFO" in printed
    assert "realtime: prio 2" in printed
    with pytest.raises(Refused, match="set the scheduler: sched_setattr: Operation not permitted"):
        became("true", before=enter, scheduler=wanted)
    with pytest.raises(Refused, match="set the I/O priority: ioprio_set: Operation not permitted"):
        became("true", before=enter, ioPriority=first)


def test_affinity_is_for_exec() -> None:
    all_of_them = os.sched_getaffinity(0)
    one = max(all_of_them)
    affinity = {"initial": "0", "final": str(one)}
    status = became("cat /proc/self/status", joins=True, execCPUAffinity=affinity)
    assert field(status, "Cpus_allowed_list") == [str(one)]
    status = became("cat /proc/self/status", joins=False, execCPUAffinity=affinity)
    assert field(status, "Cpus_allowed_list") == field(Path("/proc/self/status").read_text(), "Cpus_allowed_list")


def test_without_a_final_affinity_it_is_the_containers() -> None:
    """The initial affinity does not stay."""
    before = field(Path("/proc/self/status").read_text(), "Cpus_allowed_list")
    one = min(os.sched_getaffinity(0))
    status = became(
        "cat /proc/self/status",
        before=lambda: os.sched_setaffinity(0, {one}),
        joins=True,
        execCPUAffinity={"initial": str(one)},
    )
    assert field(status, "Cpus_allowed_list") == before


def test_personality() -> None:
    native = os.uname().machine
    assert became("uname -m", personality={"domain": "LINUX"}) == native
    if native == "x86_64":
        assert became("uname -m", personality={"domain": "LINUX32"}) == "i686"
    with pytest.raises(Refused, match="set the personality: personality has no flags"):
        became("true", personality={"domain": "LINUX", "flags": ["ADDR_NO_RANDOMIZE"]})


# -- capabilities and labels -------------------------------------------------------------------------------------------


def sets_of(status: str) -> caps.Capabilities:
    return caps.Capabilities(
        *(int(field(status, name)[0], 16) for name in ("CapBnd", "CapEff", "CapPrm", "CapInh", "CapAmb"))
    )


def test_another_user_has_the_requested_capabilities() -> None:
    asked = {
        "bounding": ["CAP_KILL", "CAP_CHOWN", "CAP_NET_RAW"],
        "effective": ["CAP_KILL"],
        "permitted": ["CAP_KILL", "CAP_NET_RAW"],
        "inheritable": ["CAP_NET_RAW", "CAP_KILL"],
        "ambient": ["CAP_NET_RAW"],
    }
    got = sets_of(became("cat /proc/self/status", user={"uid": USER}, capabilities=asked))
    raw, kill, chown = (caps.to_mask([name]) for name in ("NET_RAW", "KILL", "CHOWN"))
    # execve of a user that isn't root: what is ambient is permitted and effective, all else is gone
    assert got == caps.Capabilities(raw | kill | chown, raw, raw, raw | kill, raw)


def test_without_capabilities_there_are_none() -> None:
    got = sets_of(became("cat /proc/self/status", capabilities=None))
    assert got == caps.Capabilities()


def test_capabilities_that_cannot_be_granted_are_left_out_with_a_warning(tmp_path: Path) -> None:
    told = tmp_path / "told"
    asked = {name: ["CAP_CHOWN", "CAP_KILL"] for name in ("bounding", "effective", "permitted", "inheritable")}
    asked["ambient"] = ["CAP_CHOWN"]

    def drop() -> None:
        less = caps.current().permitted & ~caps.to_mask(["CHOWN"])
        caps.after_setuid(caps.Capabilities(0, less, less))

    def warn(text: str) -> None:
        told.write_text(text)

    options: dict[str, Any] = {"user": {"uid": USER}, "capabilities": asked, "warn": warn}
    got = sets_of(became("cat /proc/self/status", before=drop, **options))
    assert told.read_text() == "capabilities that cannot be granted: CAP_CHOWN"
    assert got.ambient == got.permitted == 0
    told.unlink()
    got = sets_of(became("cat /proc/self/status", **options))  # the control
    assert got.ambient == caps.to_mask(["CHOWN"])
    assert not told.exists()


@pytest.mark.parametrize("restricted", [True, False])
def test_no_new_privileges(restricted: bool) -> None:
    status = became("cat /proc/self/status", noNewPrivileges=restricted)
    assert field(status, "NoNewPrivs") == [str(int(restricted))]


def enabled(module: str) -> bool:
    path = {"apparmor": "/sys/module/apparmor/parameters/enabled", "selinux": "/sys/fs/selinux/enforce"}[module]
    return os.path.exists(path)


@pytest.mark.skipif(enabled("apparmor"), reason="AppArmor is enabled here")
def test_an_apparmor_profile_without_apparmor_is_refused() -> None:
    assert became("echo here", apparmorProfile="unconfined") == "here"
    with pytest.raises(Refused, match="set the AppArmor profile insula-default"):
        became("true", apparmorProfile="insula-default")


@pytest.mark.skipif(enabled("selinux"), reason="SELinux is enabled here")
def test_an_selinux_label_without_selinux_is_refused() -> None:
    with pytest.raises(Refused, match="set the SELinux label system_u"):
        became("true", selinuxLabel="system_u:system_r:container_t:s0")


@pytest.mark.parametrize("fake", ["directory", "file"])
def test_a_label_is_written_to_procfs_and_nothing_else(tmp_path: Path, fake: str) -> None:
    """CVE-2019-16884: a /proc, or a file in it, that takes the label and does nothing."""

    def cover() -> None:
        syscalls.unshare(syscalls.CLONE_NEWNS)
        syscalls.mount(None, "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
        if fake == "directory":
            (tmp_path / f"{os.getpid()}" / "attr").mkdir(parents=True)
            (tmp_path / f"{os.getpid()}" / "attr" / "exec").touch()
            syscalls.mount(str(tmp_path), "/proc", None, syscalls.MS_BIND)
        else:
            (tmp_path / "exec").touch()
            syscalls.mount(str(tmp_path / "exec"), f"/proc/{os.getpid()}/attr/exec", None, syscalls.MS_BIND)

    with pytest.raises(Refused, match=r"it is not procfs|Invalid cross-device link"):
        became("true", before=cover, apparmorProfile="insula-default")
    assert not [p for p in tmp_path.rglob("exec") if p.stat().st_size]


def test_nothing_is_imported_among_a_containers_files(tmp_path: Path) -> None:
    """An image may have a module where ours would be looked for; this one would be found, were it not forbidden."""
    (tmp_path / "ours_or_theirs.py").write_text("import os\nos.write(1, b'hostile')\n")

    def imports(forbidden: bool) -> str:
        sys.path.insert(0, str(tmp_path))
        if forbidden:
            forbid_imports()
        try:
            __import__("ours_or_theirs")
        except ImportError:
            return "refused"
        return "imported"

    assert forked(lambda: imports(False)) == "imported"
    assert forked(lambda: imports(True)) == "refused"


# -- execve ------------------------------------------------------------------------------------------------------------


def test_the_path_of_the_new_environment_is_searched(tmp_path: Path) -> None:
    (tmp_path / "hello").write_text("#!/bin/sh\necho hello\n")
    (tmp_path / "hello").chmod(0o755)
    assert became("", args=["hello"], env=[f"PATH=/nowhere:{tmp_path}"]) == "hello"
    with pytest.raises(Refused, match="no such file in the PATH") as caught:
        became("", args=["hello"], env=["PATH=/nowhere"])
    assert caught.value.number == 2
    (tmp_path / "hello").chmod(0o644)
    with pytest.raises(Refused) as caught:
        became("", args=["hello"], env=[f"PATH=/nowhere:{tmp_path}"])
    assert caught.value.number == 13


def test_the_runtime_itself_is_not_executed() -> None:
    assert stat.S_ISREG(os.stat("/proc/self/exe").st_mode)
    with pytest.raises(Refused, match="the runtime's own program"):
        became("", args=["/proc/self/exe", "-c", "print('here')"])
