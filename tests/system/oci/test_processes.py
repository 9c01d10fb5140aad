"""The process of a container: terminal, descriptors, limits; and processes that join by exec."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.wait import patiently, until
from tests.system.oci.conftest import NAME, Box, ConsoleSocket

BASE = 0x50000000


def read_until(master: int, wanted: str) -> None:
    """Read a terminal byte by byte until it has shown `wanted`."""
    seen, deadline = "", time.monotonic() + patiently(20)
    while not seen.endswith(wanted):
        ready, _, _ = select.select([master], [], [], max(0, deadline - time.monotonic()))
        assert ready, f"no {wanted!r} in {seen!r}"
        try:
            data = os.read(master, 1)
        except OSError:  # EIO: nobody has the other side open
            data = b""
        assert data, f"the end, and no {wanted!r} in {seen!r}"
        seen += data.decode("latin-1")


# -- terminals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("user", [False, True])
def test_a_terminal_is_sent_to_the_console_socket(box: Box, console: ConsoleSocket, user: bool) -> None:
    if user:
        box.map_ids((0, BASE, 65536))
    box.process |= {"terminal": True, "consoleSize": {"height": 33, "width": 77}}
    box.script("tty; stty size; read line; echo got $line; test -c /dev/console && echo console; exec sleep 600")
    box.oci.ok("create", "--console-socket", console.path, "--bundle", box.path, NAME)
    master = console.receive()
    try:
        box.oci.ok("start", NAME)
        read_until(master, "/dev/pts/0")
        read_until(master, "33 77")
        os.write(master, b"hello\n")
        read_until(master, "got hello")
        read_until(master, "console")
    finally:
        os.close(master)


def test_ctrl_c_reaches_the_program(box: Box, console: ConsoleSocket) -> None:
    box.process["terminal"] = True
    box.script("trap 'echo interrupted; exit 0' INT; echo ready; while :; do sleep 0.1; done")
    box.oci.ok("run", "--detach", "--console-socket", console.path, "--bundle", box.path, NAME)
    master = console.receive()
    try:
        read_until(master, "ready")
        os.write(master, b"\x03")
        read_until(master, "interrupted")
    finally:
        os.close(master)


def in_terminal(*command: str, rows: int = 30, columns: int = 90) -> tuple[subprocess.Popen[bytes], int]:
    """A command in a terminal of the test's: the process, and the terminal's other end."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
    os.close(slave)
    return process, master


def test_run_in_a_terminal(box: Box) -> None:
    """Its size is ours, keys go through, and ours is as before at the end."""
    box.process["terminal"] = True
    box.script("stty size; read line; echo got $line; exit 4")
    process, master = in_terminal(*box.oci.command("run", "--bundle", box.path, NAME))
    before = termios.tcgetattr(master)
    try:
        read_until(master, "30 90")
        fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("4H", 31, 91, 0, 0))
        os.write(master, b"hello\r")
        read_until(master, "got hello")
        assert process.wait(patiently(20)) == 4
        assert termios.tcgetattr(master)[3] == before[3]
    finally:
        os.close(master)


def test_exec_in_a_terminal(box: Box) -> None:
    box.start()
    process, master = in_terminal(*box.oci.command("exec", "--tty", NAME, "sh", "-c", "tty; exit 6"))
    try:
        read_until(master, "/dev/pts/0")
        assert process.wait(patiently(20)) == 6
    finally:
        os.close(master)


def test_lines_of_a_terminal_stay_as_they_are(box: Box) -> None:
    """The reader may be a pipe. From the first line on: the program may write before the terminal is sent."""
    box.start()

    def said(script: str) -> bytes:
        command = box.oci.command("exec", "--tty", NAME, "sh", "-c", script)
        return subprocess.check_output(command, stdin=subprocess.DEVNULL)

    for _ in range(10):
        assert said("echo one; echo two") == b"one\ntwo\n"
    assert said("stty onlcr; echo one") == b"one\r\n", "the control"


def test_a_detached_terminal_without_console_socket_is_refused(box: Box, console: ConsoleSocket) -> None:
    box.process["terminal"] = True
    box.script("true")
    assert "--console-socket" in box.oci.fails("create", "--bundle", box.path, NAME)
    missing = box.path / "nobody.sock"
    command = ("create", "--console-socket", missing, "--bundle", box.path, NAME)
    assert str(missing) in box.oci.fails(*command)
    box.process["terminal"] = False
    box.script("true")
    assert "no terminal" in box.oci.fails("create", "--console-socket", console.path, "--bundle", box.path, NAME)
    assert box.left() == []


