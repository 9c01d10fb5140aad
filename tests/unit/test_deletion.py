"""The thread that deletes devices survives failures."""

from __future__ import annotations

import threading

import pytest

from insula.network.linux.deletion import DeferredDeletion
from tests.support.wait import patiently


class MarkedDevices:
    """One whose devices can't be deleted for the first `failures` times."""

    def __init__(self, failures: list[Exception]) -> None:
        self.failures = failures
        self.done = threading.Event()

    def delete_marked(self) -> bool:
        if self.failures:
            raise self.failures.pop()
        self.done.set()
        return False


@pytest.mark.parametrize("error", [OSError(16, "busy"), ZeroDivisionError("a defect")])
def test_a_failed_deletion_does_not_block_others_and_can_be_retried(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    deletion = DeferredDeletion()
    failing, other = MarkedDevices([error]), MarkedDevices([])
    deletion.wake(failing)
    deletion.wake(other)
    assert other.done.wait(patiently(10))
    assert not failing.done.is_set()
    deletion.wake(failing)
    assert failing.done.wait(patiently(10))
    deletion.close()
    assert str(error) in caplog.text
