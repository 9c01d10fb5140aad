"""Virtual machines that move to another QEMU while they run: how long it takes, and how long they stand still, beside
QEMU alone with the same recipe, whose sockets are joined without anything in between."""

from __future__ import annotations

import os
import socket
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import closing

from bench.lib import GAP, Bench, Table, comparison
from bench.machines import IDENTITY, ready
from insula.control.instances.drivers.machine.relay import waiting
from insula.kernel import sealed
from insula.kernel.event_loop import EventLoop
from insula.machine.qemu import migration, root
from insula.machine.qemu.state import load
from insula.machine.shim.agent import AgentConnection
from insula.machine.shim.plan import command
from insula.machine.shim.qmp import Qmp
from insula.machine.shim.start import StartedQemu
from tests.support import guests as machines
from tests.support.guests import DISK, Guest, Guests
from tests.support.migrations import Move, Output, describe
from tests.support.peers import Missing
from tests.support.wait import until

ROUNDS = 5
FILE = 30 << 20
TICK = """\
dd if=/dev/urandom of=/data bs=1M count=30 2>/dev/null; sync; n=0
while :; do n=$((n + 1)); echo $n; sleep 0.01; done
"""
_PAUSE = 0.002


def measure(bench: Bench) -> list[Table]:
    if (found := machines.kernel()) is None:
        raise Missing("the kernel of guests is not there: scripts/kernel fetches it")
    path = bench.scratch / "moving guests"
    path.mkdir()
    guests = Guests(path, found)
    sealed.mount_sealed()  # as insulad does
    times: dict[str, list[float]] = defaultdict(list)
    try:
        for number in range(bench.rounds(ROUNDS) + 1):
            for who, (whole, still) in (("QEMU alone", bare(guests)), ("Insula", jailed(guests))):
                if number:
                    times[f"{who}: from the beginning until it runs there"].append(whole)
                    times[f"{who}: it stands still"].append(still)
            time.sleep(GAP)
    finally:
        guests.close()
    table = comparison("Migration of a virtual machine with its disk", times, {}, f"{next(iter(times))}")
    table.notes += [
        "160 MiB of memory, 30 MiB of random data on a disk of 1 GiB; both QEMUs on this machine, translated (TCG)",
        "Insula: both in their containers; bytes are passed by frames, as between two hosts; no TLS, no control plane",
        "it stands still from when QEMU has stopped it until the other QEMU lets it go on",
        "QEMU alone: its own count of the time that the machine is down; no program runs in it",
    ]
    return [table]


def jailed(guests: Guests) -> tuple[float, float]:
    """Seconds for the whole, and that the program stood still."""
    with guests.start("sh", "-c", TICK) as source:
        first = Output(source)
        until(lambda: len(first.lines) > 10, "it prints")
        with guests.start(arriving=describe(source)["machine"]) as target:
            until(lambda: target.pid, "its container is there")
            move, second = Move(source, target), Output(target)
            move.netns = [quickly(guest) for guest in (source, target)]
            if move.run() != [None, None]:
                raise Missing("the machine did not move")
            until(lambda: second.lines, "it prints there")
            there = ready(target)
            return move.seconds, there["began"] + there["seconds"]["own"] - move.given[0]["still"]


def quickly(guest: Guest) -> Callable[[], int]:
    """`Guest.netns` without the process that it starts."""
    netns = guest.netns()
    return lambda: os.dup(netns)


def bare(guests: Guests) -> tuple[float, float]:
    with guests.given() as (disk, descriptors), guests.given() as (other, more):
        with disk.open("r+b") as file:
            file.seek(DISK - FILE)
            file.write(os.urandom(FILE))
        kernel, initramfs = (f"{guests.root}{path}" for path in (root.KERNEL, root.INITRAMFS))
        qemus = []
        try:
            for arriving, given in ((False, descriptors), (True, more)):
                config = guests.machine(False, [os.dup(fd) for fd in given])
                if arriving:
                    config = config._replace(memory_fd=-1, state=-1, machine="pc-q35-7.2", arriving=True)
                plan = command(config._replace(kernel=kernel, initramfs=initramfs), root.QEMU)
                qemus.append(StartedQemu(plan))
            source, target = (Qmp(qemu.qmp) for qemu in qemus)
            load(source, qemus[0].plan["state"], DISK)
            agent = AgentConnection(qemus[0].agent.fileno(), EventLoop("bench"), lambda: None)
            agent.request("identity", **IDENTITY, seed=os.urandom(64).hex(), time=time.time_ns())
            return move(source, target)
        finally:
            for qemu in qemus:
                os.kill(qemu.pid, 9)
                os.waitpid(qemu.pid, 0)
            disk.unlink()
            other.unlink()


def move(source: Qmp, target: Qmp) -> tuple[float, float]:
    """Move a machine as the shim does, with sockets that join both sides."""
    listener, [disk] = waiting(1)
    memory, of_memory = socket.socketpair()
    with closing(listener), closing(disk), closing(memory), closing(of_memory):
        migration.receive(target, [migration.DISK], listener.fileno(), of_memory.fileno())
        begun = time.monotonic()
        migration.copy_disk(source, migration.DISK, disk.fileno())
        wait(lambda: migration.are_copied(source, [migration.DISK]))
        migration.send_memory(source, memory.fileno())
        wait(lambda: migration.status(source) == "pre-switchover")
        migration.end_copies(source)
        wait(lambda: migration.have_ended(source))
        migration.hand_over(source)
        wait(lambda: migration.status(source) == "completed")
        wait(lambda: migration.is_received(target))
        migration.close_disks(target, [migration.DISK])
        target.execute("cont")
        return time.monotonic() - begun, source.execute("query-migrate")["downtime"] / 1000


def wait(done: Callable[[], bool]) -> None:
    while not done():
        time.sleep(_PAUSE)
