"""Budgets in the kernel while the kernel is slow: nothing waits for it. tests/system tests that they hold."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from insula.control.instances.drivers.uncharged import Uncharged
from insula.kernel.uncharged import Guard
from tests.support.wait import patiently

SLOW = """
import asyncio, sys, threading
from pathlib import Path
from insula.control.instances.drivers.uncharged import Uncharged
from insula.kernel.uncharged import Guard

reached = threading.Event()

def ensure(self):
    reached.set()
    threading.Event().wait()

Guard.ensure = ensure

async def main():
    uncharged = Uncharged(Path(sys.argv[1]))
    uncharged.begin()
    await asyncio.to_thread(reached.wait)
    print(uncharged.check().detail, flush=True)

asyncio.run(main())
"""


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, list[str]]:
    """An event that lets the programs be loaded, and the list of actions on them."""
    release, done = threading.Event(), list[str]()

    def ensure(_: Guard) -> None:
        release.wait()
        done.append("loaded")

    monkeypatch.setattr(Guard, "ensure", ensure)
    monkeypatch.setattr(Guard, "remove", lambda _: done.append("removed"))
    return release, done


def test_a_kernel_that_never_answers_blocks_nothing(tmp_path: Path) -> None:
    """Neither `begin`, nor `check`, nor the end of the process."""
    command = [sys.executable, "-c", SLOW, str(tmp_path / "pins")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=patiently(120), check=True)
    assert done.stdout == "not counted yet: the programs are being loaded\n"


def test_programs_that_are_loaded_late_count(tmp_path: Path, slow: tuple[threading.Event, list[str]]) -> None:
    release, done = slow
    uncharged = Uncharged(tmp_path / "pins")
    thread = uncharged.begin()
    assert uncharged.check().state == "degraded"
    release.set()
    thread.join()
    assert (uncharged.check().state, done) == ("ok", ["loaded"])
    uncharged.restore()
    assert done == ["loaded", "removed"]


def test_programs_that_are_loaded_after_restore_are_removed(
    tmp_path: Path, slow: tuple[threading.Event, list[str]]
) -> None:
    release, done = slow
    uncharged = Uncharged(tmp_path / "pins")
    thread = uncharged.begin()
    with pytest.raises(OSError, match="still checking the programs"):
        uncharged.restore(patience=0)
    assert done == []
    release.set()
    thread.join()
    assert done == ["loaded", "removed"]


def test_nothing_is_loaded_after_restore(tmp_path: Path, slow: tuple[threading.Event, list[str]]) -> None:
    _, done = slow
    uncharged = Uncharged(tmp_path / "pins")
    uncharged.restore()
    uncharged.begin().join()
    assert "loaded" not in done
