"""Runs attacks, each in a forked child, and reports their results: in a container as a program, elsewhere as a
function.

As a program it reads a list of calls `[module, function, arguments]` from the standard input as JSON, and prints the
list of their ends. A value that JSON doesn't know is its repr().
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import signal
import sys
import traceback
from typing import Any

TIMEOUT = 20
PACKAGE = "tests.system.escape.attacks"


def call(module: str, name: str, arguments: list[Any]) -> dict[str, Any]:
    """How `module.name(*arguments)` ends in a child: {"value"}, {"errno", "why"}, {"signal"} or {"broken"}."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        signal.alarm(TIMEOUT)
        with os.fdopen(writer, "w") as pipe:
            json.dump(_end_of(module, name, arguments), pipe, default=repr)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return {"signal": signal.Signals(os.WTERMSIG(status)).name}
    end: dict[str, Any] = json.loads(said)
    return end


def _end_of(module: str, name: str, arguments: list[Any]) -> dict[str, Any]:
    try:
        function = getattr(importlib.import_module(f"{PACKAGE}.{module}"), name)
        return {"value": function(*arguments)}
    except OSError as error:
        return {"errno": errno.errorcode.get(error.errno or 0, str(error.errno)), "why": str(error)}
    except BaseException:
        return {"broken": traceback.format_exc()}


if __name__ == "__main__":
    sys.path.insert(0, "/attack")
    json.dump([call(*wanted) for wanted in json.load(sys.stdin)], sys.stdout)
