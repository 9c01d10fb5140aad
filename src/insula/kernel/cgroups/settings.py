"""A limit is a value written into a file of a group's directory.

Some values constrain one another: memory may not exceed memory and swap together, nor a quota of processor time what
the parent has in such a period. So while they change, the kernel refuses with EINVAL what will be right after the next
write, and which order is the right one depends on the values that are in force. Nothing is read to find out: what is
refused is tried again after the others, as long as that helps.

On a group that runs, a change that fails half-way must not stay: `write_all` with `undo` reads each value before it is
replaced, and puts it back.
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
    """`value` for `file` in the group's directory of `controller`, because of `field` of linux.resources.

    A file of many lines is one of keys (cgroup-v2.rst, "nested keyed"): a write replaces the line that begins with the
    value's first word, and `reset` is what takes such a line away. On a host that lacks the file `instead` is written,
    or nothing if `dispensable` says so.
    """

    __slots__ = ("controller", "dispensable", "field", "file", "instead", "reset", "value")

    def __init__(
        self,
        field: str,
        controller: str,
        file: str,
        value: object,
        *,
        reset: str | None = None,
        instead: Setting | None = None,
        dispensable: Callable[[], bool] | None = None,
    ) -> None:
        self.field = field
        self.controller = controller
        self.file = file
        self.value = str(value)
        self.reset = reset
        self.instead = instead
        self.dispensable = dispensable

    def __repr__(self) -> str:
        return f"{self.controller}/{self.file}={self.value}"


def unsupported(field: str, why: str) -> OSError:
    """A field of linux.resources that this host has nothing for."""
    return OSError(errno.EOPNOTSUPP, f"linux.resources.{field} is not supported here: {why}")


def always() -> bool:
    """For a setting that any host may lack."""
    return True


def nothing_swaps() -> bool:
    """Whether memory could be swapped to nowhere (proc_swaps(5)): then no limit of swap is missed."""
    return "\n" not in (read("/proc/swaps") or "")


def write_all(
    directory: Callable[[str], str | None], settings: Sequence[Setting], *, undo: list[tuple[str, str]] | None = None
) -> None:
    """Write every setting; `directory` tells a controller's, or None if the host lacks it.

    OSError names the field and the file that refused. What was replaced until then is appended to `undo`, if given, as
    (path, value).
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
    """Write what `write_all` replaced, last first; what can't be is left."""
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
        elif not (setting.dispensable and setting.dispensable()):
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
    """What to write to have things as they are now; None if nothing can be."""
    content = read(path)
    if content is None or setting.reset is None:
        return content if content is None or "\n" not in content else None
    key = setting.value.split()[0]
    return next((line for line in content.splitlines() if line.split()[:1] == [key]), f"{key} {setting.reset}")
