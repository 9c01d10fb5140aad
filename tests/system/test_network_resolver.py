"""The resolver of a tenant, which parses data of hostile instances: its confinement, and that it works."""

from __future__ import annotations

import errno
import functools
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from insula.kernel import libc, syscalls
from insula.kernel.netns import call_in
from insula.kernel.seccomp import load as seccomp_load
from insula.model.errors import Failed
from insula.network.linux import confine
from insula.network.linux.fabric import LinuxFabric
from tests.forked import forked
from tests.support.groups import made, trees
from tests.support.lab import Instance, Lab, eventually, isolated, query, two_tenants
from tests.support.machine import Run
from tests.support.wait import patiently

NAMES = {"web": ["10.0.0.2", "fd00::2"]}
BIND = f"{1 << 10:016x}"  # CAP_NET_BIND_SERVICE


def pid_of(cloud: Lab, tenant: str) -> int:
    return int((cloud.run / "dns" / tenant / "pid").read_text())


def status_of(pid: int) -> dict[str, str]:
    return dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())


def query_by_tcp(netns: int, server: str, name: str, kind: int = 1) -> bytes:
    """The answer's address (RFC 1035, 4.2.2), the last thing in it."""
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split(".")) + b"\0"
    question = b"\7\7\1\0\0\1\0\0\0\0\0\0" + labels + struct.pack("!HH", kind, 1)
    family = socket.AF_INET6 if ":" in server else socket.AF_INET
    with call_in(netns, lambda: socket.socket(family, socket.SOCK_STREAM)) as sock:
        sock.settimeout(patiently(3))
        sock.connect((server, 53))
        sock.sendall(struct.pack("!H", len(question)) + question)
        with sock.makefile("rb") as answer:
            (length,) = struct.unpack("!H", answer.read(2))
            body = answer.read(length)
    assert body[:2] == question[:2] and body[3] & 15 == 0
    return body[-4:] if kind == 1 else body[-16:]


def assert_names_resolve(web: Instance) -> None:
    """By UDP and TCP, over both IP versions, with addresses of both."""
    eventually(lambda: query(web.netns, "10.0.0.1", "web") == (0, ["10.0.0.2"]))
    for server in ("10.0.0.1", "fd00::1"):
        assert query(web.netns, server, "web.acme.internal") == (0, ["10.0.0.2"])
        assert query(web.netns, server, "web", 28) == (0, ["fd00::2"])
        assert query_by_tcp(web.netns, server, "web") == socket.inet_aton("10.0.0.2")
        assert query_by_tcp(web.netns, server, "web", 28) == socket.inet_pton(socket.AF_INET6, "fd00::2")


