"""The processes of egress by name (`insula.network.names.process`), one set for each tenant that has rules with names.

Each tenant has a directory with the rules in force, the lessor's socket, the supervisor's PID, and a lock that its
processes hold. They are adopted when insulad starts again. Other versions are replaced: their leases are in the kernel.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import logging
import os
import shutil
import signal
import socket
import time
from pathlib import Path
from typing import Final

import msgspec

from insula.kernel.cgroups import Cgroup
from insula.kernel.netns import call_in
from insula.model.errors import Failed
from insula.model.objects import Tenant
from insula.network.names import process
from insula.network.names.messages import VERSION, ControlReply, LeaseListed, ListLeases, SetRules, encode
from insula.network.names.process import GateSettings
from insula.network.names.rules import EgressRules

log = logging.getLogger("insula.network")
FIRST_GATE_USER: Final = 0x72000000
FIRST_LESSOR_USER: Final = 0x74000000
CGROUP: Final = "names"  # the subgroup of a tenant's control group
_TIMEOUT: Final = 20.0  # seconds for a start on a busy host, and for an answer


class NameGates:
    """The gates of all tenants; `directory` has a subdirectory for each. `groups` is the parent of the tenants' control
    groups."""

    def __init__(self, directory: Path, table: str, groups: str | None = None) -> None:
        self._directory, self._table, self._groups = directory, table, groups

    def apply(self, tenant: Tenant, netns: int, rules: EgressRules) -> None:
        """Put rules in force; leases and connections that they forbid are gone when this returns.

        Processes run only while there are rules. Failed.
        """
        if not rules.clients and not (self._directory / tenant.name).exists():
            return
        if not rules.clients:
            self._order(tenant.name, SetRules(rules), missing_ok=True)
            self.remove(tenant.name)
            return
        self._write(tenant.name, rules)
        if self.running(tenant.name, netns):
            with contextlib.suppress(Failed):
                self._order(tenant.name, SetRules(rules))
                return
            log.warning("the gate of tenant %s does not answer, and is started again", tenant.name)
        self._start(tenant, netns)
        self._order(tenant.name, SetRules(rules))

    def running(self, tenant: str, netns: int) -> bool:
        """Whether the tenant's supervisor runs in that namespace, with a lessor of this version."""
        pid = self._pid(tenant)
        if pid is None:
            return False
        try:
            place, wanted = os.stat(f"/proc/{pid}/ns/net"), os.fstat(netns)
            version = (self._directory / tenant / "version").read_text()
        except OSError:
            return False
        return (place.st_dev, place.st_ino) == (wanted.st_dev, wanted.st_ino) and version == _version()

    def leases(self, tenant: str) -> list[LeaseListed]:
        """Return the leases of a tenant's instances; none if it has no rules with names. Failed."""
        return self._order(tenant, ListLeases(), missing_ok=True).leases

    def counters(self, tenant: str) -> dict[str, int]:
        """Return what the tenant's lessor has counted. Failed."""
        return self._order(tenant, ListLeases(), missing_ok=True).counters

    def remove(self, tenant: str) -> None:
        """End the tenant's processes, and remove its directory."""
        self._stop(tenant)
        shutil.rmtree(self._directory / tenant, ignore_errors=True)

    def has_files(self, tenant: str) -> bool:
        """Whether the tenant has, or had, rules with names."""
        return (self._directory / tenant).is_dir()

    def tenants(self) -> list[str]:
        """Return the names of all tenants that have files here."""
        return sorted(os.listdir(self._directory)) if self._directory.is_dir() else []

    # -- parts -----------------------------------------------------------------------------------------------------

    def _write(self, tenant: str, rules: EgressRules) -> None:
        """Write the rules that processes begin with after a crash."""
        directory = self._directory / tenant
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        draft = directory / "rules.new"
        draft.write_bytes(msgspec.json.encode(rules))
        draft.rename(directory / "rules.json")

    def _start(self, tenant: Tenant, netns: int) -> None:
        self._stop(tenant.name)
        directory = self._directory / tenant.name
        lock = os.open(directory / "lock", os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        groups = self._group_files(tenant)
        filters = [_memory_file(_system_calls(is_gate)) for is_gate in (False, True)]
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            settings = GateSettings(
                table=self._table,
                gate_user=FIRST_GATE_USER + tenant.index,
                lessor_user=FIRST_LESSOR_USER + tenant.index,
                rules=str(directory / "rules.json"),
                control=str(directory / "control"),
                lock=lock,
                groups=groups,
                lessor_calls=filters[0],
                gate_calls=filters[1],
            )
            child = call_in(netns, lambda: process.start(settings, [lock, *groups, *filters]))
            output, error = child.communicate(timeout=_TIMEOUT)
        except (OSError, TimeoutError) as caught:
            raise _not_started(tenant.name, str(caught)) from caught
        finally:
            for number in (lock, *groups, *filters):
                os.close(number)
        if not output.strip().isdigit():
            lines = error.decode(errors="replace").strip().splitlines()
            raise _not_started(tenant.name, lines[-1] if lines else "it ended without an error message")
        (directory / "version").write_text(_version())
        draft = directory / "pid.new"
        draft.write_text(f"{int(output)}\n")
        draft.rename(directory / "pid")

    def _group_files(self, tenant: Tenant) -> list[int]:
        if not self._groups:
            return []
        group = Cgroup(f"{self._groups}/{tenant.name}/{CGROUP}")
        try:
            group.create()
            return group.open()
        except FileNotFoundError:  # no cgroup hierarchy is mounted
            return []
        except OSError as error:
            raise Failed(
                f"the gate of tenant {tenant.name} has no control group: {error}", "run `insula doctor`"
            ) from error

    def _pid(self, tenant: str) -> int | None:
        """Return the PID of the tenant's supervisor, which has the path of its directory among its arguments."""
        try:
            pid = int((self._directory / tenant / "pid").read_text())
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes()
        except (OSError, ValueError):
            return None
        return pid if self._mark(tenant) in arguments else None

    def _mark(self, tenant: str) -> bytes:
        return f'"control":"{self._directory / tenant / "control"}"'.encode()

    def _stop(self, tenant: str) -> None:
        """Kill all supervisors of the tenant, also one that was being started when insulad was killed."""
        if not (self._directory / tenant).is_dir():
            return
        lock = os.open(self._directory / tenant / "lock", os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        deadline = time.monotonic() + _TIMEOUT
        try:
            while not _try_lock(lock):
                self._kill_found(tenant)
                if time.monotonic() > deadline:
                    raise Failed(f"the gate of tenant {tenant} can't be killed", "see its state in ps(1)")
                time.sleep(0.002)
        finally:
            os.close(lock)

    def _kill_found(self, tenant: str) -> None:
        """Kill every process with the tenant's mark: starters and supervisors; the others end with them."""
        for name in os.listdir("/proc"):
            if not name.isdigit():
                continue
            with contextlib.suppress(OSError):
                if self._mark(tenant) in Path(f"/proc/{name}/cmdline").read_bytes():
                    pidfd = os.pidfd_open(int(name))
                    try:
                        if self._mark(tenant) in Path(f"/proc/{name}/cmdline").read_bytes():  # still the same process
                            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                    finally:
                        os.close(pidfd)

    def _order(self, tenant: str, order: SetRules | ListLeases, *, missing_ok: bool = False) -> ControlReply:
        """Send an order to the tenant's lessor, and return its reply. Failed."""
        try:
            with _connected(self._directory / tenant) as sock, sock.makefile("rb") as incoming:
                sock.sendall(encode(order))
                data = incoming.read(int.from_bytes(incoming.read(4), "big"))
            reply = msgspec.json.decode(data, type=ControlReply)
        except (FileNotFoundError, ConnectionRefusedError) as error:
            if missing_ok:
                return ControlReply()
            raise _no_answer(tenant, error) from error
        except (OSError, msgspec.MsgspecError) as error:
            raise _no_answer(tenant, error) from error
        if reply.error:
            raise Failed(f"the gate of tenant {tenant} refuses its rules: {reply.error}", "see insulad's log")
        return reply


@functools.cache
def _system_calls(is_gate: bool) -> bytes:
    return process.system_calls(is_gate=is_gate)


def _connected(directory: Path) -> socket.socket:
    """Return a connection with the lessor whose socket is in this directory. OSError."""
    number = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(_TIMEOUT)
        sock.connect(f"/proc/self/fd/{number}/control")  # a socket's path has at most 107 bytes
    except OSError:
        sock.close()
        raise
    finally:
        os.close(number)
    return sock


def _version() -> str:
    from insula import __version__

    return f"{__version__} {VERSION}"


def _memory_file(data: bytes) -> int:
    number = os.memfd_create("seccomp")
    os.write(number, data)
    return number


def _try_lock(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _not_started(tenant: str, why: str) -> Failed:
    return Failed(f"the gate of tenant {tenant} did not start: {why}", "run `insula doctor`")


def _no_answer(tenant: str, error: Exception) -> Failed:
    return Failed(f"the gate of tenant {tenant} does not answer: {error}", "see its processes in ps(1)")
