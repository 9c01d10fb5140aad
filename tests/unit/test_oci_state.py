"""A container's directory: made once, locked, whole after any crash."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from insula.kernel import process
from insula.model.errors import Conflict, Failed, Invalid, NotFound
from insula.oci.state import Container, check_id, containers, rfc3339, user_name
from tests.support.wait import patiently

if TYPE_CHECKING:
    from insula.oci.state import StateRecord


def record(name: str = "web", pid: int | None = None) -> StateRecord:
    pid = pid or os.getpid()
    return {
        "id": name,
        "bundle": "/b",
        "rootfs": "/b/rootfs",
        "pid": pid,
        "start_time": process.start_time(pid) or 0,
        "created": 0.0,
        "owner": os.geteuid(),
        "cgroup": None,
        "scope": None,
        "annotations": {"ü": "\n"},
    }


def made(root: Path, name: str = "web") -> Container:
    container = Container(str(root), name)
    container.make()
    container.save(record(name))
    container.unlock()
    return container


@pytest.mark.parametrize("name", ["web", "a.b_c+d-e", "0" * 255, "..."])
def test_names(name: str) -> None:
    assert check_id(name) == name


@given(st.text() | st.sampled_from(["", ".", "..", "a/b", "/", "a" * 256, "ü", "a b", "a\n"]))
def test_a_name_never_leads_outside(name: str) -> None:
    try:
        check_id(name)
    except Invalid:
        return
    assert os.path.normpath(f"/root/{name}") == f"/root/{name}" and "/" not in name


def test_a_saved_state_is_loaded(tmp_path: Path) -> None:
    container = made(tmp_path)
    assert Container(str(tmp_path), "web").load() == record()
    assert container.status(container.record()) == "running"
    container.save_config(b'{"hostname": "x"}')
    assert container.config() == {"hostname": "x"}
    container.save_config({"hostname": "y"})
    assert container.config() == {"hostname": "y"}
    assert Path(container.path).stat().st_mode & 0o777 == 0o700
    assert sorted(os.listdir(container.path)) == ["config.json", "state.json"]


def test_a_name_is_taken_once(tmp_path: Path) -> None:
    made(tmp_path)
    with pytest.raises(Conflict, match="container with given ID already exists: "):
        Container(str(tmp_path), "web").make()
    assert Container(str(tmp_path), "web").load() == record()


def test_of_two_concurrent_creators_one_wins(tmp_path: Path) -> None:
    first, second = (Container(str(tmp_path), "web") for _ in range(2))
    first.make()
    with pytest.raises(Conflict):
        second.make()
    assert first.status(first.record()) == "creating"
    assert containers(str(tmp_path)) == []
    first.unlock()


def test_the_remains_of_a_killed_create_are_taken_over(tmp_path: Path) -> None:
    killed = Container(str(tmp_path), "web")
    killed.make()
    killed.unlock()  # as the kernel does
    other = Container(str(tmp_path), "web")
    other.make()
    other.unlock()


def test_a_lock_is_waited_for(tmp_path: Path) -> None:
    made(tmp_path)
    order = []
    with Container(str(tmp_path), "web"):

        def other() -> None:
            with Container(str(tmp_path), "web"):
                order.append("second")

        thread = threading.Thread(target=other)
        thread.start()
        thread.join(0.1)
        order.append("first")
    thread.join(patiently(10))
    assert order == ["first", "second"]


def test_waiting_for_a_container_that_is_deleted_is_an_error(tmp_path: Path) -> None:
    container = made(tmp_path)
    caught: list[BaseException] = []
    with container:

        def other() -> None:
            try:
                Container(str(tmp_path), "web").lock()
            except NotFound as error:
                caught.append(error)

        thread = threading.Thread(target=other)
        thread.start()
        thread.join(0.1)
        container.remove()
        Path(container.path).mkdir()  # of somebody who was faster
    thread.join(patiently(10))
    assert len(caught) == 1


def test_a_removed_state_is_gone(tmp_path: Path) -> None:
    container = made(tmp_path)
    Path(container.start_socket).touch()
    container.remove()
    container.remove()
    assert not Path(container.path).exists()
    with pytest.raises(NotFound, match="container does not exist: "):
        container.load()
    with pytest.raises(NotFound):
        container.lock()


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    container = made(tmp_path)
    Path(container.path, "state.json").write_text('{"id"')
    with pytest.raises(Failed, match=r"state.json is damaged"):
        container.load()


def test_lists(tmp_path: Path) -> None:
    assert containers(str(tmp_path / "none")) == []
    made(tmp_path, "b"), made(tmp_path, "a")
    (tmp_path / "a file").touch()
    (tmp_path / "file").touch()
    assert [container.id for container in containers(str(tmp_path))] == ["a", "b"]


def test_times_and_users() -> None:
    assert rfc3339(0.5) == "1970-01-01T00:00:00.500000000Z"
    assert user_name(0) == "root"
    assert user_name(4_000_000_000) == "4000000000"
