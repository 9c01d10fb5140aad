"""Names of instances: one dnsmasq(8) in each tenant's namespace, listening at the gateways of all its networks.

It reads names from a directory that it watches (inotify), so that a new instance costs a small file and no restart:
names are spread over files by a checksum, because a file that changes is read as a whole.
It answers `web` and `web.<tenant>.internal`, never asks anybody else about `.internal` or about bare names, and
forwards the rest to the host's end of the tenant's uplink, from where the host's rules lead to the host's resolvers:
their addresses may be among those of the tenant's own networks. `--bind-dynamic` makes it listen on bridges that
appear later.

It says on its standard error when it has started; nobody hears what it says later. It is known by its exact arguments,
its user and its network namespace, never by its name alone, and it is signalled through a pidfd. A process that is
between fork(2) and execve(2) shows no arguments yet, so each start holds a lock (flock(2)) that its processes inherit:
while the lock is taken, one may still appear. It parses what strangers send, so it is confined: see
`insula.network.linux.confine`.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import logging
import os
import select
import shutil
import signal
import socket
import subprocess
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from ipaddress import ip_address
from pathlib import Path

from insula.kernel.cgroups import Cgroup
from insula.kernel.netns import call_in
from insula.model.errors import Failed, Unavailable
from insula.model.objects import Tenant
from insula.model.units import check_label
from insula.network.linux import confine

FIRST_USER = 0x70000000  # above all tenants' ranges (control.tenants)
log = logging.getLogger("insula.network")
GROUP = "resolver"  # the control group of a dnsmasq, in its tenant's
_BUCKETS = 1024
_STARTED = b": started, version "
_PATIENCE = 20.0  # seconds for a start, on a busy host too
DOMAIN = "internal"  # reserved by ICANN in 2024 for private use
_RESOLV_CONF = ("/etc/resolv.conf", "/run/systemd/resolve/resolv.conf")  # the second: what systemd-resolved asks


def host_resolvers() -> list[str]:
    """The host's name servers that can be asked for others; those at loopback and IPv6 link-local addresses can't."""
    for path in _RESOLV_CONF:
        found = []
        with contextlib.suppress(OSError):
            for line in Path(path).read_text(errors="replace").splitlines():
                words = line.split()
                if len(words) >= 2 and words[0] == "nameserver":
                    with contextlib.suppress(ValueError):
                        address = ip_address(words[1])
                        if not address.is_loopback and not (address.version == 6 and address.is_link_local):
                            found.append(str(address))
        if found:
            return found
    return []


def reachable_directory(run: Path, prefix: str) -> Path:
    """Where dnsmasq, which gives up root, can read: under `run`, unless a directory above lets only root pass."""
    run.mkdir(mode=0o755, parents=True, exist_ok=True)
    if all(path.stat().st_mode & 0o001 for path in (run, *run.resolve().parents)):
        return run / "dns"
    return Path("/run") / f"{prefix}-dns"


class Resolver:
    """The resolvers of all tenants; `directory` is theirs, one subdirectory a tenant.

    `groups` is the control group below which each tenant has one, by its name; with None they stay in the caller's.
    """

    def __init__(self, directory: Path, groups: str | None = None) -> None:
        self._directory = directory
        self._groups = groups

    def set_names(self, tenant: Tenant, names: Mapping[str, Sequence[str]]) -> None:
        """Replace what is answered; unchanged names cost nothing but a look."""
        wanted: dict[str, list[str]] = {}
        for name, addresses in sorted(names.items()):
            wanted.setdefault(_bucket(name), []).extend(_lines(tenant.name, name, addresses))
        self._prepare(tenant)
        for bucket in os.listdir(self._hosts(tenant.name)):
            wanted.setdefault(bucket, [])
        for bucket, lines in wanted.items():
            self._write(tenant.name, bucket, lines)

    def add_name(self, tenant: Tenant, name: str, addresses: Sequence[str]) -> None:
        """Answer one more name, or more addresses for one: costs the same however many names there are."""
        self._prepare(tenant)
        lines = _lines(tenant.name, name, addresses)
        before = self._lines_of(tenant.name, _bucket(name))
        self._write(tenant.name, _bucket(name), [line for line in before if line not in lines] + lines)

    def remove_name(self, tenant: str, name: str, addresses: Sequence[str]) -> None:
        """Answer these addresses no more for `name`."""
        lines = _lines(tenant, name, addresses)
        before = self._lines_of(tenant, _bucket(name))
        self._write(tenant, _bucket(name), [line for line in before if line not in lines])

    def _lines_of(self, tenant: str, bucket: str) -> list[str]:
        try:
            return (self._hosts(tenant) / bucket).read_text().splitlines(keepends=True)
        except FileNotFoundError:
            return []

    def _write(self, tenant: str, bucket: str, lines: Sequence[str]) -> None:
        file, draft = self._hosts(tenant) / bucket, self._directory / tenant / "names.new"
        if list(lines) == self._lines_of(tenant, bucket):
            return
        if not lines:
            file.unlink(missing_ok=True)
            return
        draft.write_text("".join(lines))
        draft.chmod(0o640)
        draft.rename(file)

    @contextlib.contextmanager
    def ensuring(self, tenant: Tenant, netns: int, servers: Sequence[str]) -> Iterator[None]:
        """Start the tenant's dnsmasq unless it runs with the right arguments; it has started when the block ends.

        `servers` are asked about other names. Raises Failed with what it said.
        """
        if self.running(tenant, netns, servers):
            yield
            return
        self._stop_all(tenant.name)
        self._prepare(tenant)
        child = self._start(tenant, netns, servers)
        try:
            yield
        finally:
            pid, said = _hear(child)
        if pid is None or _STARTED not in said:
            _needed.cache_clear()  # its libraries may be others since an upgrade
            self._stop_all(tenant.name)
            text = " ".join(said.decode(errors="replace").split()) or "it ended without a word"
            raise Failed(f"the resolver of tenant {tenant.name} did not start: {text}", "run `insula doctor`")
        draft = self._directory / tenant.name / "pid.new"
        draft.write_text(f"{pid}\n")
        draft.rename(draft.with_name("pid"))

    def _start(self, tenant: Tenant, netns: int, servers: Sequence[str]) -> subprocess.Popen[bytes]:
        command = self._arguments(tenant.name, servers)
        readable = [*_needed(command[0]), str(self._hosts(tenant.name))]
        groups: list[int] = []
        if self._groups:
            group = Cgroup(f"{self._groups}/{tenant.name}/{GROUP}")
            try:
                group.create()
                groups = group.open()
            except FileNotFoundError:  # nothing is mounted there: no tenant has limits, and no instance is launched
                log.warning("the resolver of tenant %s runs without a control group", tenant.name)
            except OSError as error:
                what = f"the resolver of tenant {tenant.name} has no control group: {error}"
                raise Failed(what, "`insula doctor` tells what this host lacks") from error
        lock = self._lock(tenant.name)
        passed = [*groups, lock]
        try:
            if not _take(lock, _PATIENCE):
                raise Failed(f"another resolver of tenant {tenant.name} doesn't die", "see its state in ps(1)")
            return call_in(
                netns, lambda: confine.start(command, user_of(tenant), readable, groups, _system_calls(), lock)
            )
        finally:
            for fd in passed:
                os.close(fd)

    def running(self, tenant: Tenant, netns: int, servers: Sequence[str]) -> bool:
        """Whether dnsmasq runs in that namespace, as that user, with exactly the arguments it should have."""
        try:
            pid = int((self._directory / tenant.name / "pid").read_text())
            user = os.stat(f"/proc/{pid}").st_uid
        except (OSError, ValueError):
            return False
        inside = os.fstat(netns)
        place = user, _namespace(pid)
        wanted = user_of(tenant), (inside.st_dev, inside.st_ino)
        return _command_line(pid) == self._arguments(tenant.name, servers) and place == wanted

    def remove(self, tenant: str) -> None:
        """Stop the tenant's dnsmasq and forget its names."""
        self._stop_all(tenant)
        shutil.rmtree(self._directory / tenant, ignore_errors=True)

    def tenants(self) -> list[str]:
        """Whose files there are."""
        return sorted(os.listdir(self._directory)) if self._directory.is_dir() else []

    def close(self) -> None:
        """Remove the directory when no tenant is left."""
        with contextlib.suppress(OSError):
            self._directory.rmdir()

    def _prepare(self, tenant: Tenant) -> None:
        """Directories that root and the tenant's dnsmasq can read and no other user, whatever the umask.

        Files in them inherit the group.
        """
        self._directory.mkdir(parents=True, exist_ok=True)
        self._directory.chmod(0o711)
        for directory in (self._directory / tenant.name, self._hosts(tenant.name)):
            directory.mkdir(exist_ok=True)
            os.chown(directory, 0, user_of(tenant))
            directory.chmod(0o2750)

    def _hosts(self, tenant: str) -> Path:
        return self._directory / tenant / "hosts"

    def _arguments(self, tenant: str, servers: Sequence[str]) -> list[str]:
        program = shutil.which("dnsmasq", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
        if program is None:
            raise Unavailable("dnsmasq is missing", "install Debian's package dnsmasq-base")
        return [
            os.path.realpath(program),
            "--keep-in-foreground",
            "--log-facility=-",
            "--conf-file=/dev/null",
            "--pid-file=",
            f"--hostsdir={self._hosts(tenant)}",
            "--user=",  # stay who you are
            "--interface=br*",
            "--except-interface=lo",
            "--bind-dynamic",
            "--no-hosts",
            "--no-resolv",
            "--no-poll",
            "--no-ident",
            "--domain-needed",
            "--bogus-priv",
            f"--local=/{DOMAIN}/",
            f"--domain={tenant}.{DOMAIN}",
            *(f"--server={server}" for server in servers),
        ]

    def _stop_all(self, tenant: str) -> None:
        """Kill every resolver of the tenant, also one that was started just before an insulad was killed.

        The lock of `_start` is free when no process is on its way to become one; all are found after that. One that
        can't be killed is left after `_PATIENCE`.
        """
        self._kill_found(tenant)
        try:
            lock = self._lock(tenant)
        except FileNotFoundError:  # it has no files: nothing is on its way
            return
        deadline = time.monotonic() + _PATIENCE
        try:
            while not _take(lock, 0.001) and time.monotonic() < deadline:
                self._kill_found(tenant)
            self._kill_found(tenant)
        finally:
            os.close(lock)

    def _kill_found(self, tenant: str) -> None:
        pidfds = [pidfd for _, pidfd in self._find(tenant)]
        for pidfd in pidfds:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        for pidfd in pidfds:
            _wait(pidfd, 5.0)
            os.close(pidfd)

    def _lock(self, tenant: str) -> int:
        """Descriptor of the file whose lock the processes of a start hold; the caller closes it."""
        return os.open(self._directory / tenant / "lock", os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def _find(self, tenant: str) -> Iterator[tuple[int, int]]:
        """(PID, pidfd) of each dnsmasq that serves the tenant's names; the caller closes the pidfd."""
        mark = f"--hostsdir={self._hosts(tenant)}"
        for name in os.listdir("/proc"):
            if name.isdigit() and mark in _command_line(int(name)):
                with contextlib.suppress(ProcessLookupError):
                    pidfd = os.pidfd_open(int(name))
                    if mark in _command_line(int(name)):  # still the same process
                        yield int(name), pidfd
                    else:
                        os.close(pidfd)


def _bucket(name: str) -> str:
    """Which file a name is in. dnsmasq never forgets a file's name, so there must not be more and more of them."""
    return f"{zlib.crc32(name.encode()) % _BUCKETS:03x}"


def _lines(tenant: str, name: str, addresses: Sequence[str]) -> list[str]:
    check_label("instance", name)
    return [f"{ip_address(address)} {name} {name}.{tenant}.{DOMAIN}\n" for address in addresses]


def answers(gateway: str, tenant: str, timeout: float = 1.0) -> bool:
    """Whether a resolver answers at this address; for use inside the tenant's namespace."""
    name = b"".join(bytes([len(label)]) + label.encode() for label in ("insula-status", tenant, DOMAIN)) + b"\0"
    query = b"\x1d\x0f\x01\0\0\x01\0\0\0\0\0\0" + name + b"\0\x01\0\x01"  # RFC 1035: one question, A, IN
    family = socket.AF_INET if ip_address(gateway).version == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0:
            try:
                sock.settimeout(min(left, 0.2))
                sock.connect((gateway, 53))
                sock.send(query)
                return sock.recv(512)[:2] == query[:2]
            except TimeoutError:
                continue
            except OSError:  # refused: not listening yet
                time.sleep(0.02)
    return False


def _command_line(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    except OSError:
        return []


def _namespace(pid: int) -> tuple[int, int] | None:
    try:
        found = os.stat(f"/proc/{pid}/ns/net")
    except OSError:
        return None
    return found.st_dev, found.st_ino


def user_of(tenant: Tenant) -> int:
    """The user and group ID of the tenant's dnsmasq: nobody else's, neither on the host nor in any instance."""
    return FIRST_USER + tenant.index


@functools.cache
def _system_calls() -> bytes:
    return confine.system_calls()


@functools.cache
def _needed(program: str) -> tuple[str, ...]:
    """A program and the libraries that it loads, as ldd(1) lists them. Raises Unavailable, Failed."""
    try:
        listed = subprocess.run(
            ["ldd", program], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_PATIENCE, check=True
        )
    except FileNotFoundError:
        raise Unavailable("ldd is missing", "install Debian's package libc-bin") from None
    except subprocess.SubprocessError as error:
        raise Failed(f"the libraries of {program} can't be found: {error}", "install dnsmasq again") from error
    words = (word for line in listed.stdout.splitlines() for word in line.split())
    return (program, *dict.fromkeys(word for word in words if word.startswith("/") and word != program))


def _hear(child: subprocess.Popen[bytes]) -> tuple[int | None, bytes]:
    """The PID that `child` prints, None if it doesn't, and what is said until the program has started or ended."""
    assert child.stdout and child.stderr
    said, deadline = b"", time.monotonic() + _PATIENCE
    with child.stdout, child.stderr:
        poll = select.poll()
        poll.register(child.stderr, select.POLLIN)
        while _STARTED not in said and poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            if not (piece := os.read(child.stderr.fileno(), 65536)):
                break
            said += piece
        if _STARTED not in said:
            child.kill()
        printed = child.stdout.read()
        child.wait()
    return (int(printed) if printed.strip().isdigit() else None), said


def _take(lock: int, seconds: float) -> bool:
    """Lock the file of this descriptor, unless it is still locked by others after so many seconds."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.001)


def _wait(pidfd: int, timeout: float) -> None:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.poll(timeout * 1000)
