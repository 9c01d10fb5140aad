"""Hostile images: an attacker controls everything in them, and the runtime handles them with the host's rights.

Each image is loaded and started as any other. It may be refused, in one line; or it may run, and then what was to be
redirected went nowhere. On the host nothing changes.
"""

from __future__ import annotations

import functools
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.forked import forked
from tests.support.cli import Cli
from tests.support.daemon import Daemon
from tests.support.images import Layout, member, tar
from tests.system.escape.cell import POISON, ManagedInstance, poisoned_paths

APPLETS = ("sh", "cat", "sleep", "ls", "id", "true", "readlink", "stat", "grep", "pwd", "rm", "ln", "head")


@functools.cache
def busybox() -> bytes:
    """The lower layer of each."""
    made = [member("bin"), member("bin/busybox", Path("/bin/busybox").read_bytes(), mode=0o755)]
    return tar(*made, *(member(f"bin/{name}", linkname="busybox") for name in APPLETS))


class Host:
    """Loads images, and tells whether anything of the host was touched meanwhile."""

    def __init__(self, cli: Cli, path: Path) -> None:
        self.cli, self.path = cli, path
        self.secret = path / "secret"
        self.secret.write_text("the host's secret")
        self._before = self._state()

    def load(self, *members: ManagedInstance, name: str = "hostile:latest", **process: Any) -> None:
        layout = Layout()
        process = {"Cmd": ["/bin/sleep", "600"], "Env": ["PATH=/bin"]} | process
        layout.image([busybox(), tar(member("tmp"), *members)], name=name, process=process)
        (self.path / "image.tar").write_bytes(layout.tar())
        self.cli.ok("image", "load", self.path / "image.tar")

    def run(self, *command: str) -> tuple[int, str]:
        """`insula run`: status and output. A failure of the engine must be one line."""
        return self.run_in("", *command)

    def run_in(self, directory: str, *command: str) -> tuple[int, str]:
        """Run in another working directory."""
        options = ("-w", directory) if directory else ()
        result = self.cli.run("run", "--rm", *options, "hostile", *command)
        if result.status == 125:
            assert result.err.startswith("error: ") and result.err.count("\n") == 1, result
            assert "defect" not in result.err, result
        return result.status, result.out

    def _state(self) -> tuple[object, ...]:
        mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        files = [Path(name).read_bytes() for name in ("/proc/sys/kernel/core_pattern", "/etc/passwd")]
        return sorted(m for m in mounts if not m.startswith(("/tmp/insula-test/", "/run/"))), files

    def is_unchanged(self) -> bool:
        return self._state() == self._before and self.secret.read_text() == "the host's secret"


@pytest.fixture
def host(cli: Cli, tmp_path: Path) -> Host:
    return Host(cli, tmp_path)


@pytest.mark.parametrize("name", ["proc", "sys", "dev"])
def test_directories_that_are_links(host: Host, name: str) -> None:
    """CVE-2019-19921, CVE-2023-27561, CVE-2023-28642: /proc or /sys of the image is a symbolic link, so the file system
    is mounted elsewhere, and what masks its paths masks others. For /proc and /sys no link is followed at all."""
    for target in ("../../tmp", "/proc/self/fd/3"):
        host.load(member(name, linkname=target))
        status, out = host.run("sh", "-c", "cat /proc/mounts; ls -ld /proc/1 >&2; echo ran")
        if status == 0:
            places = {line.split()[1]: line.split()[2] for line in out.splitlines()[:-1]}
            assert places["/proc"] == "proc" and places["/sys"] == "sysfs", out
            assert name == "dev", "no link in the place of /proc or /sys is followed"
        else:
            assert status == 125 and name in ("proc", "sys", "dev")
        assert host.is_unchanged(), target


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("etc", "../../../../etc"),
        ("etc/hosts", "/proc/sys/kernel/core_pattern"),
        ("etc/resolv.conf", "SECRET"),
        ("etc/hostname", "../../../../../../../SECRET"),
        ("proc/sys", "/tmp"),
        ("dev/pts", "/"),
    ],
)
def test_files_that_are_links(host: Host, name: str, target: str) -> None:
    """CVE-2021-30465, CVE-2022-1227 and their family: a mount's target leads out by links. They are followed as a
    process in the container would follow them (openat2(2), RESOLVE_IN_ROOT), so a path of the host's is a path
    inside."""
    secret = str(host.secret)
    parents = [member(path) for path in {os.path.dirname(name)} - {""}]
    target = target.replace("SECRET", secret.lstrip("/") if ".." in target else secret)
    host.load(*parents, member(name, linkname=target))
    status, out = host.run("sh", "-c", f"cat /etc/hosts /etc/resolv.conf /etc/hostname {secret}; echo ran")
    assert status in (0, 125)
    assert "the host's secret" not in out
    assert host.is_unchanged()


