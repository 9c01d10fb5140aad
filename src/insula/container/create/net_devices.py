"""`linux.netDevices` of the OCI runtime-spec: devices of the host that are moved into a container's network namespace.

When the namespace ends, the kernel decides what becomes of them, not the runtime (config-linux.md). Only if the
creation fails, they are moved back.
"""

from __future__ import annotations

import os

from insula.container.create.steps import StepError, Steps
from insula.kernel.netlink.devices import Moved, NamespaceSocket, move

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from insula.kernel.rollback import Rollback


def give(devices: dict[str, Any], pid: int, undo: Rollback, held: Rollback) -> None:
    """Move `devices` into the network namespace of `pid`. StepError names one that can't be moved.

    `undo` moves them back; `held` closes the descriptors for that, and so must run after it.
    """
    own, theirs = (_namespace(path, held) for path in ("/proc/self/ns/net", f"/proc/{pid}/ns/net"))
    for name, entry in devices.items():
        try:
            moved = move(own, name, theirs, entry.get("name") or name)
        except OSError as error:
            raise StepError(Steps.MOVE_NET_DEVICE, error, name) from None
        undo.callback(lambda name=name, moved=moved: _take_back(theirs, moved, own, name))


def _namespace(path: str, held: Rollback) -> NamespaceSocket:
    namespace = NamespaceSocket(held.hold(os.open(path, os.O_RDONLY | os.O_CLOEXEC)))
    held.callback(namespace.close)
    return namespace


def _take_back(theirs: NamespaceSocket, moved: Moved, own: NamespaceSocket, name: str) -> None:
    try:
        move(theirs, moved.name, own, name, up=moved.was_up)
    except OSError:  # somebody took its name here meanwhile: the failure that is told is the first
        return
