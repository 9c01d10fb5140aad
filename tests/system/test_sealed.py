"""The runtime's program can't be overwritten through /proc/PID/exe (CVE-2019-5736).

The attacks run in a container without a user namespace: its root is the host's, as Docker's is by default. The runtime
runs a copy of this Python in a scratch directory, so that the one that is not sealed may really lose it.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest

from insula.kernel import capabilities, sealed, syscalls
from tests.forked import errno_of, forked
from tests.support.machine import Run
from tests.support.wait import patiently, until

RUNTIME = str(Path(__file__).parents[1] / "support" / "naive_runtime.py")
T = TypeVar("T")
LIBRARY = str(Path(sealed.__file__).parents[2])
PYTHON = os.path.realpath(sys.executable)
PWNED = b"#!/bin/false\n# pwned\n"

# What the attacker executes has the program open, is not that program, and waits until nobody runs it any more.
WRITE = f"""
import errno, os, sys, time
fd = int(sys.argv[1])
for _ in range(6000):  # a minute
    try:
        target = os.open(f"/proc/self/fd/{{fd}}", os.O_WRONLY)
        os.ftruncate(target, 0)
        os.write(target, {PWNED!r})
        print("written", flush=True)
        break
    except OSError as error:
        answer = errno.errorcode[error.errno]
    if answer != "ETXTBSY":
        print(answer, flush=True)
        break
    time.sleep(0.01)
else:
    print("busy", flush=True)
"""

# an entrypoint that is executed by the runtime's own program, whatever it is
ENTRYPOINT = f"""#!/proc/self/exe -ISE
import os
fd = os.open("/proc/self/exe", os.O_RDONLY)
os.set_inheritable(fd, True)
os.execv({PYTHON!r}, [{PYTHON!r}, "-ISE", "-c", {WRITE!r}, str(fd)])
"""

# a program that runs in the container already, and looks for one that joins
LURKER = f"""#!{PYTHON} -ISE
import os, sys
own = os.readlink("/proc/self/exe")
print("lurking", flush=True)
fd = None
while fd is None:
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            if os.readlink(f"/proc/{{pid}}/exe") != own:
                fd = os.open(f"/proc/{{pid}}/exe", os.O_RDONLY)
                break
        except OSError:
            continue
