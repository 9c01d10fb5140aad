"""insula run and exec of programs that can't be executed: 127 if missing, else 126, and the reason."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from tests.support.cli import ERROR, Cli
from tests.support.programs import REFUSED, put
from tests.support.wait import until


def test_run_and_exec_explain_a_program_that_cannot_run(cli: Cli, tmp_path: Path) -> None:
    put(tmp_path)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for path in sorted(tmp_path.iterdir()):
            archive.add(path, path.name)
    cli.ok("run", "-d", "--name", "web", "busybox", "sleep", "600")
    unpacked = cli.raw("exec", "-i", "web", "tar", "-x", "-C", "/bin", stdin=packed.getvalue())
    assert unpacked.returncode == 0, unpacked
    for name, (_, status, reason) in REFUSED.items():
        assert reason in cli.fails("exec", "web", f"/bin/{name}", status=status), name
    assert cli.ok("exec", "web", "echo", "ran") == "ran"
    # what `start` meets is told by the same words
    script = "cat > /empty; chmod +x /empty"
    cli.ok("exec", "web", "sh", "-c", script)
    assert "cannot execute" in cli.fails("run", "--rm", "busybox", "/etc/passwd", status=126)


def test_exec_at_the_limit_of_processes_names_it(cli: Cli) -> None:
    cli.ok("run", "-d", "--name", "web", "--pids", "2", "busybox", "sh", "-c", "sleep 600 & wait")
    until(lambda: len(cli.json("top", "web")) == 2, "both run")
    result = cli.run("exec", "web", "true")
    line = result.err
    assert result.status == 125 and ERROR.fullmatch(line), result
    assert "the limit of processes is reached" in line and "insula update --pids" in line and "doctor" not in line
    cli.ok("update", "--pids", "5", "web")
    assert cli.ok("exec", "web", "echo", "ran") == "ran"
