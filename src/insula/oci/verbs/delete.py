"""``delete ID``: remove a container that is stopped or created; with --force any, which is killed first.

Its processes go first, then its control group, then its directory, so that a later `delete` finds what is left if this
one is killed. Then the poststop hooks run. --force also removes what a killed `create` has left.
"""

from __future__ import annotations

import os
import select

from insula.kernel import process
from insula.kernel.cgroups import Cgroup
from insula.model.cpython import signal
from insula.model.errors import Conflict, Failed, InsulaError, NotFound
from insula.oci import log
from insula.oci.options import CommandLineError
from insula.oci.state import Container, containers

TYPE_CHECKING = False
if TYPE_CHECKING:
    from insula.oci.options import VerbArguments
    from insula.oci.state import StateRecord

_PATIENCE = 10_000  # milliseconds that a killed process may take to die
_SOON = 500  # milliseconds that it usually takes


def run(arguments: VerbArguments) -> int:
    if not arguments.regex:
        delete(Container(arguments.root, arguments.id), arguments, force=arguments.force)
        return 0
    import re

    try:
        wanted = re.compile(arguments.id)
    except re.error as error:
        raise CommandLineError(
            f"{arguments.id[:60]!r} is no regular expression: {error}", "as in --regex '^web-'"
        ) from None
    status = 0
    for container in containers(arguments.root):
        if wanted.search(container.id):
            try:
                delete(container, arguments, force=arguments.force)
            except InsulaError as error:  # the others go all the same
                log.error(f"{error.message}; hint: {error.hint}", arguments)
                status = 1
    return status


def delete(container: Container, arguments: VerbArguments, *, force: bool) -> None:
    """Remove one container and run its poststop hooks, whose failures are warnings in the log of `arguments`.

    With `force` it is killed first, and a missing container is no error. Else raises NotFound, Conflict.
    """
    try:
        container.lock()
    except NotFound:
        if force:
            return
        raise
    with container:
        record = container.record()
        if record is None:
            if not force:
                container.load()  # says that there is none
            container.remove()
            return
        status = container.status(record)
        if status not in ("stopped", "created") and not force:
            complaint = f"cannot delete container {container.id} that is not stopped: {status}"
            raise Conflict(complaint, "stop it, or use --force")
        config, state = container.config(), container.oci_state(record, "stopped")
        end(record)
        container.remove()
    if config.get("hooks"):
        from insula.container.create import hooks

        hooks.run_all(config, "poststop", state, lambda message: log.warning(message, arguments))


def end(record: StateRecord) -> None:
    """Kill what is left of a container's processes, and remove its control group."""
    group = Cgroup(record["cgroup"]) if record["cgroup"] else None
    try:
        pidfd = process.open_process(record["pid"], record["start_time"])
    except OSError:  # it is gone, or never was
        pidfd = -1
    if pidfd >= 0:
        try:
            _kill(pidfd, group, record)
        finally:
            os.close(pidfd)
    if record["scope"]:
        from insula.kernel.cgroups.systemd import Scope

        Scope("system.slice", record["scope"]).stop()  # the slice doesn't matter: units have one namespace
    if group:
        group.remove()


def _kill(pidfd: int, group: Cgroup | None, record: StateRecord) -> None:
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except ProcessLookupError:
        return
    if group and group.frozen():
        group.thaw()  # in version 1 a frozen process does not even die
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    if group and not poll.poll(_SOON):
        _take_back(group, record["pid"])
    if group and group.exists():
        for pid in group.processes():  # what it had forked where it was
            _take_back(group, pid)
    if not poll.poll(_PATIENCE):
        raise Failed(f"process {record['pid']} of container {record['id']} doesn't die", "see its state in ps(1)")


def _take_back(group: Cgroup, pid: int) -> None:
    """Move a process back into the container's group: one in a frozen group of others can't die there."""
    try:
        group.take_back(pid)
    except OSError:  # its own group is gone, too
        return
