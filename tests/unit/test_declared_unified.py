"""Unified diffs: patch(1) makes of the old lines the new ones, in bounded time."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from insula.control.declared.unified import unified

LINES = st.lists(st.sampled_from(["a", "b", "c", "- d", "", "@@", "--- x"]), max_size=90)


def test_nothing_differs() -> None:
    assert unified(["a"], ["a"], "x", "y") == []


def test_only_what_differs_is_shown_with_three_lines_around() -> None:
    before = [str(n) for n in range(20)]
    after = [*before[:8], "new", *before[9:12], *before[13:]]
    assert unified(before, after, "x", "y") == [
        "--- x",
        "+++ y",
        "@@ -6,11 +6,10 @@",
        *(f" {n}" for n in (5, 6, 7)),
        "-8",
        "+new",
        *(f" {n}" for n in (9, 10, 11)),
        "-12",
        *(f" {n}" for n in (13, 14, 15)),
    ]
    assert unified([], ["a"], "x", "y")[2:] == ["@@ -0,0 +1,1 @@", "+a"]


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(LINES, LINES)
def test_patch_takes_it(tmp_path: Path, before: list[str], after: list[str]) -> None:
    if shutil.which("patch") is None:
        pytest.skip("patch is not installed")
    diff = unified(before, after, "x", "y")
    file = tmp_path / "file"
    file.write_text("".join(f"{line}\n" for line in before))
    text = "".join(f"{line}\n" for line in diff)
    command = ["patch", "--quiet", "--no-backup-if-mismatch", "--fuzz=0", str(file)]
    done = subprocess.run(command, input=text, text=True, capture_output=True) if diff else None
    assert done is None or done.returncode == 0, (done, text)
    assert (file.read_text() if file.exists() else "") == "".join(f"{line}\n" for line in after)


def test_a_long_diff_is_cut_off() -> None:
    before, after = ([f"{name}{n % 7}" for n in range(100_000)] for name in "ab")
    diff = unified(before, after, "x", "y")
    assert diff[-1] == "[cut off]" and sum(map(len, diff)) < 20_000
    assert max(map(len, unified(["x" * 10**6], ["y" * 10**6], "x", "y"))) < 400
