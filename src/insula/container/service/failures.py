"""Exceptions with one line for the user, from the errors that the zygote or a child has sent."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TypeAlias

from insula.container.create.steps import Step, find_step, text_of
from insula.container.wire import Message
from insula.model.errors import Failed

Hint: TypeAlias = Callable[[Step | None, int], str | None]
"""A function from a failed step and its errno to a hint for the user; the step is None if this build doesn't know
it."""


class StartFailed(Failed):
    """The program could not be executed; `exit_status` is 127 if it was not found, else 126."""

    exit_status = 125


class ZygoteDied(Failed):
    """The zygote died during a request, which may have been carried out or not. Containers not started died with it."""


def no_hint(_step: Step | None, _errno: int) -> None:
    """A `Hint` that has no hints."""


def explain(error: Message, hint: Hint = no_hint) -> Failed:
    """The exception for an error's message (`StepError.message`)."""
    path = f" {error['path']}" if error.get("path") else ""
    if error["step"] != "execute":
        return Failed(f"cannot {text_of(error)}: {error['error']}{path}", hint(find_step(error), error["errno"]))
    missing = error["errno"] in (errno.ENOENT, errno.ENOTDIR)
    advice = "give a command that the image contains" if missing else "look at that file: its mode, and what it is"
    failure = StartFailed(f"cannot execute{path}: {error['error']}", advice)
    failure.exit_status = 127 if missing else 126
    return failure
