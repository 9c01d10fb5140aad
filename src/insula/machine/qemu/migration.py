"""A machine that moves to another QEMU while it runs: first its disks, then its memory, and last the state of its
devices and processors.

Each disk is copied by a mirror job to an NBD server in the other QEMU: what the guest writes meanwhile is written to
both disks before the guest is told that it is written (`write-blocking`), so that the copy is whole as soon as the job
is ready. Then the memory is sent while the guest runs, and pages that it writes are sent again. When few are left QEMU
stops the guest and waits (`pause-before-switchover`), the jobs are ended, and the rest is sent. Disks have the same
block nodes in both QEMUs, whose names are those of their exports.

All goes through descriptors that QEMU is given; neither side has a network. This is the recipe of
docs/interop/live-block-operations.rst of QEMU, "QMP invocation for live storage migration with drive-mirror + NBD".
"""

from __future__ import annotations

import contextlib

from insula.machine.shim.qmp import Qmp, QmpError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

DISK = "disk1"
"""The node of the machine's own disk (`command_line`)."""
_JOB, _TARGET = "move-", "elsewhere-"
"""The names of jobs, and of nodes for the copies, begin so; then comes the node of the disk."""
_RATE = 10**11
"""Bytes a second: QEMU's own limit is for networks of old."""
_DOWNTIME = 50
"""Milliseconds that the rest of the memory may take. A machine that writes too fast for that gets more, step by
step (`allow_more`)."""
_PAUSES = [{"capability": "x-ignore-shared", "state": False}, {"capability": "pause-before-switchover", "state": True}]
_USUAL = [{"capability": "pause-before-switchover", "state": False}]


# -- the source --------------------------------------------------------------------------------------------------------


def copy_disk(qmp: Qmp, node: str, connection: int) -> None:
    """Begin to copy the disk with a node to the NBD server behind a connected socket. QmpError."""
    target = f"{_TARGET}{node}"
    qmp.give(target, connection)
    server = {"type": "fd", "str": target}
    qmp.execute("blockdev-add", driver="nbd", server=server, export=node, discard="unmap", **{"node-name": target})
    how = {"sync": "full", "copy-mode": "write-blocking", "job-id": f"{_JOB}{node}"}
    qmp.execute("blockdev-mirror", device=node, target=target, **how)


def are_copied(qmp: Qmp, nodes: Sequence[str]) -> bool:
    """Whether all disks, with these nodes, are the same as their copies, and stay so. QmpError if a job has failed."""
    if len(jobs := _jobs(qmp)) < len(nodes):
        raise QmpError("a disk can't be copied: the other host has ended the connection, or can't write")
    return all(each["ready"] for each in jobs)


def send_memory(qmp: Qmp, target: int) -> None:
    """Begin to send the memory to a descriptor, of which QEMU gets a copy. QmpError."""
    qmp.execute("migrate-set-capabilities", capabilities=_PAUSES)
    qmp.execute("migrate-set-parameters", **{"max-bandwidth": _RATE, "downtime-limit": _DOWNTIME})
    qmp.give("memory", target)
    qmp.execute("migrate", uri="fd:memory")


def allow_more(qmp: Qmp, milliseconds: int) -> None:
    """Let the machine stand still for so long while the rest of its memory is sent. QmpError."""
    qmp.execute("migrate-set-parameters", **{"downtime-limit": milliseconds})


def status(qmp: Qmp) -> str:
    """How far the memory is: "pre-switchover" when the machine stands still, "completed" when all was sent. QmpError if
    it can't be sent."""
    found = qmp.execute("query-migrate")
    if found.get("status") in ("failed", "cancelled"):
        raise QmpError(f"the memory can't be sent: {found.get('error-desc') or found['status']}")
    return str(found.get("status"))


def end_copies(qmp: Qmp) -> None:
    """End the jobs, now that the machine stands still: the disks and their copies have the same. QmpError."""
    for job in _jobs(qmp):
        qmp.execute("block-job-cancel", device=job["device"])


def have_ended(qmp: Qmp) -> bool:
    return not _jobs(qmp)


def hand_over(qmp: Qmp) -> None:
    """Send the rest. QmpError."""
    qmp.execute("migrate-continue", state="pre-switchover")


def give_up(qmp: Qmp) -> None:
    """Begin to end everything that was begun; `is_over` tells when that is."""
    with contextlib.suppress(QmpError):  # it was not begun, or has ended
        qmp.execute("migrate_cancel")
    for job in _jobs(qmp):
        with contextlib.suppress(QmpError):  # it has ended meanwhile
            qmp.execute("block-job-cancel", device=job["device"], force=True)


def is_over(qmp: Qmp) -> bool:
    """Whether QEMU does nothing of it any more. QmpError if QEMU does not answer."""
    found = qmp.execute("query-migrate").get("status", "none")
    return found in ("none", "cancelled", "failed", "completed") and have_ended(qmp)


def go_on(qmp: Qmp, nodes: Sequence[str]) -> None:
    """Let the machine go on here after all. QmpError."""
    for node in nodes:
        with contextlib.suppress(QmpError):  # it was not made
            qmp.execute("blockdev-del", **{"node-name": f"{_TARGET}{node}"})
    qmp.execute("migrate-set-capabilities", capabilities=_USUAL)
    if not qmp.execute("query-status")["running"]:
        qmp.execute("cont")


def _jobs(qmp: Qmp) -> list[dict[str, object]]:
    return [each for each in qmp.execute("query-block-jobs") if str(each["device"]).startswith(_JOB)]


# -- the destination ---------------------------------------------------------------------------------------------------


def receive(qmp: Qmp, nodes: Sequence[str], listener: int, memory: int) -> None:
    """Begin to receive, in a machine that waits for it: the disks with these nodes from those who connect to a
    listening socket first, the memory from a descriptor. QmpError."""
    qmp.give("disks", listener)
    address = {"type": "fd", "data": {"str": "disks"}}
    qmp.execute("nbd-server-start", addr=address, **{"max-connections": len(nodes)})
    for node in nodes:
        qmp.execute("block-export-add", type="nbd", id=node, name=node, writable=True, **{"node-name": node})
    qmp.give("memory", memory)
    qmp.execute("migrate-set-parameters", **{"max-bandwidth": _RATE})
    qmp.execute("migrate-incoming", uri="fd:memory")


def is_received(qmp: Qmp) -> bool:
    """Whether the whole machine is there. QmpError if QEMU has ended, as it does with what it can't load."""
    return bool(qmp.execute("query-status")["status"] != "inmigrate")


def close_disks(qmp: Qmp, nodes: Sequence[str]) -> None:
    """Let nobody write to the disks from outside any more. QmpError."""
    for node in nodes:
        with contextlib.suppress(QmpError):  # it ends with its connection
            qmp.execute("block-export-del", id=node, mode="hard")
    qmp.execute("nbd-server-stop")
