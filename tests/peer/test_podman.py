"""Features of podman only: user namespaces, pods, attach, health checks on demand."""

from __future__ import annotations

import pytest

from insula.kernel import criu
from insula.model.errors import Unavailable
from tests.support.peers import IMAGE, Engine
from tests.support.wait import until

NAME = "pea"


def test_a_user_namespace(podman: Engine) -> None:
    script = "id -u; cat /proc/self/uid_map; touch /tmp/file && stat -c %u /tmp/file /bin/busybox"
    result = podman.run("run", "--rm", "--uidmap=0:100000:5000", IMAGE, "sh", "-c", script)
    assert result.out.split() == ["0", "0", "100000", "5000", "0", "0"], result


def test_attach(podman: Engine) -> None:
    podman.ok("run", "-d", "-i", "--name", NAME, IMAGE, "sh", "-c", "read line; echo got $line; exit 8")
    assert "got hello" in podman.run("attach", NAME, stdin="hello\n").out
    assert podman.ok("wait", NAME) == "8"


def test_health_check(podman: Engine) -> None:
    options = ("--health-cmd=test -e /tmp/well", "--health-interval=disable")
    podman.ok("run", "-d", "--name", NAME, *options, IMAGE, "sleep", "1000")
    assert podman.run("healthcheck", "run", NAME).status == 1
    podman.ok("exec", NAME, "touch", "/tmp/well")
    assert podman.run("healthcheck", "run", NAME).status == 0


def test_logs_follow(podman: Engine) -> None:
    podman.ok("run", "-d", "--name", NAME, IMAGE, "sh", "-c", "echo one; sleep 0.5; echo two")
    assert podman.ok("logs", "-f", NAME) == "one\ntwo"


def test_an_own_cgroup_and_none(podman: Engine) -> None:
    script = "cat /proc/self/cgroup"
    own = podman.ok("run", "--rm", "--cgroupns=host", IMAGE, "sh", "-c", script)
    assert f"{podman.parent}/libpod-" in own
    inside = podman.ok("run", "--rm", "--cgroupns=private", IMAGE, "sh", "-c", script)
    assert podman.parent not in inside


def test_restart_policy(podman: Engine) -> None:
    podman.ok("run", "-d", "--name", NAME, "--restart=on-failure:2", IMAGE, "sh", "-c", "echo try; exit 1")
    until(lambda: podman.ok("logs", NAME).count("try") == 3, "it is tried three times")


def test_checkpoint_and_restore(podman: Engine) -> None:
    try:
        criu.find()
    except Unavailable as problem:
        pytest.skip(problem.message)
    script = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.05; done"
    podman.ok("run", "-d", "--name", NAME, IMAGE, "sh", "-c", script)
    until(lambda: "5" in podman.ok("logs", NAME).split(), "it counts")
    podman.ok("container", "checkpoint", NAME)
    assert podman.ok("inspect", "--format={{.State.Status}}", NAME) == "exited"
    last = int(podman.ok("logs", NAME).split()[-1])
    podman.ok("container", "restore", NAME)
    until(lambda: str(last + 5) in podman.ok("logs", NAME).split(), "it counts on")
    assert podman.ok("logs", NAME).split().count("1") == 1
