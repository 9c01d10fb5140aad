"""Engines of others (podman, docker and containerd) as clients of an OCI runtime.

Their programs are unpacked, not installed (scripts/peers). A `Host` is a mount and a network namespace in which they
lie over /usr, so that everything that they start finds its program and its libraries where Debian puts them: an
environment would not do, conmon does not hand LD_LIBRARY_PATH on to the command that cleans up after a container, and
`podman run` then waits for ever. /run is empty there, and /dev/null another one, because crun makes it the container's.
State lies in the engine's own directory, control groups below its own parent.
"""

from __future__ import annotations

import json
import shutil
import stat
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from tests.support.cli import REPOSITORY, Result, Terminal
from tests.support.wait import patiently, until

PEERS = Path("/opt/insula/peers")
BUSYBOX = Path("/bin/busybox")
IMAGE = "localhost/bench:latest"
MOUNTS = f"""
ip link set lo up
mount -t tmpfs -o mode=755 none /run
mkdir /run/dev && mknod -m 666 /run/dev/null c 1 3 && mount --bind /run/dev/null /dev/null
mount -t overlay -o ro,lowerdir={PEERS}/usr:/usr none /usr
"""
TIMEOUT = 60.0


class Missing(Exception):
    """A peer can't be had here, and why."""


def require() -> None:
    """Missing if there are no peers on this host."""
    if not (PEERS / ".complete").exists():
        raise Missing("podman, docker and containerd are not unpacked: scripts/peers could not fetch them")


