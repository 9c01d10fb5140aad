"""Replace the program of a process by another build's with execve(2), which keeps its PID, children and files.

The new program gets the state of the old one as a JSON document in a file of memory, whose descriptor is in the
environment variable INSULA_MONITOR_STATE. Descriptors that it names are open in the new program, under their numbers.
"""

from __future__ import annotations

import json
import os
from typing import Any, NoReturn

STATE = "INSULA_MONITOR_STATE"
VERSION = 1
"""Of the document. A program that finds a later version takes nothing but the descriptors' list, and closes them."""


def execute(
    program: int, arguments: list[str], environment: dict[str, str], state: dict[str, Any], descriptors: list[int]
) -> NoReturn:
    """Execute the open file `program`; `descriptors` stay open. OSError if that fails, and then nothing has changed."""
    document = {**state, "version": VERSION, "descriptors": descriptors}
    file = os.memfd_create("insula-state", 0)  # without MFD_CLOEXEC
    try:
        with open(os.dup(file), "w", encoding="ascii") as writer:
            json.dump(document, writer)
        for fd in descriptors:
            os.set_inheritable(fd, True)
        os.execve(program, arguments, {**os.environ, **environment, STATE: str(file)})
    except BaseException:
        for fd in descriptors:
            os.set_inheritable(fd, False)
        os.close(file)
        raise


def inherited() -> dict[str, Any] | None:
    """The state that the program before this one left; None if there was none."""
    number = os.environ.pop(STATE, None)
    if number is None:
        return None
    with open(int(number), "rb") as file:
        file.seek(0)
        document: dict[str, Any] = json.load(file)
    for fd in document["descriptors"]:
        os.set_inheritable(fd, False)
    return document
