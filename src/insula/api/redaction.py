"""Texts of errors for those who don't see the host: without the host's paths, and the PIDs in them.

Most errors name what a tenant knows by its own names. What comes from deep below, as a file that can't be removed, has
the path in it, which is of use to the operator. `shown` replaces it for everybody else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextvars import ContextVar
from typing import Final

from insula.model.errors import InsulaError

HIDDEN: Final = "…"
_KERNEL: Final = ("/proc/[0-9]+", "/sys/fs/cgroup/", "/sys/class/net/", "/run/netns/")


def pattern_of(directories: Iterable[object]) -> re.Pattern[str]:
    """Return a pattern of the kernel's paths that are the host's, and of paths in these directories."""
    names = (*(re.escape(str(each)) + r"(?![\w-]|\.\w)" for each in directories), *_KERNEL)
    return re.compile(rf"(?<![\w.-])(?:{'|'.join(names)})[^\s'\",;:()\[\]]*")


_EVERYWHERE: Final = pattern_of(())
_hidden: ContextVar[re.Pattern[str] | None] = ContextVar("hidden", default=_EVERYWHERE)


def hide(pattern: re.Pattern[str] | None) -> None:
    """Hide what fits the pattern from the sender of this task's request; None hides nothing."""
    _hidden.set(pattern)


def shown(text: str) -> str:
    """Return a text as the sender of this task's request may see it."""
    pattern = _hidden.get()
    return pattern.sub(HIDDEN, text) if pattern and "/" in text else text


def problem_of(error: InsulaError, status: int | None = None) -> dict[str, str | int | None]:
    """Return `InsulaError.to_problem` as the sender of this task's request may see it."""
    found = error.to_problem(status)
    return {name: shown(value) if isinstance(value, str) else value for name, value in found.items()}