class Host:
    """Namespaces in which the peers are installed. `command` is what runs a command there."""

    def __init__(self, more: str = "") -> None:
        """`more` is shell that mounts further things."""
        require()
        script = f"{MOUNTS}\n{more}\necho ready\nexec sleep infinity"
        self._holder = subprocess.Popen(
            ["unshare", "--mount", "--net", "--propagation", "private", "sh", "-ec", script],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._holder.stdout and self._holder.stderr
        if self._holder.stdout.readline() != "ready\n":
            raise Missing(f"the peers' namespaces can't be made: {self._holder.stderr.read().strip()}")

    @property
    def pid(self) -> int:
        return self._holder.pid

    @property
    def root(self) -> Path:
        """Its files, seen from outside."""
        return Path(f"/proc/{self.pid}/root")

    def command(self, *argv: str | Path) -> list[str]:
        return ["/usr/bin/nsenter", f"--target={self.pid}", "--mount", "--net", *map(str, argv)]

    def close(self) -> None:
        self._holder.kill()
        self._holder.wait()


class Engine:
    """An engine's command line. `run` tells what happened, `ok` expects success."""

    name = ""

    def __init__(self, path: Path, parent: str, mounts: str = "") -> None:
        """`path` is where its files go; `parent` is the control group below which it works; `mounts` is its host's."""
        self.path, self.parent = path, parent
        path.mkdir()
        self.host = Host(mounts)
        self.environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": str(path), "TERM": "xterm"}

    def argv(self, *arguments: str | Path) -> list[str]:
        """The command line with these arguments, in the engine's host."""
        raise NotImplementedError

    def command(self, *arguments: str | Path) -> list[str]:
        """The command line from outside of the namespaces."""
        return self.host.command(*self.argv(*arguments))

    def start(self, *arguments: str | Path) -> subprocess.Popen[str]:
        """Start a command beside the caller, which waits for it."""
        pipe = subprocess.PIPE
        return subprocess.Popen(
            self.command(*arguments), env=self.environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True
        )

    def run(self, *arguments: str | Path, stdin: str = "", timeout: float = TIMEOUT) -> Result:
        done = subprocess.run(
            self.command(*arguments),
            env=self.environment,
            input=stdin,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=patiently(timeout),
        )
        return Result(" ".join([self.name, *map(str, arguments)]), done.returncode, done.stdout, done.stderr)

    def ok(self, *arguments: str | Path, stdin: str = "") -> str:
        return self.run(*arguments, stdin=stdin).ok().rstrip("\n")

    def terminal(self, *arguments: str | Path, rows: int = 24, columns: int = 80) -> Terminal:
        return Terminal(self.command(*arguments), self.environment, rows, columns)

    def clear(self) -> None:
        """Removes every container."""
        raise NotImplementedError

    def close(self) -> None:
        self.host.close()


class Podman(Engine):
    """podman: no daemon; conmon beside each container."""

    name = "podman"

    def __init__(self, path: Path, parent: str, runtime: Path | str, archive: Path, mounts: str = "") -> None:
        super().__init__(path, parent, mounts)
        (path / "policy.json").write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
        conf = path / "containers.conf"
        # without CAP_SYS_RESOURCE nobody can raise limits as podman would
        conf.write_text(
            '[containers]\ndefault_ulimits = ["nofile=1024:1024", "nproc=4096:4096"]\n'
            '[engine]\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\n'
        )
        self.environment["CONTAINERS_CONF"] = str(conf)
        self.runtime = runtime
        self.ok("import", f"--signature-policy={path}/policy.json", archive, IMAGE)

    def argv(self, *arguments: str | Path) -> list[str]:
        options = [f"--root={self.path}/data", f"--runroot={self.path}/run", f"--tmpdir={self.path}/tmp"]
        verb, *rest = arguments
        if verb in ("run", "create"):
            rest = [f"--cgroup-parent=/{self.parent}", *without_network(rest)]
        return ["podman", *options, f"--runtime={self.runtime}", *map(str, (verb, *rest))]

    def clear(self) -> None:
        self.ok("rm", "-f", "-a", "-t", "0")

    def close(self) -> None:
        self.run("rm", "-f", "-a", "-t", "0")
        super().close()


class Daemonic(Engine):
    """An engine with a daemon."""

    def launch(self, *argv: str | Path, answers: tuple[str, ...]) -> None:
        """Starts the daemon, and waits until the verb `answers` succeeds."""
        with (self.path / "log").open("wb") as log:
            self._daemon = subprocess.Popen(
                self.host.command(*argv),
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            until(lambda: self.run(*answers).status == 0, f"{argv[0]} answers", 30)
        except AssertionError:
            self.close()
            lines = (self.path / "log").read_text(errors="replace").strip().splitlines()
            raise Missing(f"{argv[0]} does not start: {lines[-1] if lines else 'it said nothing'}") from None

    def close(self) -> None:
        self._daemon.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._daemon.wait(patiently(15))
        self._daemon.kill()
        self._daemon.wait()
        super().close()


class Docker(Daemonic):
    """dockerd with a containerd of its own; its bridge and its rules are in its host's network and nowhere else."""

    name = "docker"

    def __init__(self, path: Path, parent: str, runtime: Path | str, archive: Path) -> None:
        super().__init__(path, parent)
        socket = f"unix://{path}/docker.sock"
        self.environment |= {"DOCKER_CONFIG": str(path), "DOCKER_HOST": socket}
        self.runtime = runtime
        config = path / "daemon.json"
        config.write_text(json.dumps({"runtimes": {"peer": {"path": str(runtime)}}, "default-runtime": "peer"}))
        directories = (f"--data-root={path}/data", f"--exec-root={path}/exec", f"--pidfile={path}/pid")
        options = (*directories, f"--config-file={config}", f"--host={socket}", f"--cgroup-parent=/{parent}")
        self.launch("dockerd", *options, answers=("ps",))
        self.ok("import", archive, IMAGE)

    def argv(self, *arguments: str | Path) -> list[str]:
        verb, *rest = arguments
        rest = without_network(rest) if verb in ("run", "create") else rest
        return ["docker", *map(str, (verb, *rest))]

    def clear(self) -> None:
        if names := self.ok("ps", "-aq").split():
            self.ok("rm", "-f", *names)


class Containerd(Daemonic):
    """containerd and its `ctr`, which names the runtime's program itself: see `options`."""

    name = "ctr"

    def __init__(self, path: Path, parent: str, runtime: Path | str) -> None:
        super().__init__(path, parent)
        self.options = ("--runc-binary", str(runtime))
        config = path / "config.toml"
        config.write_text(
            f'version = 2\nroot = "{path}/root"\nstate = "{path}/state"\n'
            'disabled_plugins = ["io.containerd.grpc.v1.cri"]\n'
            f'[grpc]\naddress = "{path}/sock"\n[ttrpc]\naddress = "{path}/sock.ttrpc"\n'
        )
        self.launch("containerd", "--config", config, answers=("version",))

    def argv(self, *arguments: str | Path) -> list[str]:
        return ["ctr", f"--address={self.path}/sock", *map(str, arguments)]

    def clear(self) -> None:
        for name in self.ok("task", "ls", "-q").split():
            self.ok("task", "rm", "-f", name)
        if names := self.ok("container", "ls", "-q").split():
            self.ok("container", "rm", *names)


def without_network(options: Sequence[str | Path]) -> list[str | Path]:
    """Options of `run`: no network, which costs a third of a second, unless one is asked for."""
    asked = any(str(option).startswith("--network") for option in options)
    return [*options] if asked else ["--network=none", *options]


def root_file_system(target: Path) -> Path:
    """A directory with a static busybox under all its names, and two users."""
    for name in ("bin", "dev", "etc", "proc", "root", "sys", "tmp"):
        (target / name).mkdir(parents=True)
    shutil.copy2(BUSYBOX, target / "bin/busybox")
    for applet in subprocess.run([BUSYBOX, "--list"], check=True, capture_output=True, text=True).stdout.split():
        with suppress(FileExistsError):
            (target / "bin" / applet).symlink_to("busybox")
    (target / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000:user:/:/bin/sh\n")
    (target / "etc/group").write_text("root:x:0:\nuser:x:1000:\n")
    for name in ("hostname", "hosts", "resolv.conf"):
        (target / "etc" / name).touch()
    return target


def archive_of(root: Path, target: Path) -> Path:
    """An archive for `podman import` and `docker import`."""
    subprocess.run(["tar", "-c", "-C", str(root), "-f", str(target), "."], check=True)
    return target


def launcher(directory: Path, interpreters: str = "/usr/bin") -> Path:
    """The program `insula-oci` as scripts/up installs it, for the package under test."""
    target = directory / "insula-oci"
    library = REPOSITORY / "src"
    subprocess.run(["/usr/bin/python3", "-ISE", library / "insula/oci/preload.py", directory], check=True)
    text = (REPOSITORY / "packaging" / "insula-oci").read_text()
    text = text.replace("@SEALED@", interpreters)
    target.write_text(text.replace("@LIBRARY@", str(library)).replace("@PRELOAD@", str(directory)))
    target.chmod(target.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
    return target
