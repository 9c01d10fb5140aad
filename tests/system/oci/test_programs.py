"""Programs that can't be executed: the exit status tells a missing one, and the line says why."""

from __future__ import annotations

import pytest

from tests.support.programs import REFUSED, put
from tests.support.wait import until
from tests.system.oci.conftest import NAME, Box


def lowered(reason: str) -> str:
    """insula-oci's words are those that engines look for, which begin so."""
    return reason[0].lower() + reason[1:]


def test_run_and_exec_explain_a_program_that_cannot_run(box: Box) -> None:
    """By `run`, and by `exec`; a path that is found along PATH counts as well as one that is given."""
    put(box.rootfs / "bin")
    box.start()
    for name, (_, _, reason) in REFUSED.items():
        result = box.oci.run("exec", NAME, f"/bin/{name}")
        assert (result.status, result.out) == (255, ""), result
        assert f"exec /bin/{name}: {lowered(reason)}" in result.err, result
    box.oci.ok("delete", "--force", NAME)
    for name, (_, status, reason) in REFUSED.items():
        box.process["args"] = [name]
        box.write(box.config)
        result = box.oci.run("run", "--bundle", box.path, NAME)
        assert (result.status, result.out) == (status, ""), result
        if name not in ("data", "dangling"):  # which `create` sees by itself, as it does what is nowhere
            assert f"exec /bin/{name}: {lowered(reason)}" in result.err, result
        assert box.left() == []


def test_a_program_that_is_open_for_writing(box: Box) -> None:
    program = box.rootfs / "bin/busy"
    program.write_bytes((box.rootfs / "bin/sh").read_bytes())
    program.chmod(0o755)
    box.process["args"] = ["/bin/busy", "echo", "ran"]
    box.write(box.config)
    with program.open("ab"):
        result = box.oci.run("run", "--bundle", box.path, NAME)
    assert result.status == 126
    assert "text file busy: it is open for writing" in result.err
    box.process["args"] = ["/bin/busy", "true"]
    box.write(box.config)
    assert box.oci.run("run", "--bundle", box.path, NAME).status in (0, 127)  # whatever busybox makes of its name


def test_the_next_directory_of_path_is_tried(box: Box) -> None:
    """A file that can't be executed does not hide one in a later directory, as with execvp(3)."""
    (box.rootfs / "first").mkdir()
    put(box.rootfs / "first")
    box.process["env"] = ["PATH=/first:/bin"]
    for name in ("no-shell", "data"):
        (box.rootfs / f"bin/{name}").write_text("#!/bin/sh\necho second\n")
        (box.rootfs / f"bin/{name}").chmod(0o755)
        box.process["args"] = [name]
        box.write(box.config)
        assert box.oci.ok("run", "--bundle", box.path, NAME) == "second\n"


@pytest.mark.parametrize("offset", [0, 16, 24, 32, 54, 56, 64, 72, 96, 120])
def test_a_damaged_program_is_reported_like_any_other(box: Box, offset: int) -> None:
    """Hostile numbers in headers: there is always one line, and no error of ours."""
    content = bytearray(REFUSED["no-loader"].content or b"")
    content[offset : offset + 8] = b"\xff" * 8
    (box.rootfs / "bin/odd").write_bytes(content)
    (box.rootfs / "bin/odd").chmod(0o755)
    box.process["args"] = ["/bin/odd"]
    box.write(box.config)
    result = box.oci.run("run", "--bundle", box.path, NAME)
    assert result.status in (126, 127, 128 + 11) and "Traceback" not in result.err, result


def test_exec_at_the_limit_of_processes_names_it(box: Box) -> None:
    box.linux["resources"]["pids"] = {"limit": 2}
    box.start("sleep 600 & wait")
    until(lambda: len(box.oci.json("ps", "--format", "json", NAME)) == 2, "both run")
    result = box.oci.run("exec", NAME, "true")
    assert result.status == 255
    assert "the limit of processes is reached (pids of the container" in result.err
    assert "update --pids-limit" in result.err
    box.oci.ok("update", "--pids-limit", "4", NAME)  # two come in, of which one goes at once
    box.oci.ok("exec", NAME, "true")
