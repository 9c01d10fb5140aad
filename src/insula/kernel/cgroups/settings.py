"""Settings: limits as values to be written into files of a group's directory.

Some values constrain one another: the memory limit may not exceed that of memory and swap together, and a quota of
processor time may not exceed the parent's. So the kernel refuses a value with EINVAL if it contradicts one that has not
been changed yet, and the right order depends on the current values. The current values are not read; a refused setting
is written again after the others, as long as that makes progress.

On a running group a change that fails half-way must be undone. `write_all` with `undo` reads each value before it is
replaced, and `put_back` restores them.
"""

from __future__ import annotations

import errno
import os

from insula.kernel.cgroups.files import read, write

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    Resources = dict[str, Any]
    """The `linux.resources` object of the OCI runtime-spec (config-linux.md)."""
else:
    Resources = dict

UNLIMITED = -1


class Setting:
    """A `value` for `file` in the group's directory of `controller`, from `field` of linux.resources.

    In a file with keys (cgroup-v2.rst, "nested keyed") a write replaces the line that begins with the value's first
    word, and the value `reset` removes that line. On a host that lacks the file `instead` is written; without it that
    is an error, unless `optional` returns true.
    """

    __slots__ = ("controller", "field", "file", "instead", "optional", "reset", "value")

    def __init__(
        self,
        field: str,
        controller: str,
        file: str,
        value: object,
        *,
        reset: str | None = None,
        instead: Setting | None = None,
        optional: Callable[[], bool] | None = None,
    ) -> None:
        self.field = field
        self.controller = controller
        self.file = file
        self.value = str(value)
        self.reset = reset
        self.instead = instead
        self.optional = optional

    def __repr__(self) -> str:
        return f"{self.controller}/{self.file}={self.value}"


def unsupported(field: str, why: str) -> OSError:
    """Return the error for a field of linux.resources that this host does not support."""
    return OSError(errno.EOPNOTSUPP, f"linux.resources.{field} is not supported here: {why}")


def always() -> bool:
    """Return True: the `optional` of a setting that any host may lack."""
    return True


def has_no_swap() -> bool:
    """Whether the host has no swap (proc_swaps(5)), so that a limit of swap is not needed."""
    return "\n" not in (read("/proc/swaps") or "")


def write_all(
    directory: Callable[[str], str | None], settings: Sequence[Setting], *, undo: list[tuple[str, str]] | None = None
) -> None:
    """Write every setting; `directory` returns a controller's directory, None if the host lacks the controller.

    OSError names the field and the file. Replaced values are appended to `undo`, if given, as (path, value).
    """
    waiting = list(settings)
    while waiting:
        refused: list[Setting] = []
        error: OSError | None = None
        for setting in waiting:
            try:
                _apply(directory, setting, undo)
            except OSError as failure:
                if failure.errno != errno.EINVAL:
                    raise
                refused.append(setting)
                error = failure
        if error and len(refused) == len(waiting):
            raise error
        waiting = refused


def put_back(undo: Sequence[tuple[str, str]]) -> None:
    """Restore the values that `write_all` replaced, last first; errors are ignored."""
    waiting = list(reversed(undo))
    while waiting:
        refused = []
        for path, value in waiting:
            try:
                write(path, value or "\n")
            except OSError:
                refused.append((path, value))
        if len(refused) == len(waiting):
            return
        waiting = refused


def _apply(directory: Callable[[str], str | None], setting: Setting, undo: list[tuple[str, str]] | None) -> None:
    at = directory(setting.controller)
    path = f"{at}/{setting.file}"
    try:
        if at is None:
            raise FileNotFoundError
        before = _before(path, setting) if undo is not None else None
        write(path, setting.value)
    except FileNotFoundError:
        if setting.instead:
            _apply(directory, setting.instead, undo)
        elif not (setting.optional and setting.optional()):
            if at and not os.path.isdir(at):
                raise
            missing = f"file {setting.file}" if at else f"controller {setting.controller}"
            raise unsupported(setting.field, f"this host has no {missing}") from None
    except OSError as error:
        raise OSError(error.errno, f"linux.resources.{setting.field}: {error.strerror}", path) from None
    else:
        if undo is not None and before is not None:
            undo.append((path, before))


def _before(path: str, setting: Setting) -> str | None:
    """Return the value that restores the current state; None if there is none."""
    content = read(path)
    if content is None or setting.reset is None:
        return content if content is None or "\n" not in content else None
    key = setting.value.split()[0]
    return next((line for line in content.splitlines() if line.split()[:1] == [key]), f"{key} {setting.reset}")
