"""Cells: containers in which attacks run; and `unguarded`, where the same attacks succeed.

The attacks are Python, and so is what runs them inside: the interpreter of the tests with the few files that it needs,
next to busybox, makes an image of 15 MB. `scripts/packages` need not list a compiler.
"""

from __future__ import annotations

import encodings
import functools
import json
import os
import pkgutil
import re
import stat
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from insula.kernel import cgroups, syscalls
from tests.forked import forked
from tests.support.cli import REPOSITORY, Cli
from tests.support.images import Layout, member, tar
from tests.support.wait import patiently
from tests.system.escape.attacks import run

PYTHON = os.path.realpath(sys.executable)
COMMAND = (PYTHON, "-I", "-S", "-B", "/attack/tests/system/escape/attacks/run.py")
IMAGE = "attack:latest"
Attack = Callable[..., Any]
ManagedInstance = tuple[tarfile.TarInfo, bytes]

_MODULES = "__future__ array collections.abc contextlib ctypes errno fcntl importlib json mmap os resource select signal socket stat struct sys termios threading time traceback typing"  # noqa: E501
_APPLETS = "sh cat ls id sleep true echo kill ln mkdir rm mount umount mknod touch head tail grep ps test find stat dd"


@functools.cache
def files() -> dict[str, bytes]:
    """Programs, libraries and attacks by their path in the image: what is on this machine, nothing is downloaded."""
    show = "for module in sys.modules.values(): print(getattr(module, '__file__', None) or '')"
    ask = f"import {_MODULES.replace(' ', ', ')}\n{show}"
    answer = subprocess.run([PYTHON, "-I", "-S", "-c", ask], check=True, capture_output=True, text=True)
    paths = {path for path in answer.stdout.split("\n") if path}
    # without these two names in its place, Python doesn't know where it is at home
    paths |= {f"{os.path.dirname(os.__file__)}/os.py"}
    objects = [PYTHON, *(path for path in paths if ".so" in path)]
    linked = subprocess.run(["ldd", *objects], check=True, capture_output=True, text=True).stdout
    paths |= {PYTHON, *re.findall(r"(/\S+) \(0x", linked)}
    found = {path: Path(path).read_bytes() for path in sorted(paths)}
    found["/bin/busybox"] = Path("/bin/busybox").read_bytes()
    for path in Path(run.__file__).parent.glob("*.py"):
        found[f"/attack/tests/system/escape/attacks/{path.name}"] = path.read_bytes()
    return found


def members(*more: ManagedInstance) -> list[ManagedInstance]:
    """The members of a layer with all `files`, and busybox's applets."""
    made = [member(path.lstrip("/"), data, mode=0o755) for path, data in files().items()]
    made += [member(f"bin/{name}", linkname="busybox") for name in _APPLETS.split()]
    made += [member("tmp", mode=0o1777), member("root"), member("etc/passwd", b"root:x:0:0::/root:/bin/sh\n"), *more]
    return made


@functools.cache
def archive() -> bytes:
    """The image as `insula image load` takes it."""
    layout = Layout()
    layout.image([tar(*members())], name=IMAGE, process={"Cmd": ["/bin/sleep", "600"], "Env": ["PATH=/bin"]})
    return layout.tar()


@dataclass(frozen=True)
class End:
    """How an attack ended: with what it got (`value`), refused (`errno`), or killed (`signal`)."""

    value: Any = None
    errno: str | None = None
    why: str = ""
    signal: str | None = None

    @classmethod
    def of(cls, said: dict[str, Any]) -> End:
        assert "broken" not in said, said["broken"]
        return cls(**said)

    @property
    def refused(self) -> bool:
        return self.errno is not None or self.signal is not None


