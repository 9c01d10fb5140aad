"""Error messages of failed launches: the host is named only for faults of the host."""

from __future__ import annotations

import errno
import json
import os

import msgspec
import pytest

from insula.container.create.steps import Step, StepError, Steps
from insula.container.service.failures import StartFailed, explain
from insula.control.instances.drivers.container import hints
from insula.model.errors import Failed


@pytest.mark.parametrize(
    ("step", "number", "hint"),
    [
        (Steps.MOUNT, errno.ENOTDIR, "what the image has at that path"),
        (Steps.MOUNT, errno.ELOOP, "what the image has at that path"),
        (Steps.MOUNT, errno.ENOSPC, "free some space"),
        (Steps.SET_SYSCTL, errno.ENOENT, "look at the name"),
        (Steps.CHANGE_USER, errno.EINVAL, "--user"),
        (Steps.ENTER_DIRECTORY, errno.ENOENT, "a directory of the image"),
        (Steps.START_PROCESS, errno.EAGAIN, "--pids"),
        (Steps.ATTACH_ROOT, errno.ENOMEM, "--memory"),
        (Steps.OPEN_TERMINAL, errno.ENOSPC, "--tty"),
        (Steps.SET_RLIMIT, errno.EPERM, "ask for less"),
    ],
)
def test_hints_for_faults_of_the_image_and_the_user(step: Step, number: int, hint: str) -> None:
    failed = StepError(step, OSError(number, os.strerror(number)), "OBJECT")
    error = explain(failed.message, hints.hint)
    assert error.message == f"cannot {step.text.format('OBJECT')}: {os.strerror(number)}"
    assert hint in (error.hint or "")
    assert "run `insula doctor`" not in (error.hint or "")


@pytest.mark.parametrize("step", [Steps.MOUNT, Steps.MAKE_CGROUP_NAMESPACE, Steps.LOAD_FILTER])
def test_hints_for_missing_features_name_the_doctor(step: Step) -> None:
    failed = StepError(step, OSError(errno.EPERM, "Operation not permitted"), "/proc")
    assert "insula doctor" in (explain(failed.message, hints.hint).hint or "")


def test_an_error_comes_back_from_its_message() -> None:
    """As it is sent and stored: fields, and no sentence that would have to be taken apart."""
    failed = StepError(Steps.MOUNT, OSError(errno.ENOENT, "none", "/dev/x"), "/data")
    message = json.loads(json.dumps(failed.message))
    assert (message["step"], message["object"]) == ("mount", "/data")
    again = StepError.from_message(message)
    assert again.step is Steps.MOUNT and str(again) == str(failed) == "mount /data: /dev/x: none"


def test_an_error_that_0_1_0_stored_is_read() -> None:
    """Its step is a sentence. A program that can't be executed has the same status as ever."""
    old = {"step": "mount /data", "errno": errno.ENOENT, "error": "none", "path": None}
    assert explain(old, hints.hint).message == "cannot mount /data: none"
    failed = explain({**old, "step": "execute", "path": "/x"}, hints.hint)
    assert isinstance(failed, StartFailed) and failed.exit_status == 127


def test_names_of_any_bytes_fit_into_json() -> None:
    """Surrogates stand for bytes of names that are not UTF-8 (PEP 383); no JSON may hold them (RFC 8259, 8.2)."""
    error = Failed("no file 'x\udcff'", "not \udc80, but é")
    assert (error.message, error.hint) == ("no file 'x\\udcff'", "not \\udc80, but é")
    assert msgspec.json.decode(msgspec.json.encode(error.to_dict()))["message"] == error.message
