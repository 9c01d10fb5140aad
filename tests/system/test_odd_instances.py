"""Instances in legal and rare states: each operation works, or says why it doesn't."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest

from tests.support import elf
from tests.support.cli import Cli
from tests.support.daemon import Daemon
from tests.support.wait import until

DEEP = 'cd /root; i=0; while [ $i -lt 1500 ]; do mkdir d && cd d || exit 9; i=$((i+1)); done; [ "${#PWD}" -gt 3000 ]'


def pid_of(cli: Cli, name: str) -> int:
    [view] = [view for view in cli.json("ps", "-a") if view["instance"]["name"] == name]
    return int(view["status"]["pid"])


def run_program(cli: Cli, name: str, program: bytes, path: Path) -> int:
    """An instance whose PID 1 is that program; its number on the host."""
    path.write_bytes(program)
    path.chmod(0o755)
    cli.ok("run", "-d", "--name", name, "busybox", "sh", "-c", "until [ -e /go ]; do sleep 0.05; done; exec /program")
    cli.ok("cp", path, f"{name}:/program")
    cli.ok("exec", name, "touch", "/go")
    pid = pid_of(cli, name)
    until(lambda: Path(f"/proc/{pid}/cmdline").read_bytes() in (b"/program\0", b""), "it runs the program")
    return pid


@pytest.mark.skipif(platform.machine() != elf.ONLY, reason=f"the program is machine code for {elf.ONLY}")
def test_an_instance_whose_main_thread_has_exited(fresh: Daemon, tmp_path: Path) -> None:
    """/proc shows PID 1 as a zombie, and it runs: insulad starts, adopts it, and does with it what it does with all."""
    cli = fresh.cli
    pid = run_program(cli, "threads", elf.leader_gone(), tmp_path / "program")
    cli.ok("run", "-d", "--name", "usual", "busybox", "sleep", "600")
    until(lambda: "State:\tZ" in Path(f"/proc/{pid}/status").read_text(), "its main thread has exited")
    fresh.kill("insulad")
    fresh.start()
    assert pid_of(cli, "threads") == pid
    assert {view["status"]["state"] for view in cli.json("ps", "-a")} == {"running"}
    assert cli.ok("exec", "threads", "cat", "/etc/hostname") == "threads"
    cli.ok("cp", "threads:/etc/hostname", tmp_path / "hostname")
    assert (tmp_path / "hostname").read_text() == "threads\n"
    assert "passed" in cli.ok("verify")
    assert cli.run("exec", "usual", "ping", "-c", "1", "-W", "20", "threads").status == 0
    explained = cli.json("explain", "threads")
    assert {"net", "mnt", "pid", "user"} <= {each["kind"] for each in explained["namespaces"]}
    cli.ok("pause", "threads")
    cli.ok("unpause", "threads")
    cli.ok("stop", "-t", "0", "threads")
    assert cli.ok("wait", "threads") == "137"
    cli.ok("rm", "threads")
    assert not os.path.exists(f"/proc/{pid}")


def test_directories_nested_without_end(fresh: Daemon) -> None:
    """They go with their instance, also with one that is removed when it ends, and one whose start is repeated."""
    cli = fresh.cli
    for name, options in (("kept", ()), ("fleeting", ("--rm",))):
        cli.ok("run", "-d", "--name", name, *options, "busybox", "sleep", "600")
        cli.ok("exec", name, "sh", "-c", DEEP)
    assert len(os.listdir(fresh.root / "instances")) == 2
    cli.ok("stop", "-t", "0", "fleeting")
    until(lambda: len(os.listdir(fresh.root / "instances")) == 1, "the files of one go")
    fresh.kill("insulad")
    fresh.start()
    cli.ok("rm", "-f", "kept")
    until(lambda: not os.listdir(fresh.root / "instances"), "and those of the other")
    assert not [problem for problem in cli.json("status")["problems"] if "directory" in problem]


def test_a_leftover_of_any_depth_is_swept(fresh: Daemon) -> None:
    """The remains of an interrupted removal are removed at the next start."""
    cli = fresh.cli
    cli.ok("run", "-d", "--name", "deep", "busybox", "sleep", "600")
    cli.ok("exec", "deep", "sh", "-c", DEEP)
    [directory] = (fresh.root / "instances").iterdir()
    cli.ok("stop", "-t", "0", "deep")
    fresh.kill("insulad")
    directory.rename(directory.with_name("0" * 32))
    fresh.start()
    until(lambda: not (fresh.root / "instances" / ("0" * 32)).exists(), "it is swept")
