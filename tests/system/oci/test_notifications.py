"""sd_notify(3): messages of a container to NOTIFY_SOCKET, and the messages that the supervisor gets."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.supervisor import Supervisor, send
from tests.support.wait import patiently, until
from tests.system.oci.conftest import NAME, Box


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    made = Supervisor(tmp_path / "supervisor")
    yield made
    made.close()


Begin = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def begin(box: Box, supervisor: Supervisor) -> Iterator[Begin]:
    """Run a command of insula-oci that may wait, with NOTIFY_SOCKET."""
    begun: list[subprocess.Popen[bytes]] = []

    def begin(*words: object, address: str = str(supervisor.path)) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "NOTIFY_SOCKET": address}
        with (box.path / "output").open("ab") as output:
            command = box.oci.command(*words)
            begun.append(
                subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
            )
        return begun[-1]

    yield begin
    box.oci.run("delete", "--force", NAME)
    for each in begun:
        each.kill()
        each.wait()


def pid_of(box: Box) -> int:
    """The PID of the container's first process, once it runs."""
    until(lambda: box.oci.run("state", NAME).status == 0 and box.oci.status(NAME) == "running", "it runs")
    pid: int = box.oci.json("state", NAME)["pid"]
    return pid


def address_inside(box: Box) -> str:
    until(lambda: "NOTIFY_SOCKET=" in box.output, "the container tells its address")
    return box.output.split("NOTIFY_SOCKET=")[1].split()[0]


SCRIPT = "echo NOTIFY_SOCKET=$NOTIFY_SOCKET; exec sleep 600"


def test_a_start_waits_until_the_container_is_ready(box: Box, begin: Begin, supervisor: Supervisor) -> None:
    box.script(SCRIPT)
    assert begin("create", "--bundle", box.path, NAME).wait(patiently(30)) == 0
    starting = begin("start", NAME)
    pid = pid_of(box)
    path = address_inside(box)
    assert path == f"{supervisor.path}/notify"
    assert send(pid, path, "STATUS=loading", "MAINPID=1", "READY=0", "XREADY=1", "READY=1x").returncode == 0
    assert box.oci.status(NAME) == "running", "others can look at it meanwhile"
    assert starting.poll() is None and not supervisor.hears()
    assert send(pid, path, "STATUS=ready\nREADY=1\nMAINPID=1", uid=1000).returncode == 0
    assert supervisor.receive() == (f"READY=1\nMAINPID={pid}\n", [])
    message, [barrier] = supervisor.receive()
    assert message == "BARRIER=1"
    assert starting.poll() is None, "it waits until this was received"
    os.close(barrier)
    assert starting.wait(patiently(30)) == 0
    assert not supervisor.hears()
    assert "Connection refused" in send(pid, path, "READY=1").stderr, "nobody reads any more"


@pytest.mark.parametrize("detach", [True, False])
def test_run_waits_until_the_container_is_ready(box: Box, begin: Begin, supervisor: Supervisor, detach: bool) -> None:
    """In the foreground it is `run` itself that a supervisor watches."""
    box.script(SCRIPT)
    running = begin("run", "--bundle", box.path, *(["--detach"] if detach else []), NAME)
    pid = pid_of(box)
    path = address_inside(box)
    assert send(pid, path, "STATUS=loading").returncode == 0
    assert send(pid, path, "READY=1").returncode == 0
    assert supervisor.receive() == (f"READY=1\nMAINPID={pid if detach else running.pid}\n", [])
    message, [barrier] = supervisor.receive()
    os.close(barrier)
    assert message == "BARRIER=1"
    if not detach:
        assert running.poll() is None
        running.terminate()
        until(lambda: box.oci.run("kill", NAME, "KILL").status == 0, "it is killed")
    assert running.wait(patiently(30)) == (0 if detach else 137)


@pytest.mark.parametrize("verb", ["start", "run"])
def test_the_wait_ends_with_the_container(box: Box, begin: Begin, supervisor: Supervisor, verb: str) -> None:
    box.script("exec sleep 600")
    if verb == "start":
        assert begin("create", "--bundle", box.path, NAME).wait(patiently(30)) == 0
        waiting = begin("start", NAME)
    else:
        waiting = begin("run", "--detach", "--bundle", box.path, NAME)
    pid_of(box)
    assert waiting.poll() is None
    box.oci.ok("kill", NAME, "KILL")
    assert waiting.wait(patiently(30)) == 0
    assert not supervisor.hears()


