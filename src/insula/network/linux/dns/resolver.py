"""DNS for instances: one dnsmasq(8) in each tenant's namespace, which listens at the gateways of all its networks.

It answers `web` and `web.<tenant>.internal`, and `web.<other>.peer` for the instances of other tenants that there is a
peering with. It never forwards queries for `.internal`, for `.peer` or for names without a dot.
Other queries go to the host's end of the tenant's uplink, where the host's rules translate them to the host's name
servers: a tenant's own network may have the servers' addresses.

It reads names from a directory that it watches (inotify), so a new instance takes a small file and no restart. A
changed file is read as a whole, so names are distributed over files by a checksum. `--bind-dynamic` makes it listen on
bridges that are added later.

It reports its start on its standard error; later output is discarded. A running one is identified by its arguments, its
user and its network namespace, and is signalled through a pidfd. A process between fork(2) and execve(2) doesn't show
its arguments yet. So each start holds a lock (flock(2)) that its processes inherit: while the lock is held, another
resolver may still appear. It parses packets of hostile instances, so it is confined: see
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
import threading
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from ipaddress import ip_address
from pathlib import Path

from insula.kernel.cgroups import Cgroup
from insula.kernel.netns import call_in
from insula.model.errors import Failed, Unavailable
from insula.model.objects import Tenant
from insula.model.peerings import DOMAIN as PEER
from insula.model.units import check_label
from insula.network.linux import confine, naming, rules

FIRST_USER = 0x70000000  # user IDs of resolvers, above all tenants' ranges (control.tenants)
log = logging.getLogger("insula.network")
GROUP = "resolver"  # the subgroup of a tenant's control group
_BUCKETS = 1024
_STARTED = b": started, version "
_TIMEOUT = 20.0  # seconds for a start on a busy host
_WAITING = 10 * rules.DNS_QUERIES  # queries: one that no server answers waits for 10 s
PORT = 53
DOMAIN = "internal"  # reserved by ICANN in 2024 for private use
_RESOLV_CONF = ("/etc/resolv.conf", "/run/systemd/resolve/resolv.conf")  # the second is of systemd-resolved


def host_resolvers() -> list[str]:
    """Return the host's name servers, without those at loopback and IPv6 link-local addresses."""
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
    """Return a directory that dnsmasq, which is not root, can read: under `run`, unless only root can pass there."""
    run.mkdir(mode=0o755, parents=True, exist_ok=True)
    if all(path.stat().st_mode & 0o001 for path in (run, *run.resolve().parents)):
        return run / "dns"
    return Path("/run") / f"{prefix}-dns"