class Cell:
    """A running container; `try_` runs an attack in it, `ends` many at once."""

    def __init__(self, cli: Cli, name: str, options: tuple[str, ...] = ()) -> None:
        self.cli, self.name = cli, name
        cli.ok("run", "-d", "--name", name, *options, IMAGE)

    def ends(self, *wanted: tuple[Any, ...], user: str | None = None) -> list[End]:
        """How each of `(attack, *arguments)` ends."""
        options = () if user is None else ("--user", user)
        out = self.cli.ok("exec", "-i", *options, self.name, *COMMAND, stdin=request(wanted), timeout=120)
        return [End.of(said) for said in json.loads(out)]

    def try_(self, attack: Attack, *arguments: Any, user: str | None = None) -> End:
        [end] = self.ends((attack, *arguments), user=user)
        return end

    def gets(self, attack: Attack, *arguments: Any, user: str | None = None) -> Any:
        """The value of one that must not be refused."""
        end = self.try_(attack, *arguments, user=user)
        assert not end.refused, end
        return end.value

    def start(self, attack: Attack, *arguments: Any) -> subprocess.Popen[str]:
        """Runs it beside the test; `finish` waits for its end."""
        program = f"printf '%s' '{request([(attack, *arguments)])}' | exec {' '.join(COMMAND)}"
        return self.cli.start("exec", self.name, "sh", "-c", program)

    @staticmethod
    def finish(process: subprocess.Popen[str]) -> End:
        out, err = process.communicate(timeout=patiently(60))
        assert process.returncode == 0, err
        [said] = json.loads(out)
        return End.of(said)

    @functools.cached_property
    def pid(self) -> int:
        """The PID of its PID 1 on the host."""
        [view] = [v for v in self.cli.json("ps") if v["instance"]["name"] == self.name]
        return int(view["status"]["pid"])

    @functools.cached_property
    def upper(self) -> Path:
        """The directory on the host with the files that it has written."""
        for line in Path(f"/proc/{self.pid}/mountinfo").read_text().splitlines():
            if line.split()[4] == "/":
                [found] = re.findall(r"upperdir=([^,]+)", line)
                return Path(found)
        raise AssertionError("it has no root")

    def show(self, **sources: Callable[[], int]) -> None:
        """Attach mounts of the host's, made by these functions, to ``/seen/NAME``: as what is bound into it."""

        def attach() -> None:
            made = {name: source() for name, source in sources.items()}
            syscalls.setns(os.pidfd_open(self.pid), syscalls.CLONE_NEWNS)
            os.makedirs("/seen", exist_ok=True)
            for name, mount in made.items():
                target = Path("/seen", name)
                target.mkdir() if stat.S_ISDIR(os.fstat(mount).st_mode) else target.touch()
                syscalls.move_mount(mount, syscalls.AT_FDCWD, str(target))

        forked(attach)

    @functools.cached_property
    def owner(self) -> int:
        """Whom its root is on the host."""
        return int(Path(f"/proc/{self.pid}/uid_map").read_text().split()[1])

    def group(self, controller: str) -> Path:
        """The directory of its control group, in the hierarchy of that controller if there are several."""
        path = cgroups.of_process(self.pid)
        directory = cgroups.Cgroup(path).directory(controller) if path else None
        assert directory, "it has no group"
        return Path(directory)

    def answers(self) -> bool:
        """Whether a neighbour still serves: an exec, a file, a process."""
        return self.cli.ok("exec", self.name, "sh", "-c", "echo x > /tmp/alive && cat /tmp/alive") == "x"


def request(wanted: Any) -> str:
    """The input of `attacks.run` for a list of `(attack, *arguments)`."""
    return json.dumps([(a.__module__.rpartition(".")[2], a.__name__, arguments) for a, *arguments in wanted])


POISON = "open('/poisoned', 'a').write(__name__ + chr(10))\nraise ImportError(__name__)\n"
"""A module of the attacker's: tells that it was executed."""


@functools.cache
def poisoned_paths() -> list[str]:
    """Every file in which a Python of the host might look for a module, its own or ours, on whatever path."""
    ask = "import sys; print(*sys.path, sep='\\n')"
    path = subprocess.run([sys.executable, "-I", "-c", ask], check=True, capture_output=True, text=True).stdout
    source = REPOSITORY / "src"
    names = [f"{name}.py" for name in sys.stdlib_module_names if "." not in name]
    names += [f"encodings/{found.name}.py" for found in pkgutil.iter_modules(encodings.__path__)]
    places = {*path.split(), str(source), os.path.dirname(os.__file__)}
    files_ = {f"{place}/{name}" for place in places for name in names}
    return sorted(files_ | {str(path) for path in source.rglob("*.py")})


def unguarded(attack: Attack, *arguments: Any) -> End:
    """How the attack ends for the host's root in namespaces of the test's own, where nothing else guards."""
    module = attack.__module__.rpartition(".")[2]
    return End.of(forked(lambda: _alone(lambda: run.call(module, attack.__name__, list(arguments))), timeout=40))


def _alone(function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Runs it as a child of PID 1 of new namespaces, with a /proc of its own."""
    syscalls.unshare(
        syscalls.CLONE_NEWNS
        | syscalls.CLONE_NEWPID
        | syscalls.CLONE_NEWNET
        | syscalls.CLONE_NEWIPC
        | syscalls.CLONE_NEWUTS
    )
    syscalls.mount(None, "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)

    def first() -> dict[str, Any]:
        syscalls.mount("proc", "/proc", "proc")
        syscalls.join_session_keyring("insula-escape")
        return function()

    return forked(first, timeout=40)


def lines(path: str | Path) -> Iterator[list[str]]:
    """The words of each line."""
    for line in Path(path).read_text().splitlines():
        yield line.split()