@isolated
def test_a_resolver_has_no_rights_no_sight_of_the_host_and_answers_all_the_same() -> None:
    with two_tenants() as cloud:
        users = {}
        for name in cloud.tenants:
            cloud.set_names(name, NAMES)
            pid = pid_of(cloud, name)
            status = status_of(pid)
            users[name] = status["Uid"].split()
            assert {status[f"Cap{which}"] for which in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {BIND}
            assert status["NoNewPrivs"] == "1" and status["Seccomp"] == "2" and status["Groups"].split() == []
            assert status["NSpid"].split()[-1] == "1" and len(status["NSpid"].split()) == 2
            assert status_of(os.getpid())["Seccomp"] == "0", "the control"
            limits = Path(f"/proc/{pid}/limits").read_text().splitlines()
            found = {line[:25].strip(): line[26:].split()[:2] for line in limits}
            assert found["Max file size"] == ["0", "0"] and found["Max address space"] == ["268435456"] * 2
            assert found["Max processes"] == ["1024", "1024"] and found["Max open files"] == ["4096", "4096"]
            for kind in ("pid", "mnt", "ipc", "uts", "net"):
                assert os.readlink(f"/proc/{pid}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}"), kind
            assert_it_sees_only_what_it_needs(pid, cloud.run / "dns" / name / "hosts")
        assert users == {name: [str(0x70000000 + t.index)] * 4 for name, t in cloud.tenants.items()}
        assert_names_resolve(cloud.instances["acme", "web"])
        assert_others_can_not_read_names(cloud)


def assert_it_sees_only_what_it_needs(pid: int, hosts: Path) -> None:
    root = Path(f"/proc/{pid}/root")
    assert Path("/etc/shadow").exists() and not (root / "etc").exists()
    files = {f"/{path.relative_to(root)}" for path in root.rglob("*") if not path.is_dir()}
    names = {name for name in files if name.startswith(f"{hosts}/")}
    libraries = {name for name in files if ".so." in name}
    program = os.path.realpath(shutil.which("dnsmasq", path="/usr/sbin:/usr/bin:/sbin") or "")
    assert files - names - libraries == {"/dev/null", "/dev/urandom", program}
    assert names and any("libc.so" in name for name in libraries)
    mounts = [line.split() for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines()]
    assert len(mounts) == len(files - names) + 2, "each file is one, and so are the root and the names"
    assert all({"ro", "nosuid"} <= set(mount[5].split(",")) for mount in mounts)


def assert_others_can_not_read_names(cloud: Lab) -> None:
    directory = cloud.run / "dns"
    for name, tenant in cloud.tenants.items():
        for path in (directory / name, directory / name / "hosts", *(directory / name / "hosts").iterdir()):
            info = path.stat()
            assert (info.st_uid, info.st_gid) == (0, 0x70000000 + tenant.index) and info.st_mode & 0o027 == 0, path
    assert (cloud.run / "network").stat().st_mode & 0o077 == 0 and directory.stat().st_mode & 0o066 == 0


ATTEMPTS = {
    # what is tried → what is said of it; all works for root outside, which is the control
    "cat /etc/shadow": "No such file",
    "mount -t tmpfs none /run/place": "permission denied",
    "chroot / {busybox} true": "Operation not permitted",
    "unshare -m {busybox} true": "Operation not permitted",
    "mkdir /run/new": "Operation not permitted",
    "chmod 777 /run/place": "No such file",
    "ls /run/place": "No such file",
    "kill -0 {pid}": "No such process",
}


@isolated
def test_a_program_in_the_resolver_s_place_gets_nowhere() -> None:
    """The same confinement around a shell, as for an attacker who has taken over dnsmasq."""
    busybox = os.path.realpath(shutil.which("busybox") or "")
    netns, lock = os.open("/proc/self/ns/net", os.O_RDONLY), os.memfd_create("lock")
    other = Instance()
    os.mkdir("/run/place")
    tries = [what.format(pid=other.pid, busybox=busybox) for what in ATTEMPTS]
    script = "exec 1>&2; " + "".join(f"{busybox} {what}; echo =$?=; " for what in tries)
    command = [busybox, "sh", "-c", script]
    child = call_in(netns, lambda: confine.start(command, 0x70000099, [busybox], [], confine.system_calls(), lock))
    said = child.communicate(timeout=patiently(20))[1].decode()
    answers = said.split("=\n")[: len(ATTEMPTS)]
    assert len(answers) == len(ATTEMPTS), said
    for (what, expected), answer in zip(ATTEMPTS.items(), answers, strict=True):
        assert expected in answer and not answer.endswith("=0"), (what, answer)
    control = subprocess.run(command, capture_output=True, timeout=patiently(20), check=False).stderr.decode()
    assert control.count("=0=") == len(ATTEMPTS), control
    other.remove()


def test_the_system_call_filter_allows_only_the_resolvers_calls() -> None:
    calls = confine.system_calls()
    namespaces = {f"unshare {flag:#x}": functools.partial(syscalls.unshare, flag) for flag in (0x10000000, 0x20000000)}
    refused: dict[str, Callable[[], object]] = {
        "unix": lambda: socket.socket(socket.AF_UNIX),
        "packet": lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW),
        "netfilter": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12),
        "ptrace": lambda: libc.check(libc.function("ptrace")(0, 0, 0, 0), "ptrace"),
        "setuid": lambda: os.setresuid(1, 1, 1),
        "unlink": lambda: os.unlink("/none"),
        "memfd": lambda: os.memfd_create("x"),
        "prctl": lambda: syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1),
        **namespaces,
    }
    allowed: dict[str, Callable[[], object]] = {
        "UDP": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
        "TCP over IPv6": lambda: socket.socket(socket.AF_INET6, socket.SOCK_STREAM),
        "rtnetlink": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE),
        "fork": lambda: os.waitpid(os.fork() or os._exit(0), 0),
        "file": lambda: os.close(os.open("/dev/null", os.O_RDONLY)),
    }

    def confined() -> dict[str, int]:
        syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
        seccomp_load.load(calls)
        return {name: errno_of(attempt) for name, attempt in {**refused, **allowed}.items()}

    found = forked(confined)
    assert found == {**dict.fromkeys(refused, errno.EPERM), **dict.fromkeys(allowed, 0)}
    free = forked(lambda: {name: errno_of(attempt) for name, attempt in refused.items() if name != "setuid"})
    assert errno.EPERM not in free.values(), "the control"