class Resolver:
    """The resolvers of all tenants; `directory` has a subdirectory for each.

    `groups` is the parent of the tenants' control groups; with None resolvers stay in the caller's. Those at another
    port than 53 know the tenants' own names only.
    """

    def __init__(self, directory: Path, groups: str | None = None, port: int = PORT) -> None:
        self._port = port
        self._directory = directory
        self._groups = groups
        self._writing = threading.Lock()  # a tenant's instances have names in the files of its peers, too

    def set_names(self, tenant: Tenant, names: Mapping[str, Sequence[str]]) -> None:
        """Replace all names of a tenant; unchanged files are not written."""
        with self._writing:
            wanted: dict[str, list[str]] = {}
            for name, addresses in sorted(names.items()):
                wanted.setdefault(_bucket(name), []).extend(_lines(tenant.name, name, addresses))
            self._prepare(tenant)
            for bucket in os.listdir(self._hosts(tenant.name)):
                wanted.setdefault(bucket, [])
            for bucket, lines in wanted.items():
                self._write(tenant.name, bucket, lines, self._lines_of(tenant.name, bucket))

    def add_name(self, tenant: Tenant, name: str, addresses: Sequence[str]) -> None:
        """Add addresses to a name. The time does not depend on the number of names."""
        with self._writing:
            lines, bucket = _lines(tenant.name, name, addresses), _bucket(name)
            before = self._lines_of(tenant.name, bucket)
            wanted = [line for line in before if line not in lines] + lines
            try:
                self._write(tenant.name, bucket, wanted, before)
            except FileNotFoundError:  # the tenant's directories are missing
                self._prepare(tenant)
                self._write(tenant.name, bucket, wanted, before)

    def remove_name(self, tenant: str, name: str, addresses: Sequence[str]) -> None:
        """Remove addresses from a name."""
        with self._writing:
            lines, bucket = _lines(tenant, name, addresses), _bucket(name)
            before = self._lines_of(tenant, bucket)
            self._write(tenant, bucket, [line for line in before if line not in lines], before)

    def _lines_of(self, tenant: str, bucket: str) -> list[str]:
        try:
            with open(self._file(tenant, bucket), "rb", 0) as file:
                return file.read().decode().splitlines(keepends=True)
        except FileNotFoundError:
            return []

    def _write(self, tenant: str, bucket: str, lines: Sequence[str], before: Sequence[str]) -> None:
        """Replace the lines `before` of a file, which is removed when none is left."""
        if lines == before:
            return
        file, draft = self._file(tenant, bucket), f"{self._directory}/{tenant}/names.new"
        if not lines:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(file)
            return
        with open(draft, "wb", 0) as new:
            os.fchmod(new.fileno(), 0o640)
            new.write("".join(lines).encode())
        os.rename(draft, file)

    @contextlib.contextmanager
    def ensuring(self, tenant: Tenant, netns: int, servers: Sequence[str]) -> Iterator[None]:
        """Start the tenant's dnsmasq while the block runs, unless it runs with the right arguments.

        It has started when the block ends.

        `servers` are the upstream servers. Failed with dnsmasq's output if it doesn't start.
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
            pid, output = _read_start(child)
        if pid is None or _STARTED not in output:
            _with_libraries.cache_clear()  # an upgrade may have changed its libraries
            self._stop_all(tenant.name)
            text = " ".join(output.decode(errors="replace").split()) or "it ended without an error message"
            raise Failed(f"the resolver of tenant {tenant.name} did not start: {text}", "run `insula doctor`")
        draft = self._directory / tenant.name / "pid.new"
        draft.write_text(f"{pid}\n")
        draft.rename(draft.with_name("pid"))

    def _start(self, tenant: Tenant, netns: int, servers: Sequence[str]) -> subprocess.Popen[bytes]:
        command = self._arguments(tenant.name, servers)
        readable = [*_with_libraries(command[0]), str(self._hosts(tenant.name))]
        groups: list[int] = []
        if self._groups:
            group = Cgroup(f"{self._groups}/{tenant.name}/{GROUP}")
            try:
                group.create()
                groups = group.open()
            except FileNotFoundError:  # no cgroup hierarchy is mounted: then no instance can be launched either
                log.warning("the resolver of tenant %s runs without a control group", tenant.name)
            except OSError as error:
                what = f"the resolver of tenant {tenant.name} has no control group: {error}"
                raise Failed(what, "run `insula doctor`") from error
        lock = self._lock(tenant.name)
        passed = [*groups, lock]
        try:
            if not _try_lock(lock, _TIMEOUT):
                raise Failed(f"another resolver of tenant {tenant.name} can't be killed", "see its state in ps(1)")
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

    def stop(self, tenant: str) -> None:
        """Stop the tenant's dnsmasq, whose names stay."""
        self._stop_all(tenant)

    def remove(self, tenant: str) -> None:
        """Stop the tenant's dnsmasq and remove its names."""
        self._stop_all(tenant)
        shutil.rmtree(self._directory / tenant, ignore_errors=True)

    def knows(self, tenant: str) -> bool:
        """Whether there are files of this tenant."""
        return os.path.isdir(f"{self._directory}/{tenant}")

    def tenants(self) -> list[str]:
        """Return the names of all tenants that have files here."""
        return sorted(os.listdir(self._directory)) if self._directory.is_dir() else []

    def close(self) -> None:
        """Remove the directory when no tenant is left."""
        with contextlib.suppress(OSError):
            self._directory.rmdir()

    def _prepare(self, tenant: Tenant) -> None:
        """Make directories that only root and the tenant's dnsmasq can read, with any umask.

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

    def _file(self, tenant: str, bucket: str) -> str:
        """Return the path of a file of names. Each launch needs some, and to join a `Path` takes 10 us."""
        return f"{self._directory}/{tenant}/hosts/{bucket}"

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
            "--user=",  # don't change the user
            "--interface=br*",
            f"--interface={naming.EGRESS}*",
            "--except-interface=lo",
            "--bind-dynamic",
            "--no-hosts",
            "--no-resolv",
            "--no-poll",
            "--no-ident",
            f"--dns-forward-max={_WAITING}",
            "--domain-needed",
            "--bogus-priv",
            f"--local=/{DOMAIN}/",
            f"--local=/{PEER}/",
            f"--domain={tenant}.{DOMAIN}",
            *(f"--server={server}" for server in servers),
            *([] if self._port == PORT else [f"--port={self._port}", "--address=/#/"]),  # NXDOMAIN, not a refusal
        ]

    def _stop_all(self, tenant: str) -> None:
        """Kill every resolver of the tenant, also one that was being started when insulad was killed.

        When the lock of `_start` is free, no process is about to become a resolver, and all are found. One that can't
        be killed is left after `_TIMEOUT`.
        """
        self._kill_found(tenant)
        try:
            lock = self._lock(tenant)
        except FileNotFoundError:  # the tenant has no files, so none is being started
            return
        deadline = time.monotonic() + _TIMEOUT
        try:
            while not _try_lock(lock, 0.001) and time.monotonic() < deadline:
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
        """Open the file whose lock is held by the processes of a start; the caller closes it."""
        return os.open(self._directory / tenant / "lock", os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def _find(self, tenant: str) -> Iterator[tuple[int, int]]:
        """Yield (PID, pidfd) of each dnsmasq that serves the tenant's names; the caller closes the pidfd."""
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
    """Return the file for a name. dnsmasq never frees the name of a file, so the number of files is limited."""
    return f"{zlib.crc32(name.encode()) % _BUCKETS:03x}"