def test_a_signal_ends_the_wait_and_not_the_container(box: Box, begin: Begin) -> None:
    box.script("exec sleep 600")
    assert begin("create", "--bundle", box.path, NAME).wait(patiently(30)) == 0
    starting = begin("start", NAME)
    pid_of(box)
    starting.terminate()
    assert starting.wait(patiently(30)) == -15
    assert box.oci.status(NAME) == "running"


@pytest.mark.parametrize(
    ("address", "inside"),
    [
        ("/run/systemd/notify", "/run/notify/notify"),
        ("@abstract/socket", "/run/notify/notify"),
        ("/tmp/a/../b//c", "/tmp/b/c/notify"),
        ("/", "/run/notify/notify"),
    ],
)
def test_the_address_of_the_socket_inside(box: Box, begin: Begin, address: str, inside: str) -> None:
    """Another address is used where it is that of a systemd inside, or has no path. The config's own is replaced."""
    box.process["env"] = ["PATH=/bin", "NOTIFY_SOCKET=/elsewhere"]
    box.script(f"env | grep -c ^NOTIFY_SOCKET; echo $NOTIFY_SOCKET; test -S {inside} && echo there")
    assert begin("run", "--bundle", box.path, NAME, address=address).wait(patiently(30)) == 0
    assert box.output.splitlines() == ["1", inside, "there"]


def test_without_a_supervisor(box: Box, begin: Begin) -> None:
    """Nothing of it is in the container; an address of another kind counts as none."""
    box.script("echo ${NOTIFY_SOCKET-none}; test -e /run/notify || echo absent")
    for address in ("", "vsock:2:1", "relative"):
        assert begin("run", "--bundle", box.path, NAME, address=address).wait(patiently(30)) == 0
    assert box.output.split() == ["none", "absent"] * 3


def test_a_start_without_a_supervisor(box: Box, begin: Begin) -> None:
    """Only `create` had one: `start` does not wait, and no process reads."""
    box.script(SCRIPT)
    assert begin("create", "--bundle", box.path, NAME).wait(patiently(30)) == 0
    box.oci.ok("start", NAME)
    assert "Connection refused" in send(pid_of(box), address_inside(box), "READY=1").stderr


def test_a_supervisor_that_is_gone(box: Box, begin: Begin, supervisor: Supervisor) -> None:
    """The container runs; a warning says that the supervisor could not be notified."""
    box.script(SCRIPT)
    supervisor.close()
    running = begin("run", "--detach", "--bundle", box.path, NAME)
    pid = pid_of(box)
    assert send(pid, address_inside(box), "READY=1").returncode == 0
    assert running.wait(patiently(30)) == 0
    assert "warning: NOTIFY_SOCKET: Connection refused" in box.output
    assert box.oci.status(NAME) == "running"


def test_the_directory_has_room_for_nothing_else(box: Box, begin: Begin) -> None:
    """Even where it is made writable: it is a tmpfs of the container, and no directory of the host."""
    box.process["capabilities"] = {
        kind: ["CAP_SYS_ADMIN", "CAP_DAC_OVERRIDE"] for kind in ("bounding", "effective", "permitted")
    }
    box.script(
        'cd $(dirname $NOTIFY_SOCKET); grep -c " $PWD tmpfs ro,nosuid,nodev,noexec" /proc/mounts; echo x > file;'
        "mount -o remount,rw $PWD; echo x > file; rm notify; echo x > file; ls"
    )
    running = begin("run", "--bundle", box.path, NAME, address="@here")
    assert running.wait(patiently(30)) == 0, box.output
    lines = box.output.splitlines()
    assert lines[0] == "1"
    assert [line.split(": ")[-1] for line in lines[1:]] == ["Read-only file system", *["No space left on device"] * 2]


def test_with_a_user_namespace_and_a_read_only_root(box: Box, begin: Begin, supervisor: Supervisor) -> None:
    box.map_ids((0, 100000, 65536))
    box.config["root"]["readonly"] = True
    box.script(SCRIPT)
    running = begin("run", "--detach", "--bundle", box.path, NAME, address=str(supervisor.path))
    pid = pid_of(box)
    assert send(pid, address_inside(box), "READY=1", uid=101000).returncode == 0
    assert supervisor.receive()[0] == f"READY=1\nMAINPID={pid}\n"
    os.close(supervisor.receive()[1][0])
    assert running.wait(patiently(30)) == 0
