"""Features of docker only: its bridge, which a hook puts into the container; health checks; copies; events."""

from __future__ import annotations

from tests.support.peers import IMAGE, Engine
from tests.support.wait import until

NAME = "whale"


def test_the_bridge(docker: Engine) -> None:
    """dockerd is called by a prestart hook with the container's state, and moves the interface in."""
    script = "ip -o -4 address show eth0; ping -c 1 -W 20 $(ip route | sed -n 's/^default via \\([^ ]*\\).*/\\1/p')"
    result = docker.run("run", "--rm", "--network=bridge", IMAGE, "sh", "-c", script)
    assert "eth0" in result.out
    assert "1 packets received" in result.out, result


def test_health_check(docker: Engine) -> None:
    options = ("--health-cmd=test -e /tmp/well", "--health-interval=200ms", "--health-retries=1")
    docker.ok("run", "-d", "--name", NAME, *options, IMAGE, "sleep", "1000")

    def health() -> str:
        return docker.ok("inspect", "--format={{.State.Health.Status}}", NAME)

    until(lambda: health() == "unhealthy", "it is unwell")
    docker.ok("exec", NAME, "touch", "/tmp/well")
    until(lambda: health() == "healthy", "it is well")


def test_out_of_memory_is_reported(docker: Engine) -> None:
    docker.ok("run", "-d", "--name", NAME, "--memory=32m", "--memory-swap=32m", IMAGE, "tail", "/dev/zero")
    assert docker.ok("wait", NAME) == "137"
    until(lambda: docker.ok("inspect", "--format={{.State.OOMKilled}}", NAME) == "true", "the reason is known")


def test_exec_with_more_rights(docker: Engine) -> None:
    """`exec --privileged` asks for capabilities that the container lacks; --process gives them."""
    docker.ok("run", "-d", "--name", NAME, "--cap-drop=ALL", IMAGE, "sleep", "1000")
    assert docker.run("exec", NAME, "chown", "7", "/tmp").status != 0


def test_restart_policy(docker: Engine) -> None:
    docker.ok("run", "-d", "--name", NAME, "--restart=on-failure:2", IMAGE, "sh", "-c", "echo try; exit 1")
    until(lambda: docker.ok("logs", NAME).count("try") == 3, "it is tried three times")


def test_copies(docker: Engine) -> None:
    docker.ok("run", "-d", "--name", NAME, IMAGE, "sleep", "1000")
    docker.ok("exec", NAME, "sh", "-c", "echo inside > /tmp/file")
    target = docker.path / "copied"
    docker.ok("cp", f"{NAME}:/tmp/file", target)
    assert target.read_text() == "inside\n"
