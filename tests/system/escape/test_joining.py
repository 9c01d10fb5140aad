"""Attacks of a container's root on a process of the host that joins it: `exec` starts Python with the host's rights.

Each attack that runc once fell to: CVE-2016-9962 and CVE-2019-5736 (the joining process's descriptors and program),
CVE-2024-21626 (a working directory through a descriptor that leaked), CVE-2025-31133 and CVE-2025-52565 (/dev/null,
/dev/console and terminals replaced by links).
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from insula.kernel import process, syscalls
from tests.forked import forked
from tests.support.cli import Cli
from tests.support.daemon import Daemon
from tests.support.images import Layout, member, tar
from tests.support.wait import patiently, until
from tests.system.escape.attacks import kernel, processes
from tests.system.escape.cell import IMAGE, Cell
from tests.system.escape.conftest import CellFactory
from tests.system.test_security import pid_of


@pytest.fixture
def web(cli: Cli) -> Cli:
    cli.ok("run", "-d", "--name", "web", "busybox", "sleep", "600")
    return cli


def test_a_joining_process_cannot_be_inspected(cell: Cell) -> None:
    """CVE-2016-9962: `exec` brings a process with the host's rights, descriptors and program. What it holds is looked
    for by readlink, ptrace(2), pidfd_getfd(2) and /proc/PID/mem while it joins, again and again."""
    control = cell.start(processes.spy, 2.5, "/tmp/ready")
    try:
        until(lambda: (cell.upper / "tmp/ready").exists(), "it spies")
        while control.poll() is None:
            cell.cli.ok("exec", cell.name, "true")
    finally:
        got = cell.finish(control).value
    assert any(name.endswith("/busybox") for name in got["exe"]), (
        "the control: it sees PID 1 and the programs after exec"
    )
    assert "ptrace" in got or "mem" in got, "the control: it may trace what the container runs"
    ours = [what for found in got.values() for what in found if "insula" in what or "/site-packages/" in what]
    assert ours == []
    assert not [what for what in got["fd"] if what.startswith("/") and not what.startswith(("/dev/", "/proc/"))]
    assert set(got["root"]) | set(got["cwd"]) <= {"/"}
    assert got["program's file system"] == [str(cell.gets(kernel.device_of, "/bin/busybox"))]
    assert not [name for name in got["exe"] if "memfd" in name or "(deleted)" in name]


def test_a_process_that_shares_the_pid_namespace_cannot_be_inspected(cells: CellFactory, tenant: Cli) -> None:
    """`--pid container:NAME`: a second container is born among the processes of the first. Those that may trace (here
    the tenant gave them CAP_SYS_PTRACE) must find nothing of the host's in it before it becomes its program."""
    host = cells(tenant, "--cap-add", "SYS_PTRACE")
    spy = host.start(processes.spy, 3.0, "/tmp/ready")
    until(lambda: host.cli.run("exec", host.name, "test", "-e", "/tmp/ready").status == 0, "it spies")
    while spy.poll() is None:
        host.cli.ok("run", "--rm", "--pid", f"container:{host.name}", IMAGE, "/bin/true")
    got = host.finish(spy).value
    assert any(name.endswith("/busybox") for name in got["exe"]) and "ptrace" in got, "the control"
    ours = [what for found in got.values() for what in found if "insula" in what or "memfd" in what]
    assert ours == []


def test_a_stopped_joining_process_reveals_nothing(cells: CellFactory, tenant: Cli) -> None:
    """The new process is stopped before it has done anything. For a moment it is still in the host's mount namespace,
    with the host's root as its uid. It must be undumpable from its creation."""
    host = cells(tenant, "--cap-add", "SYS_PTRACE")
    spy = host.start(processes.ambush, 4.0, "/tmp/ready")
    until(lambda: (host.upper / "tmp/ready").exists(), "it waits")
    while spy.poll() is None:
        host.cli.ok("run", "--rm", "--pid", f"container:{host.name}", IMAGE, "/bin/true")
    got = host.finish(spy).value
    assert got["stopped"], "the control: it does stop them"
    ours = [what for found in got.values() for what in found if "insula" in what or "memfd" in what or "opt" in what]
    assert ours == []
    assert set(got.get("root", [])) <= {"/", " ".join(sorted(os.listdir(f"/proc/{host.pid}/root")))}


def test_a_process_that_is_traced_when_it_ends(cell: Cell, neighbour: Cell, daemon: Daemon) -> None:
    """ptrace(2): the tracer gets the end of a process before its parent does. A runtime that waits for one process
    (waitpid) would wait as long as the container likes, and so would all of its clients."""
    tracer = cell.start(processes.trace_and_keep, patiently(30), "/tmp/tracing")
    until(lambda: (cell.upper / "tmp/tracing").exists(), "it traces")
    busy = "i=0; while [ $i -lt 50000 ]; do i=$((i+1)); done"  # a child of its own would be traced too
    victims = [cell.cli.start("exec", cell.name, "sh", "-c", f"{busy}; exit {number}") for number in (7, 8, 9)]
    assert [victim.wait(patiently(20)) for victim in victims] == [7, 8, 9], "it is known how they ended"
    assert tracer.poll() is None and _zombies(daemon), "the control: they can't be waited for yet"
    assert neighbour.answers()
    neighbour.cli.ok("run", "--rm", IMAGE, "/bin/true")
    cell.cli.ok("exec", cell.name, "touch", "/tmp/tracing.stop")
    assert len(cell.finish(tracer).value) >= 3
    until(lambda: not _zombies(daemon), "what is let go is reaped")