os.set_inheritable(fd, True)
print("seen", flush=True)
os.execv({PYTHON!r}, [{PYTHON!r}, "-ISE", "-c", {WRITE!r}, str(fd)])
"""


class Host:
    """A scratch directory with the program of a runtime."""

    def __init__(self, path: Path) -> None:
        self.program = path / "python-of-the-runtime"
        shutil.copy(os.path.realpath("/proc/self/exe"), self.program)
        self.before = self.program.read_bytes()
        self.root = path / "root"
        self.root.mkdir()

    def start(self, *args: str) -> subprocess.Popen[str]:
        """The runtime. Python finds its library by argv[0], the kernel its program by `executable`."""
        return subprocess.Popen(
            [sys.executable, "-ISE", RUNTIME, *args],
            executable=str(self.program),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, seal: str, command: str) -> subprocess.Popen[str]:
        runtime = self.start(seal, "run", str(self.root), "/tmp/command")
        assert runtime.stdin
        runtime.stdin.write(command)
        runtime.stdin.close()
        return runtime


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def next_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().strip()


def attack_by_entrypoint(host: Host, seal: str) -> str:
    runtime = host.run(seal, ENTRYPOINT)
    assert next_line(runtime).isdecimal()
    assert runtime.wait(patiently(30)) == 0  # from here on nobody runs the program
    return next_line(runtime)


def attack_joining_process(host: Host, seal: str) -> str:
    runtime = host.run(seal, LURKER)
    target = next_line(runtime)
    assert next_line(runtime) == "lurking"
    joining = host.start(seal, "join", target)
    assert next_line(runtime) == "seen"
    joining.communicate("\n", timeout=patiently(30))
    assert joining.returncode == 0
    return next_line(runtime)


@pytest.mark.parametrize("attack", [attack_by_entrypoint, attack_joining_process])
def test_the_host_keeps_its_program(host: Host, attack: Callable[[Host, str], str]) -> None:
    assert attack(host, "sealed") == "EPERM"
    assert host.program.read_bytes() == host.before
    # the positive control: without a seal the same attack takes the host over
    assert attack(host, "plain") == "written"
    assert host.program.read_bytes() == PWNED


def in_place(function: Callable[[str], T], *, installed: bool = False) -> T:
    """What `function` of the interpreter's path returns, in mounts of its own with one in MOUNT_POINT.

    With `installed` there is another one already, as where an installed Insula runs.
    """

    def child() -> T:
        syscalls.unshare(syscalls.CLONE_NEWNS)
        syscalls.mount(None, "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
        sealed.unmount_sealed()  # of an Insula that runs here: a mount that is only covered would still be listed
        if installed:
            cover_opt()
            sealed.mount_sealed(PYTHON)
            sealed.unmount_sealed()
        cover_opt()
        sealed.mount_sealed(PYTHON)
        return function(f"{sealed.MOUNT_POINT}/{os.path.basename(PYTHON)}")

    def cover_opt() -> None:
        syscalls.mount("tmpfs", "/opt", "tmpfs")  # MOUNT_POINT is below it

    return forked(child, timeout=60)


@pytest.mark.parametrize("attack", [attack_by_entrypoint, attack_joining_process])
def test_an_existing_sealed_mount_is_kept(host: Host, attack: Callable[[Host, str], str]) -> None:
    """It needs no copy: the runtime goes on as what it was started from."""

    def attacked(program: str) -> tuple[str, bool]:
        host.program = Path(program)
        before = os.stat(PYTHON)
        outcome = attack(host, "sealed")
        after = os.stat(PYTHON)
        return outcome, (before.st_mtime_ns, before.st_size) == (after.st_mtime_ns, after.st_size)

    assert in_place(attacked) == ("EROFS", True)


def test_a_sealed_mount_cannot_be_made_writable() -> None:
    def tried(program: str) -> tuple[int, ...]:
        def writes() -> int:
            return errno_of(lambda: os.close(os.open(program, os.O_WRONLY)))

        remount = syscalls.MS_REMOUNT | syscalls.MS_NOSUID
        answers = (
            writes(),
            errno_of(lambda: syscalls.mount(None, sealed.MOUNT_POINT, None, remount)),
            errno_of(
                lambda: syscalls.mount(None, sealed.MOUNT_POINT, None, remount | syscalls.MS_BIND)
            ),  # the mount, not the layer
        )
        return *answers, writes()

    assert in_place(tried) == (errno.EROFS, errno.EROFS, 0, errno.EROFS)


@pytest.mark.parametrize("installed", [False, True])
def test_place_and_displace(installed: bool) -> None:
    def there() -> int:
        return Path("/proc/self/mounts").read_text().count(f" {sealed.MOUNT_POINT} ")

    def life(program: str) -> list[object]:
        code = f"import sys; sys.path.append({LIBRARY!r}); from insula.kernel import sealed; print(sealed.is_sealed())"
        ran = subprocess.run([program, "-ISE", "-c", code], capture_output=True, text=True, check=True).stdout
        sealed.mount_sealed(PYTHON)
        seen = [ran, there()]
        sealed.unmount_sealed()
        seen += [there(), *os.listdir(sealed.MOUNT_POINT)]
        sealed.unmount_sealed()
        return seen

    assert in_place(life, installed=installed) == ["True\n", 1, 0]


# -- the same on insula-oci --------------------------------------------------------------------------------------------


class Oci:
    """`insula-oci` run by the scratch copy, and a container without a user namespace, with CAP_SYS_PTRACE."""

    PLAIN = "import sys; from insula.kernel import sealed; sealed.ensure = lambda: None; "
    MAIN = "from insula.oci.main import main; sys.exit(main())"

    def __init__(self, host: Host, path: Path, seal: str, command: str, group: str) -> None:
        self.host, self.path = host, path
        self.code = ("import sys; " if seal == "sealed" else self.PLAIN) + self.MAIN
        self.output = path / "output"
        rootfs = path / "rootfs"
        mounts: list[dict[str, Any]] = [{"destination": "/proc", "type": "proc", "source": "proc"}]
        for place in {"/usr", sys.base_prefix, *(f"/{name}" for name in os.listdir("/") if name.startswith("lib"))}:
            mounts.append({"destination": place, "type": "bind", "source": place, "options": ["rbind", "ro"]})
        (rootfs / "tmp").mkdir(parents=True)
        (rootfs / "tmp" / "command").write_text(command)
        (rootfs / "tmp" / "command").chmod(0o755)
        may = capabilities.to_names(capabilities.adjust(capabilities.DEFAULT, ["SYS_PTRACE"]))
        config = {
            "ociVersion": "1.2.0",
            "root": {"path": "rootfs"},
            "process": {
                "args": ["/tmp/command"],
                "cwd": "/",
                "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), may),
            },
            "mounts": mounts,
            "linux": {
                "namespaces": [{"type": kind} for kind in ("pid", "mount", "ipc", "uts", "network")],
                "cgroupsPath": f"/{group}",
            },
        }
        (path / "config.json").write_text(json.dumps(config))

    def __call__(self, *words: str) -> None:
        with self.output.open("ab") as output:
            subprocess.run(
                [sys.executable, "-c", self.code, "--root", str(self.path / "state"), *words],
                executable=str(self.host.program),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                check=True,
                timeout=patiently(30),
            )

    def lines(self) -> list[str]:
        return self.output.read_text().split()


@pytest.mark.parametrize("attack", ["entrypoint", "joining"])
def test_insula_oci_keeps_its_program(host: Host, run_: Run, tmp_path: Path, attack: str) -> None:
    def outcome(seal: str) -> str:
        (tmp_path / seal).mkdir()
        command = ENTRYPOINT if attack == "entrypoint" else LURKER
        oci = Oci(host, tmp_path / seal, seal, command, f"{run_.name}{seal}/{attack}")
        oci("create", "--bundle", str(oci.path), "web")
        try:
            oci("start", "web")
            if attack == "joining":
                until(lambda: "lurking" in oci.lines(), "it lurks", timeout=20)
                for _ in range(100):
                    oci("exec", "web", PYTHON, "-ISE", "-c", "pass")
                    if "seen" in oci.lines():
                        break
            answers = {"EPERM", "written", "busy"}
            until(lambda: answers & {*oci.lines()}, "the attack has an outcome", timeout=20)
            return (answers & {*oci.lines()}).pop()
        finally:
            shutil.copy(PYTHON, host.program.with_suffix(".new"))
            host.program.with_suffix(".new").rename(host.program)
            oci("delete", "--force", "web")

    assert outcome("sealed") == "EPERM"
    assert outcome("plain") == "written"  # the positive control


def test_a_copy_runs_and_cannot_be_changed(tmp_path: Path) -> None:
    program = tmp_path / "program"
    shutil.copy("/bin/echo", program)
    fd = sealed.copy(str(program))
    try:
        assert os.pread(fd, 1 << 24, 0) == program.read_bytes()
        ran = subprocess.run(["echo", "it runs"], executable=f"/proc/self/fd/{fd}", pass_fds=[fd], capture_output=True)
        assert ran.stdout == b"it runs\n"
        writable = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
        assert errno_of(lambda: os.write(writable, b"x")) == 1
        assert errno_of(lambda: os.ftruncate(writable, 0)) == 1
        assert errno_of(lambda: os.ftruncate(writable, 1 << 30)) == 1
        assert errno_of(lambda: os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_TRUNC)) == 1
        os.close(writable)
    finally:
        os.close(fd)
    assert os.write(os.open(program, os.O_WRONLY), b"x") == 1  # while the original can


def test_ensure_keeps_pid_arguments_and_library(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        f"import os, sys\nsys.path.insert(0, {LIBRARY!r})\nfrom insula.kernel import sealed\n"
        "print(os.getpid(), sealed.is_sealed(), flush=True)\nsealed.ensure()\n"
        "import json\nprint(sys.argv[1:], sys.flags.isolated, os.readlink('/proc/self/exe'), sys.prefix)\n"
    )
    ran = subprocess.run([sys.executable, "-I", str(script), "a b", "-c"], capture_output=True, text=True, check=True)
    first, second, rest = ran.stdout.splitlines()
    assert first.split()[1] == "False"
    assert second == first.replace("False", "True")
    assert rest == f"['a b', '-c'] 1 /memfd:insula (deleted) {sys.prefix}"


def test_a_program_that_is_not_writable_needs_no_copy() -> None:
    def child() -> bool:
        os.setuid(65534)
        sealed.ensure()  # else it would execute the tests again
        return sealed.is_sealed()

    assert forked(child) is False
