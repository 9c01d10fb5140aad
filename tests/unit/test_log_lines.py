"""Log lines of Insula's processes: their format, priorities for the journal, tracebacks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from insula.log import line, to_journal

SOURCE = str(Path(__file__).parents[2] / "src")
PLAIN = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "
PROGRAM = """
import logging
from insula.log import set_up, write
write("small", "it failed", {error})
set_up({level!r})
log = logging.getLogger("insula.big")
log.debug("fine"); log.info("told %s", 1); log.warning("two\\nlines")
try:
    1 / 0
except ZeroDivisionError as error:
    log.error("oh", exc_info=error)
"""


def run(path: Path, *, journal: bool, level: str = "info", error: str = "None") -> list[str]:
    """The lines of a process whose standard error is a file, or what it takes for the journal's stream."""
    with path.open("w") as file:
        found = os.fstat(file.fileno())
        stream = f"{found.st_dev}:{found.st_ino}" if journal else "8:1"
        program = PROGRAM.format(level=level, error=error)
        environment = {"PYTHONPATH": SOURCE, "JOURNAL_STREAM": stream}
        subprocess.run([sys.executable, "-c", program], stderr=file, env=environment, check=True)
    return path.read_text().splitlines()


def test_lines_for_people_have_time_level_and_source(tmp_path: Path) -> None:
    lines = run(tmp_path / "log", journal=False)
    assert re.fullmatch(PLAIN + "ERROR small: it failed", lines[0])
    assert re.fullmatch(PLAIN + "INFO insula.big: told 1", lines[1])
    assert re.fullmatch(PLAIN + "ERROR insula.big: oh", lines[4])
    assert lines[5] == "Traceback (most recent call last):"
    assert lines[-1] == "ZeroDivisionError: division by zero"


def test_each_line_for_the_journal_has_a_priority_and_no_time(tmp_path: Path) -> None:
    lines = run(tmp_path / "log", journal=True)
    assert lines[:5] == [
        "<3>ERROR small: it failed",
        "<6>INFO insula.big: told 1",
        "<4>WARNING insula.big: two",
        "<4>lines",
        "<3>ERROR insula.big: oh",
    ]
    assert all(each.startswith("<3>") for each in lines[5:])


def test_levels(tmp_path: Path) -> None:
    for level, count in (("debug", 4), ("info", 3), ("warning", 2), ("error", 1)):
        lines = run(tmp_path / level, journal=False, level=level)
        assert sum(" insula.big: " in each for each in lines) == count


def test_a_defect_is_logged_with_its_place_and_a_system_error_without(tmp_path: Path) -> None:
    defect = run(tmp_path / "defect", journal=True, error="ValueError('x')", level="error")
    assert defect[:2] == ["<3>ERROR small: it failed: ValueError('x')", "<3>ValueError: x"]
    system = run(tmp_path / "system", journal=True, error="OSError(28, 'full')", level="error")
    assert system[0] == "<3>ERROR small: it failed: OSError(28, 'full')"
    assert "insula.big" in system[1]


def test_the_journal_is_known_by_its_stream_alone(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file:
        found = os.fstat(file.fileno())
        assert to_journal({"JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino}"}, file.fileno())
        assert not to_journal({"JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino + 1}"}, file.fileno())
        assert not to_journal({"JOURNAL_STREAM": "nonsense"}, file.fileno())
        assert not to_journal({}, file.fileno())
    assert not to_journal({"JOURNAL_STREAM": "8:1"}, 9999)


@pytest.mark.parametrize("journal", [True, False])
def test_a_full_standard_error_is_ignored(journal: bool) -> None:
    program = "from insula.log import write; write('small', 'it failed'); print('on')"
    with open("/dev/full", "w") as full:
        found = os.fstat(full.fileno())
        environment = {
            "PYTHONPATH": SOURCE,
            **({"JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino}"} if journal else {}),
        }
        done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=full, env=environment)
    assert (done.returncode, done.stdout) == (0, b"on\n")


def test_the_small_writer_imports_no_logging() -> None:
    program = "import sys, insula.log; insula.log.write('a', 'b'); print('logging' in sys.modules)"
    environment = {"PYTHONPATH": SOURCE}
    done = subprocess.run([sys.executable, "-S", "-c", program], capture_output=True, text=True, env=environment)
    assert done.stdout == "False\n"
    assert line("INFO", "a", "b", journal=True) == "<6>INFO a: b\n"
