"""Names of instances: one dnsmasq(8) in each tenant's namespace, listening at the gateways of all its networks.

It reads names from a directory that it watches (inotify), so that a new instance costs a small file and no restart:
names are spread over files by a checksum, because a file that changes is read as a whole.
It answers `web` and `web.<tenant>.internal`, never asks anybody else about `.internal` or about bare names, and
forwards the rest to the host's end of the tenant's uplink, from where the host's rules lead to the host's resolvers:
their addresses may be among those of the tenant's own networks. `--bind-dynamic` makes it listen on bridges that
appear later.

dnsmasq daemonises itself once it listens, so a start that returns is a start that worked. It is known by its exact
arguments and its network namespace, never by its name alone, and it is signalled through a pidfd.
"""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
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

from insula.model.errors import Failed, Unavailable
from insula.model.units import check_label
from insula.network.linux.namespaces import call_in

_BUCKETS = 1024
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
    """The resolvers of all tenants; `directory` is theirs, one subdirectory a tenant."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def set_names(self, tenant: str, names: Mapping[str, Sequence[str]]) -> None:
        """Replace what is answered; unchanged names cost nothing but a look."""
        wanted: dict[str, list[str]] = {}
        for name, addresses in sorted(names.items()):
            wanted.setdefault(_bucket(name), []).extend(_lines(tenant, name, addresses))
        self._prepare(tenant)
        for bucket in os.listdir(self._hosts(tenant)):
            wanted.setdefault(bucket, [])
        for bucket, lines in wanted.items():
            self._write(tenant, bucket, lines)

    def add_name(self, tenant: str, name: str, addresses: Sequence[str]) -> None:
        """Answer one more name, or answer it differently: costs the same however many there are."""
        self._prepare(tenant)
        self._write(tenant, _bucket(name), self._others(tenant, name) + _lines(tenant, name, addresses))

    def remove_name(self, tenant: str, name: str) -> None:
        """Answer no more to `name`."""
        self._write(tenant, _bucket(name), self._others(tenant, name))

    def _others(self, tenant: str, name: str) -> list[str]:
        """The lines beside those of `name` in its file."""
        return [line for line in self._lines_of(tenant, _bucket(name)) if line.split()[1] != name]

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

    def ensure(self, tenant: str, netns: int, servers: Sequence[str]) -> None:
        """Start the tenant's dnsmasq unless it runs with the right arguments. `servers` are asked about other names."""
        if self.running(tenant, netns, servers):
            return
        self._stop_all(tenant)
        self._prepare(tenant)
        arguments = self._arguments(tenant, servers)

        def start() -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                arguments, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=20, check=False, cwd="/"
            )

        done = call_in(netns, start)
        if done.returncode:
            said = " ".join(done.stderr.split()) or f"exit status {done.returncode}"
            raise Failed(f"the resolver of tenant {tenant} did not start: {said}", "run `insula doctor`")

    def running(self, tenant: str, netns: int, servers: Sequence[str]) -> bool:
        """Whether dnsmasq runs in that namespace with exactly the arguments it should have."""
        try:
            pid = int((self._directory / tenant / "pid").read_text())
        except (OSError, ValueError):
            return False
        inside = os.fstat(netns)
        return _command_line(pid) == self._arguments(tenant, servers) and _namespace(pid) == (
            inside.st_dev,
            inside.st_ino,
        )

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

    def _prepare(self, tenant: str) -> None:
        """Directories that dnsmasq's group can read and no other user, whatever the umask. Files in them inherit it."""
        self._directory.mkdir(parents=True, exist_ok=True)
        self._directory.chmod(0o711)
        group = pwd.getpwnam(_user()).pw_gid
        for directory in (self._directory / tenant, self._hosts(tenant)):
            directory.mkdir(exist_ok=True)
            os.chown(directory, 0, group)
            directory.chmod(0o2750)

    def _hosts(self, tenant: str) -> Path:
        return self._directory / tenant / "hosts"

    def _arguments(self, tenant: str, servers: Sequence[str]) -> list[str]:
        program = shutil.which("dnsmasq", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
        if program is None:
            raise Unavailable("dnsmasq is missing", "install Debian's package dnsmasq-base")
        user = _user()
        return [
            program,
            "--conf-file=/dev/null",
            f"--pid-file={self._directory / tenant / 'pid'}",
            f"--hostsdir={self._hosts(tenant)}",
            f"--user={user}",
            f"--group={_group(user)}",
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
        """Kill whatever serves the tenant's names, also one that was started just before we were killed."""
        pidfds = list(self._find(tenant))
        for pidfd in pidfds:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        for pidfd in pidfds:
            _wait(pidfd, 5.0)
            os.close(pidfd)

    def _find(self, tenant: str) -> Iterator[int]:
        mark = f"--hostsdir={self._hosts(tenant)}"
        for name in os.listdir("/proc"):
            if name.isdigit() and mark in _command_line(int(name)):
                with contextlib.suppress(ProcessLookupError):
                    pidfd = os.pidfd_open(int(name))
                    if mark in _command_line(int(name)):  # still the same process
                        yield pidfd
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


def _user() -> str:
    try:
        return pwd.getpwnam("dnsmasq").pw_name
    except KeyError:
        return "nobody"


def _group(user: str) -> str:
    return grp.getgrgid(pwd.getpwnam(user).pw_gid).gr_name


def _wait(pidfd: int, timeout: float) -> None:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.poll(timeout * 1000)
