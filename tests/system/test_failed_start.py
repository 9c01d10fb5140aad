"""A failed start: the reason is reported under any timing, and each mode leaves the same state."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.cli import ERROR, Cli, Result
from tests.support.wait import until

AT_ONCE, TIMES = 8, 32
IN_THE_WAY = ("--tmpfs", "/etc/passwd", "busybox", "true")  # mount(2): it is no directory


@pytest.mark.parametrize("options", [("--rm",), ("--rm", "-d")])
def test_the_reason_is_reported_under_load(cli: Cli, options: tuple[str, ...]) -> None:
    """PID 1 fails and is gone before, while or after its network is made: the cause is told, not what follows."""

    def run(_: int) -> Result:
        return cli.run("run", *options, *IN_THE_WAY)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        results = list(pool.map(run, range(TIMES)))
    reasons = {match["what"] if (match := ERROR.fullmatch(result.err)) else str(result) for result in results}
    assert len(reasons) == 1, reasons
    [reason] = reasons
    assert reason.startswith("cannot mount") and "/etc/passwd" in reason
    assert {result.status for result in results} == {125}
    until(lambda: cli.json("ps", "-a") == [], "nothing is left")


@pytest.mark.parametrize("mode", [(), ("-d",)])
@pytest.mark.parametrize(
    ("what", "status"), [(IN_THE_WAY, 125), (("busybox", "no-such-program"), 127), (("busybox", "/etc/passwd"), 126)]
)
def test_an_instance_that_failed_to_start_is_kept(
    cli: Cli, mode: tuple[str, ...], what: tuple[str, ...], status: int
) -> None:
    """As in Docker: with and without -d it is failed, with the reason; with --rm it is removed."""
    reason = cli.fails("run", *mode, "--name", "kept", *what, status=status)
    [view] = cli.json("ps", "-a")
    assert (view["instance"]["name"], view["status"]["state"], view["status"]["error"]) == ("kept", "failed", reason)
    assert cli.fails("wait", "kept") == reason
    cli.ok("rm", "kept")
    cli.fails("run", *mode, "--rm", "--name", "gone", *what, status=status)
    assert cli.json("ps", "-a") == []


def test_an_invalid_instance_is_not_kept(cli: Cli, tmp_path: Path) -> None:
    """The control: what is refused before it exists leaves nothing in either mode."""
    for mode in ((), ("-d",)):
        cli.fails("run", *mode, "--name", "never", "no-such-image", "true", status=125)
        cli.fails("run", *mode, "--name", "never", "--ip", "192.0.2.1", "busybox", "true", status=125)
    assert cli.json("ps", "-a") == []
