"""``checkpoint ID``: save a running container to files (kernel/criu.py), from which `restore` resumes it.

Unless --leave-running is given, its processes end where they were, and the container is deleted. --pre-dump writes only
memory, while the container runs on; the next one with --parent-path writes what has changed since, and so stops the
container for a shorter time.
"""

from __future__ import annotations

import os

from insula.container import checkpoint
from insula.kernel import criu
from insula.model.errors import Conflict, Invalid
from insula.oci.state import Container
from insula.oci.verbs import delete

TYPE_CHECKING = False
if TYPE_CHECKING:
    from insula.oci.options import VerbArguments

_FLAGS = ("leave_running", "tcp_established", "ext_unix_sk", "shell_job", "file_locks", "auto_dedup")
"""Options that criu has under the same name."""


def run(arguments: VerbArguments) -> int:
    program = criu.find(arguments.criu)
    images, work = directories(arguments)
    container = Container(arguments.root, arguments.id)
    with container:
        record = container.load()
        status = container.status(record)
        if status not in ("running", "paused"):
            raise Conflict(f"container {container.id} is {status}", "only a running container can be checkpointed")
        words = checkpoint.dump_arguments(record["pid"], container.config(), images)
        words += [*flags(arguments, _FLAGS), *_memory(arguments, images)]
        criu.run(program, "pre-dump" if arguments.pre_dump else "dump", words, work=work)
        if arguments.leave_running or arguments.pre_dump:
            return 0
    delete.delete(container, arguments, force=True)  # its processes are dead, but may not be gone yet
    return 0


def directories(arguments: VerbArguments) -> tuple[str, str]:
    """The directories of the images and of criu's logs, which are made."""
    images = os.path.abspath(arguments.image_path or "checkpoint")
    work = os.path.abspath(arguments.work_path or images)
    for path in (images, work):
        os.makedirs(path, 0o700, exist_ok=True)
    return images, work


def flags(arguments: VerbArguments, names: tuple[str, ...]) -> list[str]:
    """Options that are passed on to criu as they are."""
    words = [f"--{name.replace('_', '-')}" for name in names if getattr(arguments, name)]
    words += [f"--manage-cgroups={arguments.manage_cgroups_mode or 'soft'}"]
    for kind in arguments.empty_ns:
        if kind != "network":
            raise Invalid(f"--empty-ns {kind[:60]!r}: only a network can be left empty", "--empty-ns network")
        words += ["--empty-ns", "net"]
    return words


def _memory(arguments: VerbArguments, images: str) -> list[str]:
    words = []
    if arguments.parent_path:
        words += ["--prev-images-dir", os.path.relpath(arguments.parent_path, images)]
    if arguments.parent_path or arguments.pre_dump:
        words += ["--track-mem"]
    if arguments.page_server:
        address, _, port = arguments.page_server.rpartition(":")
        if not port.isdecimal():
            raise Invalid(f"--page-server {arguments.page_server[:60]!r} has no port", "as in 10.0.0.1:1234")
        words += ["--page-server", "--address", address, "--port", port]
    return words
