"""``restore ID``: make a container from a bundle and a checkpoint, and resume it.

Its processes are made by criu, with their old PIDs, and not by container/create/spawn.py. The root, the bind
mounts, the control group with its limits and the standard streams come from the bundle and the command line.
"""

from __future__ import annotations

import os

from insula.container import checkpoint as names
from insula.kernel import criu, process, syscalls
from insula.kernel.rollback import Rollback
from insula.model.errors import Failed
from insula.oci import creation, streams
from insula.oci.state import Container
from insula.oci.verbs.checkpoint import directories, flags

TYPE_CHECKING = False
if TYPE_CHECKING:
    from insula.oci.options import VerbArguments

_FLAGS = ("tcp_established", "ext_unix_sk", "shell_job", "file_locks", "auto_dedup")


def run(arguments: VerbArguments) -> int:
    program = criu.find(arguments.criu)
    images, work = directories(arguments)
    streams.fill_standard_streams()
    bundle = os.path.abspath(arguments.bundle or ".")
    made = creation.Created(Container(arguments.root, arguments.id), creation.read_config(arguments, bundle), arguments)
    pid_file = os.path.abspath(arguments.pid_file) if arguments.pid_file else None
    os.chdir(bundle)
    with Rollback() as undo:
        group = creation.announce(made, bundle, undo)
        if group:
            group.create()
            undo.callback(group.remove)
            group.limit(made.config["linux"].get("resources") or {})
        pid = _restore(made, program, images, work, undo)
        made.record["pid"], made.record["start_time"] = pid, process.start_time(pid) or 0
        made.container.save(made.record)
        if pid_file:
            streams.write_pid(pid_file, pid)
        if arguments.detach:
            undo.keep()
            return 0
        made.container.unlock()
        from insula.oci import foreground

        return foreground.wait(pid)


def _restore(made: creation.Created, program: str, images: str, work: str, undo: Rollback) -> int:
    """The PID of the container's first process, which `undo` kills."""
    words, keep = names.restore_arguments(made.config, images)
    pid_file = f"{made.container.path}/restored.pid"
    words += ["--root", _own_mount(made.record["rootfs"]), "--restore-detached", "--pidfile", pid_file]
    words += flags(made.arguments, _FLAGS)
    if not made.arguments.detach:
        syscalls.prctl(syscalls.PR_SET_CHILD_SUBREAPER, 1)  # what criu leaves behind is ours to wait for
    try:
        criu.run(program, "restore", words, work=work, keep=keep)
    finally:
        for fd in keep:
            if fd > 2:
                os.close(fd)
    with open(pid_file) as file:
        pid = int(file.read())
    os.unlink(pid_file)
    undo.callback(lambda: _kill(pid))
    return pid


def _own_mount(root: str) -> str:
    """`root` as a mount of its own, which criu takes for the new root. No other process sees it."""
    syscalls.unshare(syscalls.CLONE_NEWNS)
    # nothing goes to the host; what the host mounts still comes, and goes on to mounts that were slaves of the host's
    syscalls.mount(None, "/", None, syscalls.MS_REC | syscalls.MS_SLAVE)
    syscalls.mount(None, "/", None, syscalls.MS_REC | syscalls.MS_SHARED)
    try:
        syscalls.mount(root, root, None, syscalls.MS_BIND | syscalls.MS_REC)
        syscalls.mount(None, root, None, syscalls.MS_PRIVATE)
    except OSError as error:
        raise Failed(f"root.path {root!r} can't be mounted: {error.strerror}", "check that it exists") from None
    return root


def _kill(pid: int) -> None:
    try:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    except (ProcessLookupError, ChildProcessError):
        return
