"""Memory that the kernel charges to no control group: each tenant has a budget for queues of sockets and file locks.

Most of it needs a kernel that lets programs be attached to its functions; tests/modern runs this file on one.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from insula.control.instances.drivers.uncharged import Uncharged, budget
from insula.kernel import syscalls
from insula.kernel.ebpf import trace as ebpf_trace
from insula.kernel.ebpf.btf import Types
from insula.kernel.uncharged import IDS, LOCK, UDP, Guard
from tests.forked import forked
from tests.support.cli import Cli

FIRST = 0x7A000000
"""User IDs that belong to no tenant."""
BUDGET = 1 << 20
TERMINALS = 6
LATER = 600_000  # bytes that a socket has at most, with the kernel's usual sizes of buffers


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guard]:
    try:
        ebpf_trace.check_allowed()
    except OSError as error:
        pytest.skip(f"this kernel attaches no programs to its functions: {error}")
    guard = Guard(str(tmp_path_factory.mktemp("guard") / "pins"), FIRST, 4, BUDGET, terminals=TERMINALS)
    guard.ensure()
    yield guard
    guard.remove()
    assert not guard.attached()


def netlink() -> socket.socket:
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)


def udp() -> socket.socket:
    return socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)


def tcp() -> socket.socket:
    return socket.socket(socket.AF_INET, socket.SOCK_STREAM)


def unix() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)


def as_user(user: int, act: Callable[[], Any]) -> Any:
    """Run `act` in a process of that user, and return its result."""

    def there() -> Any:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
        return act()

    return forked(there)


def taken(make: Callable[[], Any], most: int = 300) -> tuple[int, int | None]:
    """How many of them there were at once, and the errno of the first refusal."""
    kept = []
    try:
        for _ in range(most):
            kept.append(make())
    except OSError as error:
        return len(kept), error.errno
    return len(kept), None


@pytest.mark.parametrize("make", [netlink, udp])
def test_sockets_are_refused_beyond_the_budget(guard: Guard, make: Callable[[], socket.socket]) -> None:
    count, error = as_user(FIRST + 5, lambda: taken(make))
    assert error == 105, "ENOBUFS"
    assert BUDGET // LATER <= count <= BUDGET // UDP + 1
    assert guard.used(0) == 0, "they are closed"
    assert as_user(FIRST - 1, lambda: taken(make)) == (300, None), "the control: users of the host"


@pytest.mark.parametrize("make", [tcp, unix])
def test_charged_memory_is_not_counted(guard: Guard, make: Callable[[], socket.socket]) -> None:
    assert as_user(FIRST + 5, lambda: taken(make)) == (300, None)


def test_each_tenant_has_a_budget_of_its_own(guard: Guard) -> None:
    def both() -> tuple[int | None, int | None, int | None]:
        """One tenant is full; what then another user of it gets, and another tenant."""
        kept = []

        def more(user: int, count: int = 50) -> int | None:
            syscalls.set_thread_users(user, 0, 0)
            try:
                for _ in range(count):
                    kept.append(netlink())
            except OSError as error:
                return error.errno
            finally:
                syscalls.set_thread_users(0, 0, 0)
            return None

        return more(FIRST + 5), more(FIRST + IDS - 1), more(FIRST + IDS, 2)

    assert forked(both) == (105, 105, None)


def test_a_larger_buffer_is_counted(guard: Guard) -> None:
    def sizes() -> list[int]:
        found = []
        with netlink() as sock:
            for size in (4096, 1 << 30):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
                ends = [sock.getsockopt(socket.SOL_SOCKET, option) for option in (socket.SO_RCVBUF, socket.SO_SNDBUF)]
                found += [sum(ends), count()]
        return [*found, count()]

    def count() -> int:
        return guard.used(0)

    def privileged() -> list[int]:
        syscalls.set_thread_users(FIRST + 7, 0, 0)  # and may look at the counts
        try:
            return sizes()
        finally:
            syscalls.set_thread_users(0, 0, 0)

    small, counted_small, large, counted_large, after = forked(privileged)
    assert small < large
    assert (counted_small, counted_large, after) == (small, large, 0)


def test_locks_are_refused_beyond_the_budget(guard: Guard, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (tmp_path / "file").open("r+b") as file:

        def lock() -> tuple[int, int | None, int | None]:
            own = os.open(f"/proc/self/fd/{file.fileno()}", os.O_RDWR)
            places = iter(range(0, 1 << 20, 2))
            count, error = taken(lambda: fcntl.lockf(own, fcntl.LOCK_EX, 1, next(places)), 2 * BUDGET // LOCK)
            fcntl.lockf(own, fcntl.LOCK_UN)
            return count, error, taken(lambda: fcntl.lockf(own, fcntl.LOCK_EX, 1, 0), 1)[1]

        os.fchmod(file.fileno(), 0o666)
        os.chmod(tmp_path, 0o755)
        count, error, again = as_user(FIRST + 2 * IDS, lock)
        assert error == 37, "ENOLCK"
        assert abs(count - BUDGET // LOCK) <= 2
        assert again is None, "what was unlocked is free again"
        assert guard.used(2) == 0
        assert as_user(FIRST - 1, lock)[:2] == (2 * BUDGET // LOCK, None), "the control: users of the host"


def terminal(path: str = "/dev/ptmx") -> IO[bytes]:
    return os.fdopen(os.open(path, os.O_RDWR | os.O_NOCTTY), "rb+", buffering=0)


def of_its_own() -> IO[bytes]:
    """A terminal in a devpts that the tenant has just mounted, as with --nesting."""
    user = os.getuid()
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 1)  # who changed the user may not write its own maps
    syscalls.unshare(syscalls.CLONE_NEWUSER | syscalls.CLONE_NEWNS)
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    syscalls.mount("devpts", "/dev/pts", "devpts", 0, "ptmxmode=666")
    return terminal("/dev/pts/ptmx")


def test_terminals_are_refused_beyond_the_limit_in_any_devpts(guard: Guard) -> None:
    def there() -> tuple[int, int | None, int | None]:
        kept = of_its_own()
        count, error = taken(lambda: terminal("/dev/pts/ptmx"), 2 * TERMINALS)
        kept.close()
        return count, error, taken(lambda: terminal("/dev/pts/ptmx"), TERMINALS)[1]

    assert as_user(FIRST + 5, there) == (TERMINALS - 1, 28, None), "ENOSPC; what was closed is free again"
    assert guard.terminals(0) == 0, "they are closed"
    assert as_user(FIRST + 5, lambda: taken(terminal, 2 * TERMINALS)) == (TERMINALS, 28), "the host's devpts"
    assert as_user(FIRST - 1, lambda: taken(terminal, 2 * TERMINALS)) == (2 * TERMINALS, None), "users of the host"
    assert as_user(FIRST + 5, lambda: taken(lambda: os.open("/dev/null", os.O_RDONLY), 20)) == (20, None), (
        "other devices"
    )


def test_a_terminal_counts_until_both_ends_are_closed(guard: Guard) -> None:
    def counts() -> list[int]:
        syscalls.set_thread_users(FIRST + 7, 0, 0)  # and may look at the counts
        try:
            master, slave = os.openpty()
        finally:
            syscalls.set_thread_users(0, 0, 0)
        found = [guard.terminals(0)]
        os.close(master)
        found.append(guard.terminals(0))
        os.close(slave)
        return [*found, guard.terminals(0)]

    assert forked(counts) == [1, 1, 0]


def test_the_budget_outlives_insulad(guard: Guard) -> None:
    again = Guard(guard._directory, FIRST, 4, BUDGET, terminals=TERMINALS)
    assert again.attached()
    again.ensure()
    assert as_user(FIRST + 5, lambda: taken(netlink))[1] == 105


def test_missing_kernel_features_are_named() -> None:
    numbers, offsets = Types().find({"netlink_release"}, {("socket", "sk"), ("sock", "sk_rcvbuf")})
    assert numbers["netlink_release"] > 0, "the control"
    assert offsets["socket.sk"] in (16, 24, 32)
    with pytest.raises(OSError, match=r"no no_such_function, sock\.sk_nothing"):
        Types().find({"no_such_function", "netlink_release"}, {("sock", "sk_nothing")})


def test_an_unsupported_kernel_is_reported(tmp_path: Path) -> None:
    bound = Uncharged(tmp_path / "pins")
    assert bound.check().state == "degraded", "before it begins"
    bound.begin().join()
    try:
        check = bound.check()
        try:
            ebpf_trace.check_allowed()
        except OSError as error:
            assert check.state == "degraded"
            assert check.detail == str(error)
            assert not (tmp_path / "pins").exists(), "nothing stays"
        else:
            assert check.state == "ok"
            assert budget() >= 128 << 20
    finally:
        bound.restore()
    assert not (tmp_path / "pins").exists()


def test_the_setting_removes_the_budget(tmp_path: Path) -> None:
    pins = tmp_path / "pins"
    on, off = Uncharged(pins), Uncharged(pins, enabled=False)
    on.begin().join()
    if on.check().state != "ok":  # this kernel can't: at least the directory goes
        pins.mkdir()
    off.begin().join()
    assert not pins.exists()
    check = off.check()
    assert (check.state, check.detail) == ("degraded", "off by the setting ebpf_budgets")
    assert check.hint == "set ebpf_budgets = true in insulad.toml, and restart insulad"


def test_instances_work_with_the_budget(cli: Cli) -> None:
    """The controls of all this: what ordinary programs do with such sockets."""
    cli.ok("run", "-d", "--name", "web", "busybox", "sleep", "600")
    assert "eth0" in cli.ok("exec", "web", "ip", "addr")
    assert cli.run("exec", "web", "ping", "-c", "1", "-W", "20", "127.0.0.1").status == 0
    assert cli.run("exec", "web", "nslookup", "web").status == 0
    cli.ok("rm", "-f", "web")