PASSWD: dict[str, list[ManagedInstance]] = {
    "a link to the host's": [member("etc/passwd", linkname="../../../../../../etc/shadow")],
    "a link to itself": [member("etc/passwd", linkname="passwd")],
    "a pipe": [member("etc/passwd", kind=tarfile.FIFOTYPE)],
    "a directory": [member("etc/passwd")],
    "endless": [member("etc/passwd", b"x:" * (1 << 20))],
    "a lie": [member("etc/passwd", b"web:x:-1:0::/:/bin/sh\nweb:x:99999:0::/:\n")],
    "sound": [member("etc/passwd", b"web:x:7:7::/:/bin/sh\n")],
    "bytes": [member("etc/passwd", bytes(range(256)) * 10)],
}


@pytest.mark.parametrize("case", PASSWD)
def test_users_of_the_image(host: Host, case: str) -> None:
    """/etc/passwd is looked up by the host's root, before there is a container: a link would read the host's, a pipe
    would hang it, a number beyond the tenant's range would be another tenant's user (compare CVE-2019-11245,
    CVE-2022-23648)."""
    host.load(member("etc"), *PASSWD[case])
    result = host.cli.run("run", "--rm", "--user", "web", "hostile", "id", "-u", timeout=20)
    if case == "sound":
        assert result.out == "7\n", "the control"
    else:
        assert result.status == 125 and result.err.startswith("error: "), result


def test_an_entrypoint_that_is_the_runtime(host: Host) -> None:
    """CVE-2019-5736: the image's entrypoint is /proc/self/exe, or a script with that interpreter, so that the runtime
    runs itself inside of the container; the container then has a file of the host's open, and overwrites it."""
    script, link = member("bin/again", b"#!/proc/self/exe\n", mode=0o755), member("bin/link", linkname="/proc/self/exe")
    host.load(script, link, Entrypoint=["/proc/self/exe"], Cmd=["-c", "print('the host runs')"])
    for program in ((), ("/proc/1/exe",), ("/proc/thread-self/exe",), ("/bin/again",), ("/bin/link",)):
        entry = ("--entrypoint", *program) if program else ()
        result = host.cli.run("run", "--rm", *entry, "hostile", "-c", "print('the host runs')")
        assert result.status in (125, 126, 127) and "the host runs" not in result.out, result
    assert host.cli.ok("run", "--rm", "--entrypoint", "/bin/sh", "hostile", "-c", "echo works") == "works"


def test_the_working_directory(host: Host) -> None:
    """CVE-2024-21626: WORKDIR /proc/self/fd/7 was a directory of the host's, since runc held one open when it changed
    to it; from there ../../.. is the host's root."""
    script = f"ls ../../../../../../../..{host.path}; cat ../../../../../../..{host.secret}; pwd -P"
    host.load(member("link", linkname="/proc/self/fd/4"), WorkingDir="/proc/self/fd/3")
    assert "secret" not in host.run("sh", "-c", script)[1]
    for path in ("/link", "/proc/self/fd/5/../../..", *(f"/proc/self/fd/{number}" for number in range(4, 12))):
        status, out = host.run_in(path, "sh", "-c", script)
        assert "secret" not in out and (status == 125 or out.startswith("/")), (path, out)
    assert host.run_in("/tmp", "pwd") == (0, "/tmp\n"), "the control"
    assert host.is_unchanged()


