"""The event loop of the monitor and the zygote: readiness, timers, idle work, and handlers that fail."""

from __future__ import annotations

import os
import select
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest

from insula.kernel import event_loop
from insula.kernel.event_loop import EventLoop


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    yield ends
    for fd in ends:
        os.close(fd)


def turn(loop: EventLoop, idle_timeout: float | None = 0.0, idle: Callable[[], object] = lambda: None) -> None:
    loop.turn(lambda: idle_timeout, idle)


def test_a_handler_gets_the_events_of_its_descriptor(pipe: tuple[int, int]) -> None:
    loop, seen = EventLoop("test"), list[int]()
    loop.watch(pipe[0], seen.append)
    turn(loop)
    assert seen == [], "nothing is there yet"
    os.write(pipe[1], b"x")
    turn(loop)
    assert seen == [select.EPOLLIN]
    loop.watch(pipe[0], seen.append, 0)
    turn(loop)
    assert len(seen) == 1 and not loop.is_watched(pipe[0]), "an empty mask is none"


def test_a_handler_that_fails_is_called_again(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(event_loop, "RETRY", 0.0)
    loop, calls = EventLoop("insula-test"), list[int]()

    def handler(events: int) -> None:
        calls.append(events)
        if len(calls) < 3:
            raise ValueError("not yet")
        os.read(pipe[0], 1)

    loop.watch(pipe[0], handler)
    os.write(pipe[1], b"x")
    for _ in range(10):
        turn(loop)
    assert len(calls) == 3 and loop.is_watched(pipe[0])
    log = capfd.readouterr().err
    assert log.count("ERROR insula-test: a handler failed") == 2 and "ValueError" in log


def test_a_handler_that_unwatches_and_fails_is_not_called_again(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_loop, "RETRY", 0.0)
    loop, calls = EventLoop("test"), list[int]()

    def handler(events: int) -> None:
        calls.append(events)
        loop.unwatch(pipe[0])
        raise ValueError("it was closed")

    loop.watch(pipe[0], handler)
    os.write(pipe[1], b"x")
    for _ in range(5):
        turn(loop)
    assert len(calls) == 1


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the loop sees, in seconds: a test moves it, so that no other work of the machine does."""
    now = [0.0]
    monkeypatch.setattr(event_loop, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_timers_run_in_order_and_one_that_fails_again(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_loop, "RETRY", 1.0)
    loop, done = EventLoop("test"), list[str]()

    def failing() -> None:
        done.append("failing")
        if done.count("failing") == 1:
            raise OSError(5, "once")

    loop.later(2.0, lambda: done.append("late"))
    loop.later(0.0, failing)
    for now, expected in ((0.0, 1), (0.9, 1), (1.0, 2), (1.9, 2), (2.0, 3), (9.0, 3)):
        clock[0] = now
        turn(loop)
        assert done == ["failing", "failing", "late"][:expected], now


def test_idle_work_runs_when_nothing_else_does(pipe: tuple[int, int]) -> None:
    loop, done = EventLoop("test"), list[str]()
    loop.watch(pipe[0], lambda _: done.append(os.read(pipe[0], 1).decode()))
    os.write(pipe[1], b"x")
    turn(loop, 0.0, lambda: done.append("idle"))
    assert done == ["x"]
    turn(loop, 0.0, lambda: done.append("idle"))
    assert done == ["x", "idle"]


def test_idle_work_that_fails_rests_for_a_while(clock: list[float], pipe: tuple[int, int]) -> None:
    loop, seen = EventLoop("test"), list[str]()

    def idle() -> None:
        seen.append("idle")
        raise OSError(28, "no space")

    loop.watch(pipe[0], lambda _: seen.append(os.read(pipe[0], 1).decode()))
    turn(loop, 0.0, idle)
    clock[0] = 0.9 * event_loop.RETRY
    os.write(pipe[1], b"x")
    turn(loop, 0.0, idle)
    assert seen == ["idle", "x"], "the next attempt comes after RETRY, and what else there is to do before"
    clock[0] = 1.1 * event_loop.RETRY
    turn(loop, 0.0, idle)
    assert seen == ["idle", "x", "idle"]
