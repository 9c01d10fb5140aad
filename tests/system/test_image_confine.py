"""The rights of processes that read data from outside, seen from outside and tried from inside."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from insula.image import confine, worker
from insula.image.job import Cancelled, Job
from insula.image.limits import ExtractionLimits
from insula.kernel import capabilities, syscalls
from tests.forked import errno_of, forked
from tests.support.images import member, tar
from tests.support.processes import find
from tests.support.wait import until

EPERM, ENOENT, EMFILE, EFBIG = 1, 2, 24, 27


def status(pid: int) -> dict[str, str]:
    """proc_pid_status(5)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def namespaces(pid: int) -> set[str]:
    return {kind for kind in ("net", "ipc", "uts", "pid", "mnt") if not _same(kind, pid)}


def _same(kind: str, pid: int) -> bool:
    return os.readlink(f"/proc/{pid}/ns/{kind}") == os.readlink(f"/proc/self/ns/{kind}")


@pytest.fixture
def at_work(tmp_path: Path) -> Iterator[dict[str, int]]:
    """A worker and its zstd that have much to do: 256 GiB of zeros. Their PIDs."""
    archive = tmp_path / "archive.zst"
    frame = subprocess.run("head -c 256M /dev/zero | zstd -c", shell=True, capture_output=True, check=True).stdout
    head = subprocess.run(["zstd", "-c"], input=tar(member("f", b"1")), capture_output=True, check=True).stdout
    archive.write_bytes(head + frame * 1024)
    job, target, ended = Job(), tmp_path / "target", []
    target.mkdir()

    def work() -> None:
        fd = os.open(target, os.O_RDONLY | os.O_DIRECTORY)
        with open(archive, "rb") as file, pytest.raises(Cancelled):
            worker.run(file, fd, ExtractionLimits(tar=1 << 50), job)
        os.close(fd)
        ended.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        until(lambda: (target / "f").exists(), "it extracts")
        [python] = find(f"{sys.executable} -s -P -m insula.image.worker")
        [zstd] = find("zstd")
        yield {"python": python, "zstd": zstd}
    finally:
        job.cancel()
        thread.join()
        assert ended
        command = f"{sys.executable} -s -P -m insula.image.worker"
        until(lambda: not find("zstd") and not find(command), "the processes are gone")


def test_the_extracting_process_has_few_rights(at_work: dict[str, int], tmp_path: Path) -> None:
    pid = at_work["python"]
    until(lambda: status(pid)["Seccomp"] == "2", "it has a filter")
    found, ours = status(pid), status(os.getpid())
    kept = capabilities.to_mask(confine.KEPT)
    for field in ("CapEff", "CapPrm", "CapBnd"):
        assert int(found[field], 16) == kept
        assert int(ours[field], 16) & ~kept  # the control: we have more
    assert (found["CapInh"], found["CapAmb"]) == ("0" * 16, "0" * 16)
    assert (found["NoNewPrivs"], found["Groups"]) == ("1", "")
    assert (ours["NoNewPrivs"], ours["Seccomp"]) == ("0", "0")
    assert os.readlink(f"/proc/{pid}/root") == str(tmp_path / "target")
    assert namespaces(pid) == {"net", "ipc", "uts", "pid"}
    assert namespaces(os.getpid()) == set()
    scores = [Path(f"/proc/{number}/oom_score_adj").read_text() for number in (*at_work.values(), os.getpid())]
    assert scores[:2] == [f"{confine.OOM}\n"] * 2 and scores[2] != scores[0]


def test_zstd_is_a_user_who_owns_nothing(at_work: dict[str, int]) -> None:
    found = status(at_work["zstd"])
    assert found["Uid"].split() == found["Gid"].split() == [str(confine.USER)] * 4
    assert (found["Groups"], found["NoNewPrivs"], int(found["CapEff"], 16)) == ("", "1", 0)
    assert namespaces(at_work["zstd"]) == {"net", "ipc", "uts", "pid"}


ATTEMPTS: dict[str, Callable[[], object]] = {
    "a process": os.fork,
    "another program": lambda: os.execv("/bin/true", ["true"]),
    "a signal": lambda: os.kill(os.getppid(), 0),
    "a socket": lambda: socket.socket(socket.AF_INET).close(),
    "a UNIX socket": lambda: socket.socket(socket.AF_UNIX).close(),
    "a mount": lambda: syscalls.mount("none", ".", "tmpfs"),
    "a namespace": lambda: syscalls.unshare(syscalls.CLONE_NEWNS),
    "another root": lambda: os.chroot("."),
    "another user": lambda: os.setuid(1),
    "a device": lambda: os.mknod("device", 0o20600, os.makedev(1, 3)),
    "an attribute that overlayfs obeys": lambda: os.setxattr(".", "trusted.overlay.opaque", b"y"),
    "another's process": lambda: os.pidfd_open(os.getppid()),
    "priority": lambda: os.nice(-1),
}


