"""The network of a virtual machine: a TCP stream out of a guest, compared with QEMU alone on a tap."""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

from bench.lib import GAP, Bench, Table
from insula.kernel import tap
from insula.kernel.event_loop import EventLoop
from insula.kernel.netns import call_in
from insula.machine.qemu import root, template
from insula.machine.qemu.state import load
from insula.machine.shim.agent import AgentConnection
from insula.machine.shim.plan import command
from insula.machine.shim.qmp import Qmp
from insula.machine.shim.start import StartedQemu
from tests.support import guests as machines
from tests.support.guests import DISK, Guests
from tests.support.machine import Namespaces
from tests.support.peers import Missing

ROUNDS = 9
MIB = 32
HOST, GUEST = "198.51.100.1", "198.51.100.2"
SERVE = f"mkdir /www; dd if=/dev/zero of=/www/zeros bs=65536 count={MIB << 4}; exec busybox httpd -f -p 80 -h /www"
CLIENT = """
import sys, time, urllib.request
for _ in range(100):
    try:
        answer = urllib.request.urlopen(f"http://{sys.argv[1]}/zeros", timeout=60)
        break
    except OSError:
        time.sleep(0.2)
began, count, buffer = time.perf_counter(), 0, bytearray(1 << 20)
while found := answer.readinto(buffer):
    count += found
print(count * 8 / (time.perf_counter() - began) / 1e6)
"""


class Contestant(NamedTuple):
    """A guest that serves a file over HTTP, seen from a network namespace."""

    namespace: str
    address: str

    def megabits(self) -> float:
        """Megabits a second of a download."""
        words = Namespaces.wrap(self.namespace, sys.executable, "-c", CLIENT, self.address)
        return float(subprocess.run(words, capture_output=True, text=True, check=True, timeout=120).stdout)


def measure(bench: Bench) -> list[Table]:
    if (found := machines.kernel()) is None:
        raise Missing("the kernel of guests is not there: scripts/kernel fetches it")
    path = bench.scratch / "guests"
    path.mkdir()
    with ExitStack() as stack:
        guests = Guests(path, found)
        stack.callback(guests.close)
        contestants = {
            "a machine to a container, on a tenant's network": stack.enter_context(of_insula(bench)),
            "QEMU alone, to the other end of a tap": stack.enter_context(alone(guests)),
        }
        rounds = bench.rounds(ROUNDS)
        rates: dict[str, list[float]] = {name: [] for name in contestants}
        for number in range(rounds + 1):
            for name, each in contestants.items():
                rate = each.megabits()
                if number:
                    rates[name].append(rate)
                time.sleep(GAP)
    table = Table("The network of a virtual machine", ["what", "TCP, Mbit/s"])
    table.rows += [[name, f"{statistics.median(found):.0f}"] for name, found in rates.items()]
    table.notes.append(f"{MIB} MiB from httpd of busybox in a guest of 160 MiB, translated by QEMU (TCG); virtio")
    return [table]


@contextmanager
def of_insula(bench: Bench) -> Iterator[Contestant]:
    cli = bench.cli
    try:
        run = ("run", "-d", "--vm", "-m", "160m", "--name", "server", "busybox", "sh", "-c", SERVE)
        cli.ok(*run, timeout=300)
        cli.ok("run", "-d", "--name", "client", "busybox", "sleep", "3600")
        views = {view["instance"]["name"]: view for view in cli.json("ps")}
        namespace = f"/proc/{views['client']['status']['pid']}/ns/net"
        yield Contestant(namespace, views["server"]["instance"]["ports"][0]["address"])
    finally:
        for name in ("server", "client"):
            cli.run("rm", "-f", name)


@contextmanager
def alone(guests: Guests) -> Iterator[Contestant]:
    """QEMU with the command line of Insula's machines, and no container; the kernel of this host is at the other end of
    its tap, in a namespace of its own."""
    with ExitStack() as stack:
        place = Namespaces()
        stack.callback(place.close)
        namespace = stack.enter_context(open(place.outside, "rb"))
        device = call_in(namespace.fileno(), tap.make_here)
        name = tap.name(device)
        place.ip(place.outside, f"address add {HOST}/24 dev {name}")
        place.ip(place.outside, f"link set {name} up")
        stack.callback(start_alone(guests, device))
        yield Contestant(place.outside, GUEST)


def start_alone(guests: Guests, device: int) -> Callable[[], None]:
    """Start QEMU with the tap `device`, which is closed, and the server in the guest. Return what ends it."""
    nic = template.INTERFACES[0]
    with guests.given() as (disk, descriptors):
        copies = [*(os.dup(fd) for fd in descriptors), device]
        config = guests.machine(False, copies[:-1])._replace(interfaces=[nic._replace(fd=device)])
        kernel, initramfs = (f"{guests.root}{path}" for path in (root.KERNEL, root.INITRAMFS))
        plan = command(config._replace(kernel=kernel, initramfs=initramfs), root.QEMU)
        qemu = StartedQemu(plan)  # which closes what QEMU has been given
        for fd in {*copies} - {*plan["descriptors"]}:
            os.close(fd)
        disk.unlink()
    load(Qmp(qemu.qmp), plan["state"], DISK)
    loop = EventLoop("bench")
    agent = AgentConnection(qemu.agent.detach(), loop, lambda: None)
    agent.request("identity", hostname="guest", generation="bench", seed=os.urandom(64).hex(), time=time.time_ns())
    interface = {"hardware": nic.mac, "name": "eth0", "mac": nic.mac, "mtu": 1500, "addresses": [f"{GUEST}/24"]}
    agent.request("network", interfaces=[interface], routes=[], tables=[])
    agent.serve()
    nothing = [os.open("/dev/null", os.O_RDWR) for _ in range(3)]
    program = {"config": guests.config("sh", "-c", SERVE), "machine": uuid.uuid4().hex, "read_only": False, "files": {}}
    started: list[bool] = []
    agent.run("start", program, nothing, lambda end: started.append(False)).started = lambda: started.append(True)
    while not started:
        loop.turn(lambda: None, lambda: None)

    def end() -> None:
        os.kill(qemu.pid, signal.SIGKILL)
        os.waitpid(qemu.pid, 0)

    if not started[0]:
        end()
        raise Missing("the program does not start in QEMU alone")
    return end