def test_modules_where_the_host_looks_for_its_own(host: Host, cli: Cli, tmp_path: Path) -> None:
    """CVE-2019-14271: `docker cp` entered the container and then loaded a library, which was the image's. Our processes
    are Python among the image's files; each module that they had not loaded before would be the attacker's code, run
    with all rights that are not yet dropped. So the image has every module there is, at every place where the host's
    are."""
    members_ = [member(path.lstrip("/"), POISON.encode()) for path in poisoned_paths()]
    control = tmp_path / "root"
    for info, data in members_:
        (control / info.name).parent.mkdir(parents=True, exist_ok=True)
        (control / info.name).write_bytes(data)

    def victim() -> bool:
        os.chroot(control)
        try:
            __import__("wave")
        except ImportError:
            return os.path.exists("/poisoned")
        return False

    assert forked(victim), "the control: who looks for a module in there finds the poison"

    host.load(*members_, member("bin/bad", b"#!/no/such\n", mode=0o755), member("etc/passwd", b"web:x:7:7::/:/\n"))
    cli.ok("run", "-d", "--name", "bait", "--ulimit", "nofile=64", "--tmpfs", "/t", "--user", "web", "hostile")
    cli.ok("rm", "-f", "bait")
    cli.ok("run", "-d", "--name", "bait", "--init", "--hostname", "bait", "hostile")
    for arguments in (
        ["bait", "true"], ["-i", "bait", "cat"], ["bait", "no-such"], ["bait", "/etc"], ["bait", "/etc/passwd"],
        ["bait", "/bin/bad"], ["-w", "/no/such", "bait", "true"], ["-w", "/bin/sh", "bait", "true"],
        ["--user", "web", "bait", "id"], ["--user", "7:9", "bait", "true"], ["bait", "/proc/self/exe"],
    ):  # fmt: skip
        cli.run("exec", *arguments)
    with cli.terminal("exec", "-it", "bait", "true") as terminal:
        assert terminal.wait() == 0
    (tmp_path / "file").write_text("x")
    cli.ok("cp", tmp_path / "file", "bait:/tmp-file")
    cli.ok("cp", "bait:/tmp-file", tmp_path / "back")
    cli.run("cp", "bait:/no-such", tmp_path / "back")
    cli.ok("exec", "bait", "sh", "-c", "rm /dev/null; ln -s /etc/passwd /dev/null")
    cli.run("exec", "bait", "true")
    found = cli.run("exec", "-i", "bait", "cat", "/poisoned", stdin="")
    assert found.status == 1 and found.out == "", f"loaded from the image: {found.out}"


def test_hooks_and_settings_of_the_image_are_ignored(host: Host, daemon: Daemon) -> None:
    """CVE-2025-23266: LD_PRELOAD of the image reached a hook that ran on the host. Hooks are none of an image's
    business, nor are variables for what runs outside; labels that other engines obey say nothing here."""
    mark = host.path / "hooked"
    hook = f"#!/bin/sh\necho x > {mark}\n".encode()
    host.load(
        member("usr/share/containers/oci/hooks.d/evil.json", b'{"version":"1.0.0","hook":{"path":"/hook"}}'),
        member("hook", hook, mode=0o755),
        member("etc/ld.so.preload", b"/evil.so\n"),
        member("config.json", b'{"hooks":{"createRuntime":[{"path":"/hook"}]}}'),
        Env=["PATH=/bin", f"LD_PRELOAD={host.path}/evil.so", f"PYTHONSTARTUP={mark}", "PYTHONPATH=/", "BASH_ENV=/hook"],
        Labels={
            "io.containers.hook": "/hook",
            "org.opencontainers.hooks": str(mark),
            "run.oci.hooks.stderr": str(mark),
        },
    )
    assert host.run("sh", "-c", "echo $LD_PRELOAD")[1].strip() == f"{host.path}/evil.so", "the control"
    assert not mark.exists() and host.is_unchanged()
    for name in ("insulad", "monitor", "zygote"):
        assert "LD_PRELOAD" not in Path(f"/proc/{daemon.pid(name)}/environ").read_text()