def errno_of(attempt: Callable[[], object]) -> int:
    try:
        attempt()
    except OSError as error:
        return error.errno or -1
    return 0


@isolated
def test_names_are_read_again_at_sighup_and_noticed_without_it() -> None:
    with two_tenants() as cloud:
        web, more = cloud.instances["acme", "web"], dict(NAMES)
        cloud.set_names("acme", NAMES)
        assert_names_resolve(web)
        pid = pid_of(cloud, "acme")
        for number in range(3, 6):  # more than a pipe that nobody reads would take is said nowhere
            os.kill(pid, signal.SIGHUP)
            more[f"n{number}"] = [f"10.0.0.{number}"]
            cloud.set_names("acme", more)
            eventually(lambda n=number: query(web.netns, "10.0.0.1", f"n{n}") == (0, [f"10.0.0.{n}"]))  # type: ignore[misc]
        assert_names_resolve(web)
        del more["n3"]
        cloud.set_names("acme", more)
        eventually(lambda: query(web.netns, "10.0.0.1", "n3.acme.internal") == (3, []))
        assert pid_of(cloud, "acme") == pid and Path(f"/proc/{pid}").exists()


@isolated
def test_a_resolver_is_taken_over_and_one_that_died_or_is_not_confined_is_replaced() -> None:
    with two_tenants() as cloud:
        acme, web = cloud.tenants["acme"], cloud.instances["acme", "web"]
        cloud.set_names("acme", NAMES)
        first = pid_of(cloud, "acme")
        cloud.fabric.close()
        reopen(cloud)
        cloud.apply("acme")
        assert pid_of(cloud, "acme") == first, "it is taken over"
        assert_names_resolve(web)
        os.kill(first, signal.SIGKILL)
        eventually(lambda: cloud.fabric.installed(acme).drift == ["the resolver does not run"])
        cloud.apply("acme")
        second = pid_of(cloud, "acme")
        assert second != first and status_of(second)["Seccomp"] == "2"
        assert_names_resolve(web)
        os.kill(second, signal.SIGKILL)
        eventually(lambda: not is_resolver(second))
        old = as_it_was_started_before(cloud, "acme")  # an upgrade finds one like this
        assert status_of(old)["Seccomp"] == "0" and cloud.fabric.installed(acme).drift
        cloud.apply("acme")
        eventually(lambda: not is_resolver(old))
        assert status_of(pid_of(cloud, "acme"))["Seccomp"] == "2"
        assert_names_resolve(web)
        assert cloud.fabric.installed(acme).drift == []


def as_it_was_started_before(cloud: Lab, tenant: str) -> int:
    """A dnsmasq that daemonises itself, on the host's file system, with the arguments of earlier versions."""
    user, hosts = str(0x70000000 + cloud.tenants[tenant].index), cloud.run / "dns" / tenant / "hosts"
    rights = ["--inh-caps=-all,+net_bind_service", "--ambient-caps=-all,+net_bind_service"]
    command = [
        *("setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", *rights, "dnsmasq"),
        *("--conf-file=/dev/null", "--pid-file=", f"--hostsdir={hosts}", "--user=root", "--interface=br*"),
        *("--except-interface=lo", "--bind-dynamic", "--no-hosts", "--no-resolv"),
    ]
    environment = {"PATH": f"{os.environ['PATH']}:/usr/sbin"}
    inside = cloud.inside(tenant)

    def started() -> bool:  # once the addresses of the one before are free
        return call_in(
            inside, lambda: subprocess.run(command, env=environment, timeout=patiently(20), check=False).returncode == 0
        )

    eventually(started)
    serving = {tenant: pid_of(cloud, tenant) for tenant in cloud.tenants}

    def found() -> list[int]:
        seen = [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and is_resolver(int(pid))]
        return [pid for pid in seen if pid not in serving.values()]

    eventually(lambda: len(found()) == 1)  # those that it was forked by have ended
    [pid] = found()
    (cloud.run / "dns" / tenant / "pid").write_text(f"{pid}\n")
    return pid