# -- descriptors and attributes ----------------------------------------------------------------------------------------


def run_with(box: Box, descriptors: list[int], *words: object, before: str = "A=1") -> str:
    """Run with these as descriptors 3, 4, …, and with variables that the shell sets `before`; the output."""
    command = box.oci.command(*words)
    redirections = " ".join(f"{3 + index}<&{fd}" for index, fd in enumerate(descriptors))
    shell = ["bash", "-c", f'export {before}; exec "$@" {redirections}', "bash", *command]
    done = subprocess.run(shell, pass_fds=descriptors, capture_output=True, text=True, timeout=patiently(30))
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


def test_preserved_descriptors_and_no_others(box: Box) -> None:
    opened = [os.memfd_create(f"fd{number}") for number in range(3)]
    for number, fd in enumerate(opened):
        os.write(fd, f"content {number}\n".encode())
        os.lseek(fd, 0, os.SEEK_SET)
    box.script("cat <&3; cat <&4; ls /proc/self/fd | tr '\\n' ' '")
    words = ("run", "--preserve-fds", "2", "--bundle", box.path, NAME)
    assert run_with(box, opened, *words).split("\n") == ["content 0", "content 1", "0 1 2 3 4 5 "]
    box.script("ls /proc/self/fd | tr '\\n' ' '")
    assert run_with(box, opened, "run", "--bundle", box.path, NAME) == "0 1 2 3 "
    for fd in opened:
        os.close(fd)


def test_descriptors_that_are_not_open(box: Box) -> None:
    """None of the runtime's own comes in their place."""
    box.script("exec ls /proc/self/fd")
    with open("/dev/null") as null:
        words = ["bash", "-c", f'exec "$@" 3<&{null.fileno()}', "bash"]
        words += box.oci.command("run", "--preserve-fds", "50", "--bundle", box.path, NAME)
        done = subprocess.run(words, pass_fds=[null.fileno()], capture_output=True, text=True, timeout=patiently(30))
    assert (done.returncode, done.stdout.split()) == (0, ["0", "1", "2", "3", "4"])  # 4 is the directory
    assert done.stderr == "warning: --preserve-fds: descriptor 4 is not open: 1 are passed on of 50\n"
    assert "there can't be" in box.refused("--preserve-fds", "100000")


def test_sockets_of_systemd(box: Box) -> None:
    """LISTEN_FDS of our environment is the container's too (sd_listen_fds(3))."""
    with socket.socket() as listener:
        box.script("echo $LISTEN_FDS $LISTEN_PID; readlink /proc/self/fd/3")
        words = ("run", "--bundle", box.path, NAME)
        found = run_with(box, [listener.fileno()], *words, before="LISTEN_FDS=1 LISTEN_PID=$$").split()
        assert found[:2] == ["1", "1"] and found[2].startswith("socket:")
        # not for us: those of a process that left its environment to us, or of nobody
        box.script("echo ${LISTEN_FDS-none} ${LISTEN_PID-none}; ls /proc/self/fd | wc -w")
        for before in ("LISTEN_FDS=1 LISTEN_PID=1", "LISTEN_FDS=1"):
            assert run_with(box, [listener.fileno()], *words, before=before).split() == ["none", "none", "4"]
        assert run_with(box, [], *words, before="LISTEN_FDS=1").split()[0] == "none"


def test_attributes(box: Box) -> None:
    box.process |= {
        "cwd": "/tmp",
        "user": {"uid": 1234, "gid": 567, "additionalGids": [8, 9], "umask": 0o27},
        "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 55, "hard": 66}],
        "oomScoreAdj": 500,
        "env": ["PATH=/bin", "A=b=c d"],
    }
    script = 'pwd; id -u; id -G; umask; ulimit -n; ulimit -Hn; cat /proc/self/oom_score_adj; echo "$A"'
    assert box.out(script).splitlines() == ["/tmp", "1234", "567 8 9", "0027", "55", "66", "500", "b=c d"]


def test_pid_files(box: Box) -> None:
    pid_file = box.path / "pid"
    box.create("exec sleep 600", "--pid-file", pid_file)
    assert pid_file.read_text() == str(box.oci.json("state", NAME)["pid"])
    box.oci.ok("start", NAME)
    box.oci.ok("exec", "--detach", "--pid-file", pid_file, NAME, "sleep", "600")
    inside = int(pid_file.read_text())
    until(lambda: Path(f"/proc/{inside}/cmdline").read_bytes() == b"sleep\x00600\x00", "it runs its program")
    assert inside in box.oci.json("ps", "--format", "json", NAME)


