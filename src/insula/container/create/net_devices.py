"""`linux.netDevices` of the OCI runtime-spec: devices of the host that a container gets, in its network namespace.

They are its from then on: what becomes of them when the namespace ends is the kernel's to decide, not the runtime's
(config-linux.md). Only a creation that fails moves them back.
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
    """Move `devices` from here into the network namespace of `pid`. StepError names one that can't be.

    `undo` moves them back; `held` closes what that takes, and so must come after it.
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
