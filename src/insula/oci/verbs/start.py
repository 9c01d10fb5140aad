"""``start ID``: have the process of a created container execute the user's program.

The process waits at a socket in the container's directory for the message "start". It then closes the connection by
execve(2), or sends the error.
"""

from __future__ import annotations

import os
import select

from insula.container.create import spawn
from insula.container.create.steps import StepError
from insula.kernel import process
from insula.kernel.rollback import Rollback
from insula.model.cpython import socket
from insula.model.errors import Conflict, Failed
from insula.oci import creation
from insula.oci.failure import explain
from insula.oci.state import Container

TYPE_CHECKING = False
if TYPE_CHECKING:
    from insula.oci.options import VerbArguments

_PATIENCE = 5000
"""Milliseconds."""
_REFUSALS = {  # in runc's words, which callers look for
    "creating": "cannot start a container in the creating state",
    "running": "cannot start an already running container",
    "paused": "cannot start an already running container: it is paused",
    "stopped": "cannot start a container that has stopped",
}


def run(arguments: VerbArguments) -> int:
    container = Container(arguments.root, arguments.id)
    with container, Rollback() as undo:
        record = container.load()
        status = container.status(record)
        if status != "created":
            raise Conflict(_REFUSALS[status], "only a created one can be started, and only once")
        made = creation.Created(container, container.config(), arguments)
        made.record, made.pid = record, record["pid"]
        pidfd = undo.hold(process.open_process(record["pid"], record["start_time"]))
        sync = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        undo.callback(sync.close)
        try:
            container.at_start_socket(sync.connect)
        except ConnectionRefusedError:
            raise Failed(f"container {container.id} doesn't wait to be started", "delete it") from None
        made.child = spawn.SpawnedProcess(record["pid"], pidfd, sync)
        try:
            creation.start(made)
        except StepError as error:
            _await_end(pidfd)
            if made.started:
                _destroy(made)
            raise explain(error) from None
        finally:
            _unlink(container.start_socket)
        creation.await_ready(made)
    return 0


def _destroy(made: creation.Created) -> None:
    """Remove a container whose poststart hook failed, as runtime.md has it."""
    from insula.oci.verbs import delete

    delete.end(made.record)
    made.container.remove()
    made.poststop()


def _await_end(pidfd: int) -> None:
    """Wait until the process has ended: an engine removes a container as soon as its start has failed."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.poll(_PATIENCE)


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:  # it was deleted by force meanwhile
        return