@pytest.mark.parametrize("option", [(), ("--no-new-keyring",)])
def test_the_session_keyring(box: Box, option: tuple[str, ...]) -> None:
    """A user other than its owner sees a keyring only while it is in that user's session (keyrings(7))."""
    box.process["user"] = {"uid": 1000, "gid": 1000}
    box.linux["maskedPaths"] = []
    box.script("cat /proc/keys")
    command = box.oci.command("run", *option, "--bundle", box.path, NAME)
    enter = "import os, sys; from insula.kernel.syscalls import join_session_keyring as join; join('ours')"
    enter += "; os.execv(sys.argv[1], sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", enter, *command], capture_output=True, text=True, timeout=patiently(30)
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert ("ours: empty" in done.stdout) is bool(option)


# -- exec --------------------------------------------------------------------------------------------------------------


def test_exec_has_the_attributes_of_the_container(box: Box) -> None:
    box.process["user"] = {"uid": 1000, "gid": 1000}
    box.process |= {"env": ["PATH=/bin", "A=b"], "cwd": "/tmp"}
    box.start()
    result = box.oci.run("exec", NAME, "sh", "-c", "pwd; id -u; echo $A; cat; exit 9", input="in\n")
    assert (result.status, result.out, result.err) == (9, "/tmp\n1000\nb\nin\n", "")


def test_options_of_exec(box: Box) -> None:
    box.start()
    words = ["--user", "5:6", "--additional-gids", "7", "--cwd", "/bin", "--env", "A=new", "--cap", "CAP_NET_RAW"]
    script = "id -u; id -G; pwd; echo $A; grep CapBnd /proc/self/status"
    found = box.oci.ok("exec", *words, NAME, "sh", "-c", script).splitlines()
    assert found[:4] == ["5", "6 7", "/bin", "new"]
    assert int(found[4].split()[1], 16) >> 13 & 1
    plain = box.oci.ok("exec", NAME, "grep", "CapBnd", "/proc/self/status")
    assert not int(plain.split()[1], 16) >> 13 & 1


def test_exec_of_a_file(box: Box) -> None:
    box.start()
    what: dict[str, Any] = {"args": ["sh", "-c", "echo $A; id -u"], "env": ["PATH=/bin", "A=b"], "cwd": "/"}
    (box.path / "process.json").write_text(json.dumps({**what, "user": {"uid": 3, "gid": 3}}))
    assert box.oci.ok("exec", "--process", box.path / "process.json", NAME).split() == ["b", "3"]
    (box.path / "process.json").write_text(json.dumps({**what, "cwd": "tmp"}))
    assert "process.cwd" in box.oci.fails("exec", "--process", box.path / "process.json", NAME)


def test_exec_with_console_socket(box: Box, console: ConsoleSocket) -> None:
    box.start()
    box.oci.ok("exec", "--detach", "--tty", "--console-socket", console.path, NAME, "sh", "-c", "tty; read x; echo =$x")
    master = console.receive()
    try:
        read_until(master, "/dev/pts/0")
        os.write(master, b"y\n")
        read_until(master, "=y")
    finally:
        os.close(master)


@pytest.mark.parametrize(
    ("program", "words"),
    [("nowhere", 'exec: "nowhere": executable file not found in $PATH'), ("/tmp", "exec /tmp: permission denied")],
)
def test_wrong_arguments_of_exec_are_refused(box: Box, program: str, words: str) -> None:
    """The exit status is no program's, but the one of runc-exec(8)."""
    pid = box.start()
    result = box.oci.run("exec", NAME, program)
    assert (result.status, result.out) == (255, "")
    assert result.err.startswith(f"error: {words}") and result.err.count("\n") == 1
    assert box.oci.json("ps", "--format", "json", NAME) == [pid]


def test_exec_in_a_paused_container(box: Box) -> None:
    box.start()
    box.oci.ok("pause", NAME)
    assert "paused" in box.oci.fails("exec", NAME, "true")
    waiting = box.oci.start("exec", "--ignore-paused", NAME, "echo", "thawed")
    until(lambda: len(box.oci.json("ps", "--format", "json", NAME)) > 1, "it is in the group")
    assert waiting.poll() is None
    box.oci.ok("resume", NAME)
    assert waiting.communicate(timeout=patiently(20))[0] == "thawed\n"


