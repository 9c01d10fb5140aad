"""The records of a container: builds of different versions read each other's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from insula.container.service.run_directory import VERSION, ExitRecord, Launch, ProcessState, RunDirectory

LAUNCH = Launch("box", {}, ["/lower"], "/upper", "/work", 65536, "group/box", log="/log")
STATE = ProcessState("box", 7, 99, started=1.5, executed=True)
EXIT = ExitRecord(None, 9, True, 2.5, "gone", {"step": "execute", "errno": 2, "error": "none", "path": "/x"})
FIRST = {  # the fields that 0.1.0 wrote, beside which it had no version
    "launch.json": {"id", "config", "lower", "upper", "work", "id_base", "cgroup", "log"},
    "state.json": {"id", "pid", "start_time"},
    "exit.json": {"exit_status", "signal", "oom", "finished"},
}


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    (tmp_path / "containers").mkdir()
    directory = RunDirectory(str(tmp_path), "box")
    directory.create(LAUNCH)
    directory.write_state(STATE)
    directory.write_exit(EXIT)
    return directory


def rewrite(directory: RunDirectory, name: str, **more: object) -> None:
    path = Path(directory.path, name)
    kept = {key: value for key, value in json.loads(path.read_text()).items() if key in FIRST[name]}
    path.write_text(json.dumps({**kept, **more}))


def test_records_have_a_version_and_come_back_as_they_were(directory: RunDirectory) -> None:
    assert (directory.launch(), directory.state(), directory.exit()) == (LAUNCH, STATE, EXIT)
    for name in FIRST:
        assert json.loads(Path(directory.path, name).read_text())["version"] == VERSION


def test_records_of_an_earlier_version_get_defaults(directory: RunDirectory) -> None:
    for name in FIRST:
        rewrite(directory, name)
    assert directory.launch() == LAUNCH
    assert directory.state() == ProcessState("box", 7, 99)
    assert directory.exit() == ExitRecord(None, 9, True, 2.5)
    assert directory.damaged() == []


def test_fields_of_a_later_version_are_ignored(directory: RunDirectory) -> None:
    for name in FIRST:
        rewrite(directory, name, version=VERSION + 1, colour="red")
    assert directory.launch() == LAUNCH and directory.damaged() == []


def test_a_record_without_a_required_field_is_damaged(directory: RunDirectory) -> None:
    Path(directory.path, "state.json").write_text('{"version": 1, "id": "box"}')
    assert directory.state() is None and directory.damaged() == ["state.json"]
