"""What the shim and the programs that talk to it have in common."""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

NAME = "\0insula-shim"
"""The socket for `exec`: in the abstract namespace (unix(7)), which is that of the container's network."""
FAILED = 125
"""The exit status if the machine could not be started, as of engines."""
_SAID = 300  # characters of an error
RESIZED = 28  # SIGWINCH
_OWN = frozenset({4, 5, 7, 8, 9, 11, 13, 17, 19, RESIZED})
"""Signals that can't be caught (SIGKILL, SIGSTOP), that the kernel sends for faults, and SIGPIPE and SIGCHLD."""
FORWARDED = tuple(number for number in (*range(1, 32), *range(34, 65)) if number not in _OWN)
"""Signals for the program. 32 and 33 are the C library's."""


def status_of(end: dict[str, Any]) -> int:
    """The exit status for how a program ended, as a shell has it: 128 and the signal, 127 if there is no such program,
    126 if it can't be executed."""
    if "status" in end:
        status = end["status"] if isinstance(end["status"], int) else 255  # a guest may say anything
        return (status if status >= 0 else 128 - status) & 255
    return 127 if end.get("errno") == 2 else 126


def say(end: dict[str, Any]) -> None:
    """Say on standard error why a program was not executed, if it was not."""
    if "step" in end:
        os.write(2, f"{end['step']}: {end.get('error')}"[:_SAID].encode(errors="replace") + b"\n")