def _lines(tenant: str, name: str, addresses: Sequence[str]) -> list[str]:
    labels = name.split(".")
    for label in labels:
        check_label("instance", label)
    if len(labels) > 1:
        return [f"{ip_address(address)} {name}\n" for address in addresses]
    return [f"{ip_address(address)} {name} {name}.{tenant}.{DOMAIN}\n" for address in addresses]


def answers(gateway: str, tenant: str, timeout: float = 1.0) -> bool:
    """Whether a resolver answers at this address. Runs in the tenant's namespace."""
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
                time.sleep(0.005)
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
    """Return the user and group ID of the tenant's dnsmasq, which no other process of host or instances has."""
    return FIRST_USER + tenant.index


@functools.cache
def _system_calls() -> bytes:
    return confine.system_calls()


@functools.cache
def _with_libraries(program: str) -> tuple[str, ...]:
    """Return the paths of a program and of its libraries, as ldd(1) lists them. Unavailable, Failed."""
    try:
        listed = subprocess.run(
            ["ldd", program], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_TIMEOUT, check=True
        )
    except FileNotFoundError:
        raise Unavailable("ldd is missing", "install Debian's package libc-bin") from None
    except subprocess.SubprocessError as error:
        raise Failed(f"the libraries of {program} can't be found: {error}", "install dnsmasq again") from error
    words = (word for line in listed.stdout.splitlines() for word in line.split())
    return (program, *dict.fromkeys(word for word in words if word.startswith("/") and word != program))


def _read_start(child: subprocess.Popen[bytes]) -> tuple[int | None, bytes]:
    """Return the PID that `child` prints, None without one, and its standard error up to the program's start or end."""
    assert child.stdout and child.stderr
    output, deadline = b"", time.monotonic() + _TIMEOUT
    with child.stdout, child.stderr:
        poll = select.poll()
        poll.register(child.stderr, select.POLLIN)
        while _STARTED not in output and poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            if not (piece := os.read(child.stderr.fileno(), 65536)):
                break
            output += piece
        if _STARTED not in output:
            child.kill()
        printed = child.stdout.read()
        child.wait()
    return (int(printed) if printed.strip().isdigit() else None), output


def _try_lock(lock: int, seconds: float) -> bool:
    """Lock the file behind a descriptor; False if others still hold the lock after `seconds`."""
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
