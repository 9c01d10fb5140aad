"""The protocol between builds of different versions: names of files, and the first message on a connection.

The files are below the run directory. Their names are those of version 0.1.0, so that any build finds the processes of
any other. On either socket a client may ask who serves it:

    {"op": "hello", "protocol": 1, "build": "…"}  →  {"protocol": 1, "build": "…"}

0.1.0 doesn't know that request: its monitor closes the connection, its zygote answers with an error. Either counts as
protocol 0.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from insula.container import wire

PROTOCOL = 1
"""Raised when a request changes its meaning. New requests and new fields don't raise it: what is unknown is ignored."""

MONITOR_SOCKET, MONITOR_LOCK, MONITOR_PID = "keeper.sock", "keeper.lock", "keeper.pid"
ZYGOTE_SOCKET, ZYGOTE_PID = "spawner.sock", "spawner.pid"
"""A .pid file has the PID and the start time (field 22 of proc_pid_stat(5)), separated by a space."""
MONITOR_BUILD, ZYGOTE_BUILD = "keeper.build", "spawner.build"
"""The build that runs, for scripts. 0.1.0 writes none."""
WARM_RECORDS = "spares"
"""A directory with a file for each warm container, which has the path of its control group."""

_PACKAGES = ("container", "kernel", "model", "tree")


def hello(build: str) -> wire.Message:
    """The fields of a hello, and of its answer."""
    return {"protocol": PROTOCOL, "build": build}
