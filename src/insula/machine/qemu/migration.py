"""A machine that moves to another QEMU while it runs: first its disk, then its memory, and last the state of its
devices and processors.

The disk is copied by a mirror job to an NBD server in the other QEMU: what the guest writes meanwhile is written to
both disks before the guest is told that it is written (`write-blocking`), so that the copy is whole as soon as the job
is ready. Then the memory is sent while the guest runs, and pages that it writes are sent again. When few are left QEMU
stops the guest and waits (`pause-before-switchover`), the job is ended, and the rest is sent.

All goes through descriptors that QEMU is given; neither side has a network. This is the recipe of
docs/interop/live-block-operations.rst of QEMU, "QMP invocation for live storage migration with drive-mirror + NBD".
"""

from __future__ import annotations

import contextlib

from insula.machine.shim.qmp import Qmp, QmpError

DISK = "disk1"
"""The node of the machine's own disk (`command_line`), and the name of its export."""
_JOB, _TARGET = "move", "elsewhere"
_RATE = 10**11
"""Bytes a second: QEMU's own limit is for networks of old."""
_DOWNTIME = 50
"""Milliseconds that the rest of the memory may take. A machine that writes too fast for that gets more, step by
step (`allow_more`)."""
_PAUSES = [{"capability": "x-ignore-shared", "state": False}, {"capability": "pause-before-switchover", "state": True}]
_USUAL = [{"capability": "pause-before-switchover", "state": False}]


# -- the source --------------------------------------------------------------------------------------------------------


def copy_disk(qmp: Qmp, connection: int) -> None:
    """Begin to copy the disk to the NBD server behind a connected socket. QmpError."""
    qmp.give("disk", connection)
    server = {"type": "fd", "str": "disk"}
    qmp.execute(
        "blockdev-add",
        driver="nbd",
        server=server,
        export=DISK,
        discard="unmap",
        **{"node-name": _TARGET},
    )
    how = {"sync": "full", "copy-mode": "write-blocking"}
    qmp.execute("blockdev-mirror", device=DISK, target=_TARGET, **{"job-id": _JOB}, **how)


def is_disk_copied(qmp: Qmp) -> bool:
    """Whether both disks are the same, and stay so. QmpError if the job has failed."""
    if not (jobs := _jobs(qmp)):
        raise QmpError("the disk can't be copied: the other host has ended the connection, or can't write")
    return bool(jobs[0]["ready"])


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


def end_copy(qmp: Qmp) -> None:
    """End the job, now that the machine stands still: both disks have the same. QmpError."""
    qmp.execute("block-job-cancel", device=_JOB)


def has_ended(qmp: Qmp) -> bool:
    return not _jobs(qmp)


def hand_over(qmp: Qmp) -> None:
    """Send the rest. QmpError."""
    qmp.execute("migrate-continue", state="pre-switchover")


def give_up(qmp: Qmp) -> None:
    """Begin to end everything that was begun; `is_over` tells when that is."""
    for command, arguments in (("migrate_cancel", {}), ("block-job-cancel", {"device": _JOB, "force": True})):
        with contextlib.suppress(QmpError):  # it was not begun, or has ended
            qmp.execute(command, **arguments)


def is_over(qmp: Qmp) -> bool:
    """Whether QEMU does nothing of it any more. QmpError if QEMU does not answer."""
    found = qmp.execute("query-migrate").get("status", "none")
    return found in ("none", "cancelled", "failed", "completed") and has_ended(qmp)


def go_on(qmp: Qmp) -> None:
    """Let the machine go on here after all. QmpError."""
    with contextlib.suppress(QmpError):  # it was not made
        qmp.execute("blockdev-del", **{"node-name": _TARGET})
    qmp.execute("migrate-set-capabilities", capabilities=_USUAL)
    if not qmp.execute("query-status")["running"]:
        qmp.execute("cont")


def _jobs(qmp: Qmp) -> list[dict[str, object]]:
    return [each for each in qmp.execute("query-block-jobs") if each["device"] == _JOB]


# -- the destination ---------------------------------------------------------------------------------------------------


def receive(qmp: Qmp, listener: int, memory: int) -> None:
    """Begin to receive, in a machine that waits for it: the disk from the first one who connects to a listening socket,
    the memory from a descriptor. QmpError."""
    qmp.give("disk", listener)
    qmp.execute("nbd-server-start", addr={"type": "fd", "data": {"str": "disk"}}, **{"max-connections": 1})
    qmp.execute("block-export-add", type="nbd", id=DISK, name=DISK, writable=True, **{"node-name": DISK})
    qmp.give("memory", memory)
    qmp.execute("migrate-set-parameters", **{"max-bandwidth": _RATE})
    qmp.execute("migrate-incoming", uri="fd:memory")


def is_received(qmp: Qmp) -> bool:
    """Whether the whole machine is there. QmpError if QEMU has ended, as it does with what it can't load."""
    return bool(qmp.execute("query-status")["status"] != "inmigrate")


def close_disk(qmp: Qmp) -> None:
    """Let nobody write to the disk from outside any more. QmpError."""
    with contextlib.suppress(QmpError):  # it ends with its connection
        qmp.execute("block-export-del", id=DISK, mode="hard")
    qmp.execute("nbd-server-stop")
