"""The runner of `scripts/test all`: the output of a stage, its end, and the report."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from tests.modern import test_inside
from tests.stages import CHECKOUT, MACHINES, RUN_ALONE, Stage, alone, chains, report
from tests.support.wait import until


def stage(script: str, without: str = "") -> Stage:
    return Stage("one", ["sh", "-c", script], without)


def test_a_failed_test_is_named_once_more(capsys: pytest.CaptureFixture[str]) -> None:
    made = stage("echo 'FAILED tests/x.py::test_y - boom'; echo '== 1 failed, 2 passed in 3.21s =='; exit 1")
    made.run()
    assert made.failed
    assert "one    | FAILED tests/x.py::test_y - boom\n" in capsys.readouterr().out
    lines = report([made], 5.0).splitlines()
    assert lines[-1] == "FAILED tests/x.py::test_y - boom"
    assert lines[1].endswith("1 failed, 2 passed")


@pytest.mark.parametrize(("status", "failed"), [(0, False), (5, False), (1, True), (2, True), (137, True)])
def test_a_suite_that_ends_without_output(status: int, failed: bool) -> None:
    made = stage(f"exit {status}")
    made.run()
    assert made.failed is failed
    assert (f"FAILED one: exit status {status}" in report([made], 1.0)) is failed


def test_an_optional_stage_may_fail(capsys: pytest.CaptureFixture[str]) -> None:
    made = stage("exit 1", "it is skipped")
    made.run()
    assert not made.failed
    assert "one    | it is skipped" in capsys.readouterr().out


def test_one_whose_machine_hung_is_run_once_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Once, and only if it failed and said so."""
    tried = tmp_path / "tried"
    script = f"echo x >>{tried}; echo {{}}; echo FAILED a::b; exit $(($(wc -l <{tried}) < {{}}))"
    for said, succeeds, runs, failed in (
        ("BUG: soft lockup", 2, 2, False), ("BUG: soft lockup", 9, 2, True), ("other", 2, 1, True),
        ("BUG: soft lockup", 1, 1, False),
    ):  # fmt: skip
        made = stage(script.format(said, succeeds))
        made.again = "soft lockup"
        made.run()
        assert (len(tried.read_text().split()), made.failed) == (runs, failed)
        assert ("once more" in capsys.readouterr().out) is (runs == 2)
        tried.unlink()


@pytest.mark.parametrize(
    ("lines", "status", "again"),
    [
        (["FAILED x.py::test_y[a b] - boom - b", "ERROR x.py::test_z"], 1, ["x.py::test_y[a b]", "x.py::test_z"]),
        (["FAILED tests/x.py::test_y - boom", "ERROR tests/x.py::test_y - and its end"], 1, ["tests/x.py::test_y"]),
        (["ERROR tests/x.py - SyntaxError"], 1, None),
        (["FAILED tests/x.py::test_y"], 2, None),
        (["FAILED tests/x.py::test_y"], 0, None),
        ([], 1, None),
        ([f"FAILED tests/x.py::test_{i}" for i in range(RUN_ALONE + 1)], 1, None),
    ],
)  # fmt: skip
def test_few_failed_tests_are_run_once_more(lines: list[str], status: int, again: list[str] | None) -> None:
    made = stage("\n".join([*(f"echo '{line}'" for line in lines), f"exit {status}"]))
    made.run()
    passed = stage("exit 0")
    passed.run()
    found = alone([passed, made], ["--option"])
    assert (found.command[3:] if found else None) == ([*again, "--option"] if again else None)
    failed = stage("exit 1")
    failed.run()
    assert alone([made, failed], []) is None  # something else failed as well


def test_one_that_hangs_is_killed_and_has_failed() -> None:
    made = stage("echo before; exec sleep 1000")
    thread = threading.Thread(target=made.run)
    thread.start()
    until(lambda: made.running, "it runs")
    made.kill()
    thread.join()
    assert made.failed
    assert "FAILED one: exit status -9" in report([made], 1.0)


def test_the_time_of_descendants_is_counted() -> None:
    made = stage("i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done & wait")
    made.run()
    assert made.processor > 0.01
    idle = stage("sleep 0.2")
    idle.run()
    assert idle.wall > 0.15 > idle.processor  # the control


def test_every_suite_is_a_stage() -> None:
    names = [each.name for chain in chains([]) for each in chain]
    tests = ["fabric", "instances", "modern", "network", "peer", "runtime", "system", "tenancy", "unit", *MACHINES]
    assert sorted(names) == sorted(["guest", "kernel", "lint", "peers", "provider", "systems", *tests])


def test_every_part_of_the_system_tests_is_in_one_stage() -> None:
    stages = {each.name: each for chain in chains([]) for each in chain}
    parts = [
        word
        for name in ("fabric", "instances", "network", "runtime", "tenancy", *MACHINES)
        for word in stages[name].command
        if "/system/" in word
    ]
    left_to_others = [word for word in stages["system"].command if word.startswith("--ignore=")]
    assert sorted(left_to_others) == sorted(f"--ignore={path}" for path in parts)
    assert len(parts) == len(set(parts)) > 20
    assert all((CHECKOUT / path).exists() for path in parts)
    machines = {str(path.relative_to(CHECKOUT)) for path in (CHECKOUT / "tests/system/machine").glob("test_*.py")}
    assert machines <= set(parts)


@pytest.mark.parametrize("file", test_inside.PARTS)
def test_what_is_chosen_for_the_virtual_machine_is_there(file: str) -> None:
    text = (CHECKOUT / "tests" / file).read_text()
    assert [name for name in test_inside.PARTS[file] if f"def test_{name}(" not in text] == []
