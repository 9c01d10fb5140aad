"""create, start, run and delete: the states of a container, refusals, and errors that leave nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from pathlib import Path

import pytest

from tests.support.wait import patiently, until
from tests.system.oci.conftest import NAME, Box


def test_created_is_not_running(box: Box) -> None:
    box.create("echo $$ > /tmp/ran; exec sleep 600")
    state = box.oci.json("state", NAME)
    assert (state["id"], state["status"], state["bundle"]) == (NAME, "created", str(box.path))
    assert not (box.rootfs / "tmp/ran").exists()
    box.oci.ok("start", NAME)
    assert box.oci.status(NAME) == "running"
    until(lambda: (box.rootfs / "tmp/ran").exists() and (box.rootfs / "tmp/ran").read_text() == "1\n", "it is PID 1")


def test_started_only_once(box: Box) -> None:
    box.start()
    assert "cannot start an already running container" in box.oci.fails("start", NAME)
    assert box.oci.status(NAME) == "running"


def test_two_starts_at_once(box: Box) -> None:
    box.create("echo x >> /tmp/ran; exec sleep 600")
    statuses: list[int] = []
    threads = [threading.Thread(target=lambda: statuses.append(box.oci.run("start", NAME).status)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(statuses) == [0, 1, 1, 1]
    until(lambda: (box.rootfs / "tmp/ran").read_text() == "x\n", "it ran once")


def test_an_id_is_taken_until_it_is_deleted(box: Box) -> None:
    box.create()
    assert "container with given ID already exists" in box.oci.fails("create", "--bundle", box.path, NAME)
    assert box.oci.status(NAME) == "created"
    box.oci.ok("delete", NAME)
    assert box.left() == []


def test_a_running_container_is_deleted_by_force_only(box: Box) -> None:
    pid = box.start()
    assert "not stopped" in box.oci.fails("delete", NAME)
    assert Path(f"/proc/{pid}").exists()
    box.oci.ok("delete", "--force", NAME)
    assert box.left() == []
    assert "container does not exist" in box.oci.fails("delete", NAME)
    box.oci.ok("delete", "--force", NAME)


def test_a_paused_container_is_deleted_by_force(box: Box) -> None:
    box.start()
    box.oci.ok("pause", NAME)
    assert "not stopped: paused" in box.oci.fails("delete", NAME)
    box.oci.ok("delete", "--force", NAME)
    assert box.left() == []


def test_a_stopped_container_stays_until_it_is_deleted(box: Box) -> None:
    box.start("exit 3")
    until(lambda: box.oci.status(NAME) == "stopped", "it ended")
    assert "cannot start a container that has stopped" in box.oci.fails("start", NAME)
    assert "not running" in box.oci.fails("exec", NAME, "true")
    box.oci.ok("delete", NAME)
    assert box.left() == []


def test_kill_reaches_a_created_one(box: Box) -> None:
    box.create()
    box.oci.ok("kill", NAME, "KILL")
    until(lambda: box.oci.status(NAME) == "stopped", "it is dead")


@pytest.mark.parametrize("number", ["HUP", "INT", "QUIT", "TERM"])
def test_fatal_signals_end_a_created_container(box: Box, number: str) -> None:
    """Process 1 of a PID namespace gets a signal only if it handles it."""
    box.create("touch /tmp/ran")
    box.oci.ok("kill", NAME, "WINCH")
    assert box.oci.status(NAME) == "created", "the control"
    box.oci.ok("kill", NAME, number)
    until(lambda: box.oci.status(NAME) == "stopped", "it has ended")
    assert "cannot start a container that has stopped" in box.oci.fails("start", NAME)
    assert not (box.rootfs / "tmp/ran").exists()
    box.oci.ok("delete", NAME)
    assert box.left() == []


def test_the_program_has_the_default_actions(box: Box) -> None:
    """Whatever the process did with signals while it waited for start."""
    box.process["args"] = ["/bin/grep", "-E", "Sig(Cgt|Ign|Blk)", "/proc/self/status"]  # a shell has its own
    box.write(box.config)
    with (box.path / "output").open("w") as output:
        command = box.oci.command("create", "--bundle", box.path, NAME)
        subprocess.run(command, stdin=subprocess.DEVNULL, stdout=output, timeout=patiently(30), check=True)
    box.oci.ok("start", NAME)
    until(lambda: box.output.count("\n") == 3, "it has told")
    masks = {name: int(mask, 16) for name, mask in (line.split(":") for line in box.output.splitlines())}
    ending = sum(1 << (number - 1) for number in (1, 2, 3, 15))
    assert not any(mask & ending for mask in masks.values()), masks


@pytest.mark.parametrize(("script", "status"), [("exit 0", 0), ("exit 7", 7), ("kill -KILL $PPID; exit 9", 9)])
def test_run_ends_as_its_process(box: Box, script: str, status: int) -> None:
    result = box.run(script)
    assert (result.status, result.out, result.err) == (status, "", "")
    assert box.left() == []


def test_run_forwards_signals(box: Box) -> None:
    box.script("trap 'exit 5' TERM; echo ready; while :; do sleep 0.1; done")
    running = box.oci.start("run", "--bundle", box.path, NAME)
    assert running.stdout and running.stdout.readline() == "ready\n"
    running.send_signal(signal.SIGTERM)
    assert running.wait(patiently(20)) == 5
    assert box.left() == []
    running.stdout.close()


def test_run_whose_process_is_killed(box: Box) -> None:
    box.script("echo ready; exec sleep 600")
    running = box.oci.start("run", "--bundle", box.path, NAME)
    assert running.stdout and running.stdout.readline() == "ready\n"
    box.oci.ok("kill", NAME, "KILL")
    assert running.wait(patiently(20)) == 128 + signal.SIGKILL
    running.stdout.close()


def test_run_detached(box: Box) -> None:
    pid_file = box.path / "pid"
    box.script("exec sleep 600")
    box.oci.ok("run", "--detach", "--pid-file", pid_file, "--bundle", box.path, NAME)
    state = box.oci.json("state", NAME)
    assert (state["status"], str(state["pid"])) == ("running", pid_file.read_text())


def test_run_with_keep(box: Box) -> None:
    assert box.run("exit 0", "--keep").status == 0
    assert box.oci.status(NAME) == "stopped"


def test_stdin_and_stdout_are_the_callers(box: Box) -> None:
    box.script("cat; echo err >&2")
    result = box.oci.run("run", "--bundle", box.path, NAME, input="from the caller")
    assert (result.status, result.out, result.err) == (0, "from the caller", "err\n")


def test_streams_belong_to_the_containers_user(box: Box) -> None:
    box.process["user"] = {"uid": 1000, "gid": 1000}
    assert box.out("echo again > /dev/stdout") == "again\n"


def test_closed_standard_streams_are_null(box: Box) -> None:
    box.script("readlink /proc/self/fd/0 > /tmp/fd; ls /proc/self/fd > /tmp/list")
    command = box.oci.command("run", "--bundle", box.path, NAME)
    subprocess.run(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command], check=True, timeout=patiently(30))
    assert (box.rootfs / "tmp/fd").read_text() == "/dev/null\n"
    assert (box.rootfs / "tmp/list").read_text().split() == ["0", "1", "2", "3"]  # 3 is what ls reads


@pytest.mark.parametrize(
    ("program", "mode", "status", "complaint"),
    [
        ("nowhere", None, 127, "executable file not found in $PATH"),
        ("/nowhere", None, 127, "no such file or directory"),
        ("/bin/plain", 0o644, 126, "permission denied"),
        ("/bin/plain", 0o755, 126, "exec format error"),
    ],
)
def test_a_program_that_cannot_be_executed(
    box: Box, program: str, mode: int | None, status: int, complaint: str
) -> None:
    if mode is not None:
        (box.rootfs / program[1:]).write_text("neither a script nor a program")
        (box.rootfs / program[1:]).chmod(mode)
    box.process["args"] = [program]
    box.write(box.config)
    result = box.oci.run("run", "--bundle", box.path, NAME)
    assert (result.status, result.out) == (status, ""), result
    assert complaint in result.err
    assert box.left() == []
    verb = "start" if complaint == "exec format error" else "create"  # what stat(2) can tell, create says already
    if verb == "start":
        box.oci.ok("create", "--bundle", box.path, NAME)
    result = box.oci.run(verb, *(["--bundle", str(box.path)] if verb == "create" else []), NAME)
    assert result.status == status
    assert complaint in result.err
    if verb == "start":
        until(lambda: box.oci.status(NAME) == "stopped", "it is over")
        box.oci.ok("delete", NAME)
    assert box.left() == []


def test_a_failed_create_leaves_nothing(box: Box) -> None:
    box.mounts.append({"destination": "/x", "type": "nosuchfs", "source": "x"})
    assert "mount /x" in box.refused()


def test_a_group_with_processes_is_not_shared(box: Box) -> None:
    box.group.create()
    sleeper = subprocess.Popen(["sleep", "600"])
    try:
        for directory in set(box.group.directories().values()):
            Path(f"{directory}/cgroup.procs").write_text(str(sleeper.pid))
        box.script("true")
        assert "container's cgroup is not empty" in box.oci.fails("run", "--bundle", box.path, NAME)
        assert sleeper.poll() is None
    finally:
        sleeper.kill()
        sleeper.wait()
        box.group.remove()


@pytest.mark.parametrize("path", ["/{run}oci/deep/er/box", "relative/{run}", None])
def test_cgroup_paths(box: Box, path: str | None) -> None:
    """An absolute path counts from the hierarchies' mounts, a relative one and none from a group of the runtime."""
    run = box.group.path.split("/")[0].removesuffix("oci")
    name = f"{run}-{NAME}" if path is None else NAME
    box.linux["cgroupsPath"] = wanted = path and path.format(run=run)
    box.without("cgroup")
    box.script("exec sleep 600")
    box.oci.ok("run", "--detach", "--bundle", box.path, name)
    try:
        pid = box.oci.json("state", name)["pid"]
        expected = wanted if wanted and wanted.startswith("/") else f"/insula-oci/{wanted or name}"
        groups = {line.split(":", 2)[1]: line.split(":", 2)[2] for line in cgroup_lines(pid)}
        assert groups.get("pids", groups.get("")) == expected
    finally:
        box.oci.ok("delete", "--force", name)
    for top in ("/sys/fs/cgroup", "/sys/fs/cgroup/pids"):
        for parent in (f"{top}/insula-oci/relative", f"{top}/{run}oci/deep/er", f"{top}/{run}oci/deep"):
            if os.path.isdir(parent):
                for directory in Path("/sys/fs/cgroup").glob(f"*/{parent.removeprefix(top)}"):
                    directory.rmdir()


def cgroup_lines(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cgroup").read_text().splitlines()


def test_without_a_cgroup_manager(box: Box) -> None:
    box.linux.pop("resources")
    box.script("exec sleep 600")
    box.oci.ok("--cgroup-manager", "disabled", "run", "--detach", "--bundle", box.path, NAME)
    assert not box.group.exists()
    assert cgroup_lines(box.oci.json("state", NAME)["pid"]) == cgroup_lines(os.getpid())


def test_the_config_of_a_made_container_is_its_own(box: Box) -> None:
    box.create("echo old > /tmp/ran; exec sleep 600")
    box.script("echo new > /tmp/ran; exec sleep 600")
    box.oci.ok("start", NAME)
    until(lambda: (box.rootfs / "tmp/ran").exists() and (box.rootfs / "tmp/ran").read_text() == "old\n", "it ran")