def _zombies(daemon: Daemon) -> list[int]:
    """Children of the zygote that have ended."""
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    found = (seen for pid in pids if (seen := process.read(pid)))
    return [seen.pid for seen in found if seen.state == "Z" and seen.parent == daemon.pid("zygote")]


def test_tracing_out_of_a_joined_pid_namespace() -> None:
    """The rule behind the tests above, alone: a process that isn't dumpable can't be traced by its own uid."""

    def child(dumpable: int) -> dict[str, str]:
        reader, writer = os.pipe()
        victim = os.fork()
        if victim == 0:
            os.setresuid(65534, 65534, 65534)
            syscalls.prctl(syscalls.PR_SET_DUMPABLE, dumpable)
            os.write(writer, b"x")
            signal.pause()
        os.read(reader, 1)
        os.setresuid(65534, 65534, 65534)
        found = processes.number_of(victim)
        os.kill(victim, signal.SIGKILL)
        os.waitpid(victim, 0)
        return found

    assert forked(lambda: child(1))["ptrace"] == "", "the control"
    found = forked(lambda: child(0))
    assert (found["ptrace"], found["proc"]) == ("EPERM", "EACCES")


def test_a_working_directory_through_a_descriptor(web: Cli) -> None:
    """CVE-2024-21626: whatever is open while it joins, nothing of it is a directory of the host."""
    for number in range(3, 10):
        for path in (f"/proc/self/fd/{number}", f"/proc/self/fd/{number}/../../..", f"/proc/thread-self/fd/{number}"):
            result = web.run("exec", "-w", path, "web", "sh", "-c", "cd -P . && ls ../../../../../../opt /home/insula")
            assert result.status != 0 and not result.out, (path, result)
    assert web.ok("exec", "-w", "/proc/self/cwd/tmp", "web", "pwd", "-P") == "/tmp", "the control: links as such work"


@pytest.mark.parametrize("target", ["/proc/sysrq-trigger", "/etc/passwd", "/proc/self/fd/3", "/dev/zero"])
def test_a_replaced_dev_null_masks_nothing(web: Cli, target: str) -> None:
    """CVE-2025-31133: it is opened without following links, and must be the device; then exec refuses."""
    web.ok("exec", "web", "true")
    web.ok("exec", "web", "sh", "-c", f"rm /dev/null && ln -s {target} /dev/null")
    assert "connect standard input" in web.fails("exec", "web", "cat", status=125)
    assert web.ok("exec", "-i", "web", "cat", stdin="x") == "x", "the control: with streams of its own it joins"
    web.ok("run", "--rm", "busybox", "sh", "-c", "echo > /dev/null")


def test_replaced_terminals_are_not_followed(web: Cli) -> None:
    """CVE-2025-52565: /dev/console, /dev/ptmx and /dev/tty become links; a terminal comes from devpts all the same."""
    script = "for n in ptmx tty; do rm -f /dev/$n; ln -s /etc/passwd /dev/$n; done; rm -f /dev/console; echo done"
    assert web.ok("exec", "web", "sh", "-c", script).endswith("done")
    before = web.ok("exec", "web", "cat", "/etc/passwd")
    with web.terminal("exec", "-it", "web", "sh", "-c", "echo real-$(tty)") as terminal:
        terminal.expect(r"real-/dev/pts/\d+")
        assert terminal.wait() == 0
    assert web.ok("exec", "web", "cat", "/etc/passwd") == before


def test_a_script_whose_interpreter_is_the_runtime(cli: Cli, tmp_path: Path) -> None:
    """CVE-2019-5736: `#!/proc/self/exe` names the host's Python while it executes; no user inside owns it."""
    layer = tar(
        member("bin"),
        member("bin/busybox", Path("/bin/busybox").read_bytes(), mode=0o755),
        member("bin/sh", linkname="busybox"),
        member("bin/sleep", linkname="busybox"),
        member("bin/again", b"#!/proc/self/exe\n", mode=0o755),
    )
    layout = Layout()
    layout.image([layer], name="again:latest", process={"Cmd": ["/bin/sleep", "600"]})
    (tmp_path / "again.tar").write_bytes(layout.tar())
    cli.ok("image", "load", tmp_path / "again.tar")
    cli.ok("run", "-d", "--name", "again", "again")
    assert cli.run("exec", "again", "/bin/again", "-c", "print(1)").status in (126, 127)
    assert cli.run("exec", "again", "/proc/self/exe", "--version").status == 126
    [mapped] = Path(f"/proc/{pid_of(cli, 'again')}/uid_map").read_text().splitlines()
    assert int(mapped.split()[1]) > 0, "the host's root, whose file it is, is nobody inside"
    assert cli.ok("exec", "again", "/bin/sh", "-c", "echo works") == "works", "the control"
