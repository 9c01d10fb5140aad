"""Ports of virtual machines that run: plugged in and unplugged, with insulad and QEMU in all states."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from insula.control.instances.drivers.machine import plugging
from insula.kernel import tap
from insula.kernel.netlink import Rtnl
from insula.kernel.netns import call_in
from insula.model.errors import Failed
from insula.model.objects import Network, Port
from insula.network.fabric import Nic, TapNic
from tests.support.cli import Cli
from tests.support.daemon import Daemon
from tests.support.guests import Guest, Guests
from tests.support.wait import until

BARE = "/dev/disk/by-id/virtio-bare"
LONG = 300.0
MAC = "02:00:00:00:00:02"
NETWORK = Network(tenant="t", name="n", index=1, subnet="10.8.0.0/24", gateway="10.8.0.1", mtu=1450, vni=1, created=0)
STUBBORN = """\
#!{interpreter} -ISB
import os
from insula.agent import early
early.leave_first_root()
early.mount_kernel_file_systems()
devices = "/sys/bus/pci/devices"
bridge, = (each for each in os.listdir(devices) if open(devices + "/" + each + "/class").read() == "0x060400\\n")
open(devices + "/" + bridge + "/remove", "w").write("1")
from insula.agent.main import main
main()
"""
SERVE = "while :; do echo from the machine | nc -l -p 80; done"


def lan(cli: Cli, number: int) -> None:
    """Another network, with a container `onN` on it."""
    cli.ok("network", "create", f"net{number}", "--subnet", f"10.8.{number}.0/24")
    cli.ok("run", "-d", "--name", f"on{number}", "--network", f"net{number}", "busybox", "sleep", "1000")


def ports(cli: Cli) -> dict[str, Any]:
    """The ports of the machine, by network."""
    [found] = [each["instance"] for each in cli.json("ps", "-a") if each["instance"]["name"] == "vm"]
    return {port["network"]: port for port in found["ports"]}


def devices(cli: Cli) -> list[str]:
    return cli.ok("exec", "vm", "ls", "/sys/class/net").split()


def reached(cli: Cli, number: int) -> bool:
    """Whether the machine answers at its address on a network. Its name has all of its addresses."""
    address = ports(cli)[f"net{number}"]["address"]
    return cli.run("exec", f"on{number}", "nc", "-w", "2", address, "80").out == "from the machine\n"


def test_ports_come_and_go_while_it_runs(cli: Cli, daemon: Daemon) -> None:
    """It is reached on a network that it was plugged into, by its name there, and answers by the same way; connections
    on the first network go on. It is proven, traced and explained as others are. A restart keeps the port."""
    for number in range(3):
        lan(cli, number)
    cli.ok("run", "-d", "--vm", "--name", "vm", "--network", "net0", "busybox", "sh", "-c", SERVE, timeout=LONG)
    until(lambda: reached(cli, 0), "it is reached on the first", LONG)
    cli.ok("port", "plug", "vm", "net1", timeout=LONG)
    until(lambda: reached(cli, 1), "it is reached on the second", LONG)
    assert reached(cli, 0), "and still on the first"
    port = ports(cli)["net1"]
    shown = cli.ok("exec", "vm", "ip", "addr", "show", "eth1")
    assert port["mac"] in shown and f"{port['address']}/24" in shown
    assert cli.run("exec", "vm", "ping", "-c", "1", "on1").status == 0
    routes = cli.ok("exec", "vm", "ip", "route").splitlines()
    assert [line.split()[2:5] for line in routes if line.startswith("default")] == [["10.8.0.1", "dev", "eth0"]]
    assert cli.json("verify")["passed"], "its port is proven as others are"

    cli.ok("port", "plug", "vm", "net2", timeout=LONG)
    cli.ok("port", "unplug", "vm", "net0", timeout=LONG)
    assert devices(cli) == ["eth1", "eth2", "lo"]
    until(lambda: reached(cli, 2) and reached(cli, 1), "it is reached on the others", LONG)
    routes = cli.ok("exec", "vm", "ip", "route").splitlines()
    assert [line.split()[2:5] for line in routes if line.startswith("default")] == [["10.8.1.1", "dev", "eth1"]]
    assert cli.json("verify")["passed"]

    daemon.kill("insulad")
    daemon.start()
    cli.ok("port", "plug", "vm", "net0", timeout=LONG)
    assert devices(cli) == ["eth0", "eth1", "eth2", "lo"]
    until(lambda: reached(cli, 0) and reached(cli, 1), "it is reached on all", LONG)
    cli.ok("stop", "-t", "0", "vm")
    cli.ok("start", "vm", timeout=LONG)
    until(lambda: reached(cli, 0) and reached(cli, 2), "it is reached after another start", LONG)
    assert cli.json("verify")["passed"]
    cli.ok("rm", "-f", "vm")


def test_a_machine_on_no_network_gets_one_and_machines_that_do_not_answer(cli: Cli) -> None:
    """While QEMU stands still nothing is plugged in: the verb fails in time, and changes nothing."""
    lan(cli, 3)
    lan(cli, 4)
    cli.ok("run", "-d", "--vm", "--name", "vm", "--network", "none", "busybox", "sh", "-c", SERVE, timeout=LONG)
    cli.ok("port", "plug", "vm", "net3", timeout=LONG)
    until(lambda: reached(cli, 3), "it is reached", LONG)
    assert "eth0" in devices(cli)

    [status] = [each["status"] for each in cli.json("ps") if each["instance"]["name"] == "vm"]
    qemu = int(Path(f"/proc/{status['pid']}/task/{status['pid']}/children").read_text().split()[0])
    os.kill(qemu, signal.SIGSTOP)
    try:
        assert "does not answer" in cli.fails("port", "plug", "vm", "net4")
        assert set(ports(cli)) == {"net3"}
    finally:
        os.kill(qemu, signal.SIGCONT)
    cli.ok("port", "plug", "vm", "net4", timeout=LONG)
    until(lambda: reached(cli, 4) and reached(cli, 3), "it is reached on both", LONG)
    assert cli.json("verify")["passed"]
    cli.ok("pause", "vm")
    assert "paused" in cli.fails("port", "unplug", "vm", "net4")
    cli.ok("rm", "-f", "vm")


def test_a_guest_that_takes_nothing_and_lets_nothing_go(tmp_path: Path, guests_kernel: Path) -> None:
    """It has removed the bridge. What is plugged in is refused in time; then it goes, tap and all, whatever the guest
    does, and another one gets another slot."""
    guests = Guests(tmp_path, guests_kernel, STUBBORN)
    with guests.start("sh", "-c", "echo ready; cat") as guest:
        assert guest.line() == "ready\n"
        plugged_and_unplugged(guest, 1)
        plugged_and_unplugged(guest, 2)
        assert guest.execute("echo", "it goes on") == (0, "it goes on\n", "")
    guests.close()


def plugged_and_unplugged(guest: Guest, index: int) -> None:
    port = Port(tenant="t", network="n", instance="i", index=index, interface="eth0", mac=MAC, address="10.8.0.2")
    netns = -1

    async def connect(nic: Nic, port: int | None = None) -> None:
        nonlocal netns
        assert isinstance(nic, TapNic) and nic.fd is not None
        netns = tap.namespace(nic.fd)
        nic.close()

    with pytest.raises(Failed, match="the guest has not configured it: there is no device"):
        asyncio.run(plugging.plug(guest.netns, [], [(NETWORK, port)], connect))
    assert links(netns) == ["lo", "tap0"], "the machine has it"
    asyncio.run(plugging.unplug(guest.netns(), index, []))
    assert links(netns) == ["lo"], "the tap is gone"
    os.close(netns)


def links(netns: int) -> list[str]:
    with call_in(netns, Rtnl) as rtnl:
        return sorted(link.name for link in rtnl.links())


def test_disks_come_and_go(cli: Cli, daemon: Daemon) -> None:
    """One that is mounted where programs see it, and one that is bare; they are there after another start. A disk that
    is in use is not removed; one that is removed leaves nothing."""
    files = daemon.root / "instances"
    cli.ok("run", "-d", "--vm", "--name", "vm", "--network", "none", "busybox", "sleep", "1000", timeout=LONG)
    cli.ok("disk", "add", "--size", "200m", "--mount", "/data", "vm", "data", timeout=LONG)
    cli.ok("exec", "vm", "sh", "-c", "echo kept > /data/file; sync")
    size = int(cli.ok("exec", "vm", "df", "-m", "/data").splitlines()[-1].split()[1])
    assert 150 < size < 200 and cli.ok("exec", "vm", "ls", "/data").split() == ["file", "lost+found"]
    cli.ok("disk", "add", "--size", "64m", "vm", "bare", timeout=LONG)
    assert cli.ok("exec", "vm", "cat", "/sys/block/vdd/serial", "/sys/block/vdd/size") in ("bare131072", "bare\n131072")
    cli.ok("exec", "vm", "sh", "-c", f"echo of the bare one > {BARE}; sync")
    assert [each["name"] for each in cli.json("disk", "ls", "vm")] == ["data", "bare"]
    assert [each.name for each in sorted(files.glob("*/disks/*"))] == ["bare", "data"]

    daemon.kill("insulad")
    daemon.start()
    cli.ok("exec", "-d", "vm", "sh", "-c", "exec 3</data/file; sleep 1000")
    until(lambda: "sleep" in cli.ok("exec", "vm", "ps"), "a program has a file open")
    assert "in use" in cli.fails("disk", "rm", "vm", "data")
    assert cli.ok("exec", "vm", "cat", "/data/file") == "kept"

    cli.ok("stop", "-t", "0", "vm")
    cli.ok("start", "vm", timeout=LONG)
    assert cli.ok("exec", "vm", "cat", "/data/file") == "kept"
    assert cli.ok("exec", "vm", "head", "-n", "1", BARE) == "of the bare one"
    cli.ok("disk", "rm", "vm", "bare", timeout=LONG)
    assert cli.ok("exec", "vm", "ls", "/dev/disk/by-id") == ""
    assert "vdd" not in cli.ok("exec", "vm", "ls", "/sys/block") and not list(files.glob("*/disks/bare"))
    cli.ok("disk", "rm", "vm", "data", timeout=LONG)
    assert cli.ok("exec", "vm", "ls", "/data") == "" and not list(files.glob("*/disks/data"))
    for refused in (("vm", "disk"), ("vm", "x" * 21), ("vm", "a/b"), ("nobody", "a")):
        cli.fails("disk", "add", *refused)
    assert "proc" in cli.fails("disk", "add", "--mount", "/proc/x", "vm", "other")
    assert "no disk" in cli.fails("disk", "rm", "vm", "other")
    cli.ok("rm", "-f", "vm")
