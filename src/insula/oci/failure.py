"""Errors for failed steps of a container's process: one line, and an exit status.

Podman and Docker search the line: "executable file not found in $PATH" and "no such file or directory" mean a missing
program (exit status 127), "permission denied" one that may not be executed (126).
"""

from __future__ import annotations

import errno

from insula.container.create.steps import Steps
from insula.model.errors import Failed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from insula.container.create.steps import StepError


class ExecFailed(Failed):
    """The program could not be executed; `exit_status` is 127 if it is not there, else 126."""


def explain(error: StepError) -> Failed:
    """The InsulaError for a failed step."""
    message = error.message
    if error.step is Steps.EXECUTE:
        name = message["path"]
        why = str(message["error"])
        why = why[:1].lower() + why[1:]
        if message["errno"] in (errno.ENOENT, errno.ENOTDIR):
            failed = ExecFailed(_missing(name, why), "see process.args and PATH")
            failed.exit_status = 127
            return failed
        failed = ExecFailed(f"exec {name}: {why}", "see its mode and format")
        failed.exit_status = 126
        return failed
    hint = "a file or directory is missing" if message["errno"] == errno.ENOENT else "nothing of it is left"
    if message["errno"] == errno.EAGAIN:
        hint = "end some of its processes, or allow more: update --pids-limit"
    return Failed(str(error) if error.step is Steps.RUN_HOOK else f"cannot {error}", hint)


def _missing(name: str | None, why: str) -> str:
    """In the words of Go's os/exec, as runc has them."""
    if name and "/" in name:
        return f"exec {name}: {why}"
    return f'exec: "{name}": executable file not found in $PATH'
