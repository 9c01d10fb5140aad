"""Pass the listener of a seccomp filter to an agent of the host, for system calls with the action SCMP_ACT_NOTIFY.

The kernel suspends such a call, and asks the holder of the filter's listener (seccomp_unotify(2)). The listener is a
descriptor that seccomp(2) returns to the process that loads the filter. That is the container's process, which must not
decide for itself: an agent does, over the socket `listenerPath`. Until the agent has the listener, it can't answer. So
the child only calls write(2), which a profile can't notify about, and the parent fetches the listener with
pidfd_getfd(2):

    child                                        parent
    seccomp() → 7
    write: {"event": "listener", "fd": 7}   →    pidfd_getfd(child, 7)
                                                 container process state and descriptor → listenerPath
    read                                    ←    {"event": "listening"}
"""

from __future__ import annotations

import os
import struct

from insula.kernel import syscalls
from insula.model.cpython import dumps, socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

_PATIENCE = 10.0  # seconds for the agent to take it


def offer(sync: int, listener: int) -> None:
    """In the child: send the number of the listener over the socket `sync`, and wait until an agent has it."""
    os.write(sync, dumps({"event": "listener", "fd": listener}).encode())
    if not os.read(sync, 4096):
        os._exit(1)  # without a parent there is no agent: the next call could wait for ever


def pass_on(pidfd: int, listener: int, profile: Mapping[str, Any], state: Mapping[str, Any], pid: int) -> None:
    """In the parent: send the container process state and its descriptor to the profile's `listenerPath`.

    `listener` is the number in the process behind `pidfd`; `state` is the container's (runtime.md of the runtime-spec);
    `pid` the process, which may be one that joins. OSError if the process has ended or no process listens there.
    """
    message = {
        "ociVersion": state["ociVersion"],
        "fds": ["seccompFd"],
        "pid": pid,
        **({"metadata": profile["listenerMetadata"]} if profile.get("listenerMetadata") else {}),
        "state": state,
    }
    data = dumps(message).encode()
    path = profile["listenerPath"]
    fd = syscalls.pidfd_getfd(pidfd, listener)
    try:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(_PATIENCE)
            try:
                sock.connect(path)
            except OSError as error:
                why = f"failed to connect with seccomp agent: {error.strerror or error}"
                raise OSError(error.errno, why) from None
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", fd))]
            sent = sock.sendmsg([data], rights)
            if sent < len(data):  # to send nothing fails, too, when the agent has read all and closed
                sock.sendall(data[sent:])
        except OSError as error:
            raise OSError(error.errno, f"listenerPath: {error.strerror or error}", path) from None
        finally:
            sock.close()
    finally:
        os.close(fd)