def test_exec_is_in_the_group(box: Box) -> None:
    """So its memory and processes count, and nothing of it outlives the container."""
    box.start()
    box.oci.ok("exec", "--detach", NAME, "sleep", "600")
    pids = box.oci.json("ps", "--format", "json", NAME)
    assert len(pids) == 2
    box.oci.ok("delete", "--force", NAME)
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), "both have ended")


def test_exec_sees_no_more_than_the_container(box: Box) -> None:
    """No descriptor or directory of the host's (CVE-2024-21626)."""
    box.start()
    found = box.oci.ok("exec", NAME, "sh", "-c", "ls /proc/self/fd | wc -w; pwd; readlink /proc/self/exe; ls /")
    assert found.split()[:3] == ["4", "/", "/bin/sh"]
    assert "usr" not in found.split()
    for directory in ("/proc/self/fd/3", "/proc/self/fd/7", "/proc/1/cwd/../../../.."):
        result = box.oci.run("exec", "--cwd", directory, NAME, "sh", "-c", "ls -d usr home")
        assert result.status != 0 and result.out == ""


def test_lines_of_a_terminal_that_goes_to_a_pipe(box: Box) -> None:
    """As with runc: the end of a line is what the program wrote; where ours is a terminal, that makes it two bytes."""
    box.process["terminal"] = True
    assert box.run("tty; echo one; echo two").out == "/dev/pts/0\none\ntwo\n"
    process, master = in_terminal(*box.oci.command("run", "--bundle", box.path, NAME))
    try:
        read_until(master, "/dev/pts/0\r\none\r\ntwo\r\n")
        assert process.wait(patiently(20)) == 0
    finally:
        os.close(master)


def test_an_empty_home_is_none(box: Box) -> None:
    (box.rootfs / "etc").mkdir(exist_ok=True)
    (box.rootfs / "etc/passwd").write_text("root:x:0:0::/home/of/root:/bin/sh\n")
    for env, home in ((["HOME="], "/home/of/root"), ([], "/home/of/root"), (["HOME=/x"], "/x")):
        box.process["env"] = ["PATH=/bin", *env]
        assert box.out("echo $HOME") == f"{home}\n"


def test_a_capability_that_exec_adds_is_ambient_where_it_is_inheritable(box: Box) -> None:
    box.process["capabilities"] = {
        "bounding": ["CAP_CHOWN", "CAP_KILL", "CAP_SYSLOG"],
        "permitted": ["CAP_CHOWN", "CAP_KILL"],
        "effective": ["CAP_CHOWN", "CAP_KILL"],
        "inheritable": ["CAP_CHOWN", "CAP_SYSLOG"],
        "ambient": ["CAP_CHOWN"],
    }
    box.start()
    found = box.oci.ok("exec", "--cap", "CAP_SYSLOG", "--cap", "CAP_KILL", NAME, "grep", "^Cap", "/proc/self/status")
    sets = {name.rstrip(":"): int(mask, 16) for name, mask in (line.split() for line in found.splitlines())}
    assert sets["CapInh"] == 1 << 34 | 1 and sets["CapAmb"] == 1 << 34 | 1
    assert sets["CapPrm"] == sets["CapEff"] == sets["CapBnd"] == 1 << 34 | 1 << 5 | 1


def test_a_pidfd_is_sent_on_request(box: Box, console: ConsoleSocket) -> None:
    """The pidfd of the container's process by create and run, of the new process by exec."""
    box.create("exec sleep 600", "--pidfd-socket", console.path)
    pidfd = console.receive()
    box.oci.ok("start", NAME)
    assert f"Pid:\t{box.oci.json('state', NAME)['pid']}\n" in Path(f"/proc/self/fdinfo/{pidfd}").read_text()
    box.oci.ok("exec", "--detach", "--pidfd-socket", console.path, NAME, "sleep", "601")
    other = console.receive()
    signal.pidfd_send_signal(other, signal.SIGKILL)
    until(lambda: "601" not in box.oci.ok("exec", NAME, "ps"), "the second has ended")
    assert box.oci.status(NAME) == "running"
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    until(lambda: box.oci.status(NAME) == "stopped", "the container has ended")
    missing = box.path / "nobody.sock"
    box.oci.ok("delete", NAME)
    assert f"--pidfd-socket {missing}" in box.refused("--pidfd-socket", missing)
    os.close(pidfd)
    os.close(other)
