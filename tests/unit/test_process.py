"""`insula.kernel.process` about processes of this host, among them one whose main thread has exited."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from insula.kernel import process
from tests.support import elf
from tests.support.wait import until


@pytest.fixture
def leader_gone(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    if platform.machine() != elf.ONLY:
        pytest.skip(f"the program is machine code for {elf.ONLY}")
    program = tmp_path / "program"
    program.write_bytes(elf.leader_gone())
    program.chmod(0o755)
    child = subprocess.Popen([program])
    try:
        until(lambda: state(child.pid) == "Z", "its main thread has exited")
        yield child
    finally:
        child.kill()
        child.wait()


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_process_lives_as_long_as_one_of_its_threads(leader_gone: subprocess.Popen[bytes]) -> None:
    pid, started = leader_gone.pid, process.start_time(leader_gone.pid)
    assert started
    assert process.is_alive(pid, started)
    assert not process.is_alive(pid, started + 1), "another process of that number"
    leader_gone.kill()
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # it has ended, and is not reaped
    assert state(pid) == "Z"
    assert not process.is_alive(pid, started)
    leader_gone.wait()
    assert not process.is_alive(pid, started)


def test_its_namespaces_are_those_of_a_thread_that_runs(leader_gone: subprocess.Popen[bytes]) -> None:
    pid, started = leader_gone.pid, process.start_time(leader_gone.pid)
    with pytest.raises(FileNotFoundError):
        os.stat(f"/proc/{pid}/ns/net")
    fd = process.open_namespace(pid, started, "net")
    assert os.path.samestat(os.fstat(fd), os.stat("/proc/self/ns/net"))
    os.close(fd)
    assert os.path.samestat(os.stat(f"{process.directory(pid)}/root"), os.stat("/"))
    assert process.directory(os.getpid()) == f"/proc/{os.getpid()}"


def test_of_a_process_that_is_gone_nothing_is_opened() -> None:
    child = subprocess.Popen(["true"])
    started = process.start_time(child.pid)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not process.is_alive(child.pid, started)
    with pytest.raises((FileNotFoundError, ProcessLookupError)):
        process.open_namespace(child.pid, started, "net")
    child.wait()
    for opening in (process.open_process, process.open_to_join):
        with pytest.raises(ProcessLookupError):
            opening(child.pid, started)
