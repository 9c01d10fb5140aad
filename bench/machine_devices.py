"""Devices of a virtual machine: para-virtualized ones (virtio) beside those of a PC (e1000, IDE), in Insula and in QEMU
alone with the same command line."""

from __future__ import annotations

import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bench.lib import GAP, Bench, Table
from bench.machine_network import GUEST, HOST, MIB, Contestant
from insula.kernel import tap
from insula.kernel.netns import call_in
from insula.machine.qemu import disk_machine, root
from insula.machine.qemu.command_line import GuestInterface
from insula.model.cpython import socket
from tests.support import guests as machines
from tests.support.linux_disk import linux_disk
from tests.support.machine import Namespaces
from tests.support.peers import Missing

ROUNDS = 5
BEFORE, DISK = 64 << 20, 64 << 20
"""Bytes of the system on its disk, and of what is read behind it."""
TIMES = 10
"""How often it is read: the guest's clock counts hundredths of a second."""
LONG = 300.0
KINDS = {"para": "virtio", "full": "e1000 and IDE"}
SCRIPT = f"""
ip link set eth0 up
busybox udhcpc -i eth0 -n -q -t 3 -T 1 -s /bin/lease || ip addr add {GUEST}/24 dev eth0
mkdir -p /www/cgi-bin
busybox dd if=/dev/zero of=/www/zeros bs=65536 count={MIB << 4}
for each in vda sda; do [ -e /dev/$each ] && disk=$each; done
cat > /www/cgi-bin/disk <<END
#!/bin/sh
echo
/bin/cat /proc/uptime
for each in {" ".join(map(str, range(TIMES)))}; do
    /bin/busybox dd if=/dev/$disk of=/dev/null bs=1M iflag=direct skip={BEFORE >> 20} count={DISK >> 20}
done
/bin/cat /proc/uptime
END
busybox chmod 755 /www/cgi-bin/disk
echo ready
exec busybox httpd -f -p 80 -h /www
"""
READ = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1], timeout=120).read().decode())"


def measure(bench: Bench) -> list[Table]:
    """A download and pings from outside of the guest, and a read of its disk past its cache."""
    if (found := machines.systems()) is None:
        raise Missing("Debian's kernel for all hardware is not there: scripts/systems fetches it")
    disk = bench.scratch / "linux.raw"
    disk.write_bytes(linux_disk(found / "kernel", SCRIPT).ljust(BEFORE, b"\0") + os.urandom(DISK))
    table = Table("Devices of a virtual machine", ["what", "TCP, Mbit/s", "ping, ms", "disk, MB/s"])
    for kind, devices in KINDS.items():
        for where, made in (("Insula", of_insula(bench, disk, kind)), ("QEMU alone", alone(disk, kind))):
            with made as guest:
                rounds = [_round(guest) for _ in range(bench.rounds(ROUNDS) + 1)][1:]
            figures = [statistics.median(each) for each in zip(*rounds, strict=True)]
            table.rows.append([f"{devices}: {where}", f"{figures[0]:.0f}", f"{figures[1]:.2f}", f"{figures[2]:.0f}"])
    table.notes += [
        f"Debian's kernel, 256 MiB, one processor, translated by QEMU (TCG); {MIB} MiB from httpd of busybox in it",
        f"Insula: to a container on its network; QEMU alone: to the other end of a tap; {DISK >> 20} MiB with O_DIRECT",
    ]
    return [table]


def _round(guest: Contestant) -> tuple[float, float, float]:
    """Megabits a second, milliseconds of the fastest answer to a ping, and megabytes a second of the disk."""
    rate = guest.megabits()
    time.sleep(GAP)
    ping = _in(guest, "busybox", "ping", "-q", "-c", "10", "-i", "0.1", guest.address)
    [delay] = re.findall(r"= ([0-9.]+)/", ping)
    text = _in(guest, sys.executable, "-c", READ, f"http://{guest.address}/cgi-bin/disk")
    began, _, ended, _ = map(float, text.split())  # uptime and idle time, before and after
    return rate, float(delay), TIMES * DISK / (ended - began) / 1e6


def _in(guest: Contestant, *command: str) -> str:
    words = Namespaces.wrap(guest.namespace, *command)
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=LONG).stdout


@contextmanager
def of_insula(bench: Bench, disk: Path, kind: str) -> Iterator[Contestant]:
    cli, name = bench.cli, f"linux-{kind}"
    cli.ok("image", "import", "--vm", "--devices", kind, disk, f"linux:{kind}", timeout=LONG)
    try:
        cli.ok("run", "-d", "--name", "client", "busybox", "sleep", "3600")
        cli.ok("run", "-d", "--vm", "-m", "256m", "--name", name, f"linux:{kind}", timeout=LONG)
        _wait(lambda: "ready" in cli.ok("logs", name))
        views = {view["instance"]["name"]: view for view in cli.json("ps")}
        address = views[name]["instance"]["ports"][0]["address"]
        yield Contestant(f"/proc/{views['client']['status']['pid']}/ns/net", address)
    finally:
        for each in (name, "client"):
            cli.run("rm", "-f", each)
        cli.run("image", "rm", f"linux:{kind}")


@contextmanager
def alone(disk: Path, kind: str) -> Iterator[Contestant]:
    """QEMU with the command line of Insula's machines of disk images, and no container. Its serial port is a pipe."""
    with ExitStack() as stack:
        place = Namespaces()
        stack.callback(place.close)
        namespace = stack.enter_context(open(place.outside, "rb"))
        device = call_in(namespace.fileno(), tap.make_here)
        stack.callback(os.close, device)
        name = tap.name(device)
        place.ip(place.outside, f"address add {HOST}/24 dev {name}")
        place.ip(place.outside, f"link set {name} up")
        own = stack.enter_context(disk.open("rb+"))
        seed = os.memfd_create("seed")
        stack.callback(os.close, seed)
        os.ftruncate(seed, 1 << 20)
        monitor, of_monitor = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        agent, of_agent = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        for each in (monitor, of_monitor, agent, of_agent):
            stack.callback(each.close)
        machine = disk_machine.DiskMachine(
            memory=256,
            disk=own.fileno(),
            seed=seed,
            qmp=of_monitor.fileno(),
            agent=of_agent.fileno(),
            devices=kind,
        )
        interface = GuestInterface("52:54:00:12:34:56", device, slot=machine.bus.slots[0])
        machine = machine._replace(interfaces=[interface])
        given = [*disk_machine.descriptors(machine), of_monitor.fileno(), of_agent.fileno()]
        words = disk_machine.arguments(machine, root.QEMU)
        output = stack.enter_context((disk.parent / "console").open("wb"))
        qemu = subprocess.Popen(words, pass_fds=given, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT)
        try:
            _wait(lambda: b"ready" in (disk.parent / "console").read_bytes() or qemu.poll() is not None)
            if qemu.poll() is not None:
                raise Missing(f"QEMU alone does not start: {(disk.parent / 'console').read_text()[-300:]}")
            yield Contestant(place.outside, GUEST)
        finally:
            qemu.send_signal(signal.SIGKILL)
            qemu.wait()


def _wait(ready: Callable[[], bool]) -> None:
    end = time.monotonic() + LONG
    while not ready():
        if time.monotonic() > end:
            raise Missing("the guest does not start")
        time.sleep(0.2)
