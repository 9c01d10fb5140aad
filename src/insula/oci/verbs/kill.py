"""``kill ID [SIGNAL]``: send a signal to the first process of a container, or with --all to every one of its group.

The kernel kills all processes of a PID namespace with its first one. If a container has no PID namespace of its own,
SIGKILL is sent to the whole control group.

containerd looks for "container not running" in the error.
"""

from __future__ import annotations

import os

from insula.kernel import process
from insula.kernel.cgroups import Cgroup
from insula.model.cpython import signal
from insula.model.errors import Failed
from insula.model.units import parse_signal
from insula.oci.state import Container

TYPE_CHECKING = False
if TYPE_CHECKING:
    from insula.oci.options import VerbArguments
    from insula.oci.state import StateRecord


def run(arguments: VerbArguments) -> int:
    container = Container(arguments.root, arguments.id)
    number = signal_number(arguments.signal or "TERM")
    record = container.load()  # without its lock: a kill must not wait for a hook that hangs
    group = Cgroup(record["cgroup"]) if record["cgroup"] else None
    if group and arguments.all:
        _signal_all(group, number)
        return 0
    shared = group and number == signal.SIGKILL and not _has_pid_namespace(container)
    if group and shared and group.processes():  # also when the first one has ended already
        _signal_all(group, number)
        return 0
    _signal_first(container, record, number)
    if group and number == signal.SIGKILL and group.frozen():
        group.thaw()  # in version 1 a frozen process does not even die
    return 0


def _signal_all(group: Cgroup, number: int) -> None:
    if number == signal.SIGKILL:
        group.kill()
    else:
        group.signal(number)


def _signal_first(container: Container, record: StateRecord, number: int) -> None:
    gone = Failed(f"container not running: {container.id}", "its process has ended; delete it")
    if container.status(record) in ("stopped", "creating"):
        raise gone
    try:
        pidfd = process.open_process(record["pid"], record["start_time"])
    except ProcessLookupError:
        raise gone from None
    try:
        signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        raise gone from None
    finally:
        os.close(pidfd)


def _has_pid_namespace(container: Container) -> bool:
    """Whether the container has a PID namespace of its own, as opposed to one that it inherited or joined."""
    entries = container.config().get("linux", {}).get("namespaces", ())
    return any(entry["type"] == "pid" and not entry.get("path") for entry in entries)


def signal_number(text: str) -> int:
    """The number of the signal `text`; "0" is 0, which only checks that the process exists (kill(2))."""
    return 0 if text == "0" else parse_signal(text)
