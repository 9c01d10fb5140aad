"""Concurrent calls of a fabric: which wait for each other, and which are refused."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager

import pytest

from insula.model.errors import Failed, Unavailable
from insula.network.linux.calls import Calls
from tests.support.wait import patiently


class Inside:
    """A thread within a call, until `leave`. `entered` is set once it has begun, `error` if it was refused."""

    def __init__(self, call: AbstractContextManager[None]) -> None:
        self.entered, self._leave = threading.Event(), threading.Event()
        self.error: Exception | None = None
        self._call = call
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            with self._call:
                self.entered.set()
                self._leave.wait(patiently(10))
        except Unavailable as error:
            self.error = error

    def leave(self) -> None:
        self._leave.set()
        self._thread.join(patiently(10))
        assert not self._thread.is_alive()


def opened(patience: float = 10.0) -> Calls:
    calls = Calls(patience)
    calls.open()
    return calls


def test_calls_about_one_tenant_wait_for_each_other_only() -> None:
    calls = opened()
    first, second = Inside(calls.of("acme")), None
    try:
        assert first.entered.wait(patiently(10))
        second = Inside(calls.of("acme"))
        with calls.of("globex"), calls.any():
            assert not second.entered.wait(0.05)
    finally:
        first.leave()
    assert second.entered.wait(patiently(10))
    second.leave()
    with calls.of("acme"):
        pass


def test_closing_refuses_waiting_calls_and_waits_for_running_ones() -> None:
    calls = opened()
    running = Inside(calls.of("acme"))
    assert running.entered.wait(patiently(10))
    waiting = Inside(calls.of("acme"))
    closing = threading.Thread(target=calls.close)
    closing.start()
    waiting.leave()
    assert waiting.error and not waiting.entered.is_set()
    assert closing.is_alive(), "one call runs still"
    with pytest.raises(Unavailable, match="taken down"), calls.any():
        pass
    running.leave()
    closing.join(patiently(10))
    assert running.error is None and not closing.is_alive()


def test_a_call_that_does_not_end_is_an_error_and_closing_can_be_retried() -> None:
    calls = opened(patience=0.05)
    stuck = Inside(calls.of("acme"))
    assert stuck.entered.wait(patiently(10))
    with pytest.raises(Unavailable, match="acme are still being changed"), calls.of("acme"):
        pass
    with pytest.raises(Failed, match="1 changes of networks still run"):
        calls.close()
    with pytest.raises(Unavailable), calls.of("globex"):
        pass
    stuck.leave()
    calls.close()


def test_nothing_is_called_before_it_is_open_and_all_after_it_is_opened_again() -> None:
    calls = Calls()
    for call in (calls.any(), calls.of("acme")):
        with pytest.raises(Unavailable, match="not open"), call:
            pass
    calls.open()
    calls.close()
    calls.open()
    with calls.of("acme"):
        pass


def test_an_error_in_a_call_ends_it() -> None:
    calls = opened(patience=0.05)
    with pytest.raises(ZeroDivisionError), calls.of("acme"):
        _ = 1 / 0
    with calls.of("acme"):
        pass
    calls.close()
