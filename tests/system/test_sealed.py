"""Nobody overwrites the program of the runtime through /proc/PID/exe (CVE-2019-5736).

The attacks run in a container without a user namespace: its root is the host's, as Docker's is by default. The runtime
runs a copy of this Python in a scratch directory, so that the one that is not sealed may really lose it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from insula.kernel import sealed
from tests.forked import errno_of, forked

RUNTIME = str(Path(__file__).parents[1] / "support" / "naive_runtime.py")
PWNED = b"#!/bin/false\n# pwned\n"

# What the attacker executes has the program open, is not that program, and waits until nobody runs it any more.
WRITE = f"""
import errno, os, sys, time
fd = int(sys.argv[1])
for _ in range(1500):
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
os.execv({sys.executable!r}, [{sys.executable!r}, "-ISE", "-c", {WRITE!r}, str(fd)])
"""

# a program that runs in the container already, and looks for one that joins
LURKER = f"""#!{sys.executable} -ISE
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
os.execv(sys.executable, [sys.executable, "-ISE", "-c", {WRITE!r}, str(fd)])
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
    assert runtime.wait(30) == 0  # from here on nobody runs the program
    return next_line(runtime)


def attack_joining_process(host: Host, seal: str) -> str:
    runtime = host.run(seal, LURKER)
    target = next_line(runtime)
    assert next_line(runtime) == "lurking"
    joining = host.start(seal, "join", target)
    assert next_line(runtime) == "seen"
    joining.communicate("\n", timeout=30)
    assert joining.returncode == 0
    return next_line(runtime)


@pytest.mark.parametrize("attack", [attack_by_entrypoint, attack_joining_process])
def test_the_host_keeps_its_program(host: Host, attack: object) -> None:
    assert callable(attack)
    assert attack(host, "sealed") == "EPERM"
    assert host.program.read_bytes() == host.before
    # the positive control: without a seal the same attack takes the host over
    assert attack(host, "plain") == "written"
    assert host.program.read_bytes() == PWNED


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
    library = str(Path(sealed.__file__).parents[2])
    script.write_text(
        f"import os, sys\nsys.path.insert(0, {library!r})\nfrom insula.kernel import sealed\n"
        "print(os.getpid(), sealed.is_sealed(), flush=True)\nsealed.ensure()\n"
        "import json\nprint(sys.argv[1:], sys.flags.isolated, os.readlink('/proc/self/exe'), sys.prefix)\n"
    )
    ran = subprocess.run([sys.executable, "-I", str(script), "a b", "-c"], capture_output=True, text=True, check=True)
    first, second, rest = ran.stdout.splitlines()
    assert first.split()[1] == "False"
    assert second == first.replace("False", "True")
    assert rest == f"['a b', '-c'] 1 /memfd:insula (deleted) {sys.prefix}"


def test_who_cannot_write_to_it_needs_no_copy() -> None:
    def child() -> bool:
        os.setuid(65534)
        sealed.ensure()  # else it would execute the tests again
        return sealed.is_sealed()

    assert forked(child) is False