def attempt(name: str, target: Path, *, confined: bool) -> int:
    """The errno that the attempt ends with in a process of its own, 0 for success."""

    def inside() -> int:
        if confined:
            fd = os.open(target, os.O_RDONLY | os.O_DIRECTORY)
            confine.enter(fd, FILTER)
        else:
            os.chdir(target)
        return errno_of(ATTEMPTS[name])

    return forked(inside)


FILTER = confine.system_calls()


@pytest.mark.parametrize("name", sorted(ATTEMPTS.keys() - {"a process", "another program"}))
def test_attacks_from_inside_are_refused(name: str, tmp_path: Path) -> None:
    assert attempt(name, tmp_path, confined=True) == EPERM
    for path in tmp_path.iterdir():
        path.unlink()
    if name != "a mount":
        assert attempt(name, tmp_path, confined=False) == 0  # the control


@pytest.mark.parametrize("name", ["a process", "another program"])
def test_processes_from_inside(name: str, tmp_path: Path) -> None:
    assert attempt(name, tmp_path, confined=True) == EPERM


def test_a_whiteout_can_be_made_inside(tmp_path: Path) -> None:
    """The control: what extraction needs is allowed."""

    def inside() -> list[str]:
        fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
        confine.enter(fd, FILTER)
        os.mknod("whiteout", 0o20000, os.makedev(0, 0))
        os.mkdir("d", 0)
        with open("d/f", "w") as file:
            file.write("x")
        os.chown("d/f", 5, 6)
        os.chmod("d/f", 0o6755)
        os.setxattr("d/f", "user.x", b"y")
        return os.listdir("/")

    assert sorted(forked(inside)) == ["d", "whiteout"]
    found = (tmp_path / "d/f").stat()
    assert (found.st_uid, found.st_gid, found.st_mode & 0o7777) == (5, 6, 0o6755)


def test_files_of_the_host_are_not_there(tmp_path: Path) -> None:
    def inside() -> int:
        fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
        confine.enter(fd, FILTER)
        return errno_of(lambda: open("/etc/passwd").close())

    assert Path("/etc/passwd").exists()
    assert forked(inside) == ENOENT


def test_resources_are_limited(tmp_path: Path) -> None:
    def inside() -> tuple[int, int, bool]:
        for fd in (int(name) for name in os.listdir("/proc/self/fd")):
            with contextlib.suppress(OSError):
                if not stat.S_ISFIFO(os.fstat(fd).st_mode):  # the answer's way stays; the tests' process may have many
                    os.close(fd)
        confine.limit(ExtractionLimits(bytes=1000, tar=1000, cpu=300))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        with open(tmp_path / "f", "wb", buffering=0) as file:
            size = errno_of(lambda: os.pwrite(file.fileno(), b"x", 5000))
        files = errno_of(lambda: [os.open("/dev/null", os.O_RDONLY) for _ in range(200)])
        try:
            memory = bool(bytearray(2 << 30))
        except MemoryError:
            memory = False
        return size, files, memory

    assert forked(inside) == (EFBIG, EMFILE, False)


def test_the_process_dies_with_the_thread_that_waits(tmp_path: Path) -> None:
    """As when insulad is killed: nothing of it is left that still writes."""
    script = (
        "import os, sys; from insula.image import worker; from insula.image.job import Job; "
        "from insula.image.limits import ExtractionLimits; fd = os.open(sys.argv[2], os.O_RDONLY); "
        "worker.run(open(sys.argv[1], 'rb'), fd, ExtractionLimits(tar=1 << 50), Job())"
    )
    archive, target = tmp_path / "archive", tmp_path / "target"
    target.mkdir()
    archive.write_bytes(tar(member("f", b"1")))
    with open(archive, "ab") as file:
        file.truncate(1 << 40)
    parent = subprocess.Popen([sys.executable, "-c", script, archive, target])
    until(lambda: (target / "f").exists(), "it extracts")
    assert find(f"{sys.executable} -s -P -m insula.image.worker")
    parent.kill()
    parent.wait()
    until(lambda: not find(f"{sys.executable} -s -P -m insula.image.worker"), "the worker is gone")