@pytest.mark.parametrize(
    ("readable", "said"), [(["/none/such"], "/none/such"), ([], "No such file"), (["PROGRAM"], "No such file")]
)
@isolated
def test_a_resolver_that_can_not_start_says_why_and_leaves_nothing(readable: list[str], said: str) -> None:
    """It lacks a file that should be there, its program, or the libraries of that."""
    cloud = Lab()
    acme = cloud.tenant("acme")
    pid = pid_of(cloud, "acme")
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not is_resolver(pid))
    real = confine.start

    def start(command: list[str], user: int, _: object, *rest: Any) -> subprocess.Popen[bytes]:
        return real(command, user, [command[0] if path == "PROGRAM" else path for path in readable], *rest)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(confine, "start", start)
        with pytest.raises(Failed, match=said) as failed:
            cloud.apply("acme")
    assert failed.value.message.startswith("the resolver of tenant acme did not start: ")
    assert "\n" not in str(failed.value)
    assert not any(is_resolver(int(pid)) for pid in os.listdir("/proc") if pid.isdigit())
    cloud.apply("acme")
    assert is_resolver(pid_of(cloud, "acme")) and cloud.fabric.installed(acme).drift == []


@isolated
def test_a_start_that_outlives_its_insulad_is_waited_for() -> None:
    """The process is held up where it shows no arguments yet, as between fork(2) and execve(2), and insulad killed."""
    cloud = Lab()
    acme = cloud.tenant("acme")
    pid = pid_of(cloud, "acme")
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not is_resolver(pid))
    go, waits = Path("/run/go"), Path("/run/waits")
    held_up = f"""if True:
        import json, os, time
        open({str(waits)!r}, "w").close()
        while not os.path.exists({str(go)!r}):
            time.sleep(0.01)
        words = json.loads(os.environ.pop("WORDS"))
        os.execv(words[0], words)
    """
    real = subprocess.Popen

    def popen(words: list[str], *, env: dict[str, str], **rest: Any) -> subprocess.Popen[bytes]:
        return real([sys.executable, "-c", held_up], env={**env, "WORDS": json.dumps(words)}, **rest)

    def begin() -> None:
        reopen(cloud)
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(subprocess, "Popen", popen)
            cloud.apply("acme")

    cloud.fabric.close()  # threads and sockets are none to share with a fork
    child = os.fork()
    if child == 0:
        try:
            begin()
        finally:
            os._exit(1)
    eventually(waits.exists)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    reopen(cloud)
    timer = threading.Timer(1, go.touch)
    timer.start()
    cloud.apply("acme")
    assert go.exists(), "it was not waited for"
    timer.join()
    assert [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and is_resolver(int(pid))] == [
        pid_of(cloud, "acme")
    ]
    assert cloud.fabric.installed(acme).drift == []


def reopen(cloud: Lab) -> None:
    """As the next insulad does."""
    cloud.fabric = LinuxFabric(cloud.run, "lab", resolvers=())
    cloud.fabric.open()


def is_resolver(pid: int) -> bool:
    try:
        return b"--hostsdir=" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("version", trees())
def test_a_confined_process_is_in_the_control_group_and_nothing_else_of_it(run_: Run, version: str) -> None:
    busybox = os.path.realpath(shutil.which("busybox") or "")
    command = [busybox, "sh", "-c", f"echo begun >&2; exec {busybox} sleep 60"]
    netns, lock = os.open("/proc/self/ns/net", os.O_RDONLY), os.memfd_create("lock")
    with made(run_.name, trees()[version]) as group:
        files = group.open()
        child = call_in(
            netns, lambda: confine.start(command, 0x70000098, [busybox], files, confine.system_calls(), lock)
        )
        for fd in (*files, netns, lock):
            os.close(fd)
        assert child.stdout and child.stderr
        with child.stdout, child.stderr:
            assert child.stderr.readline() == b"begun\n"
            pid = int(child.stdout.read())
        assert child.wait(patiently(20)) == 0, "who has started it is gone"
        assert group.processes() == [pid]
