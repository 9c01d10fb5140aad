"""Debian's kernel for all hardware on a disk of its own: a system that knows nothing of Insula, with both kinds of
devices. Which kind it has is shown by the drivers that its kernel binds to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from insula.machine.disk import firmware
from tests.support.cli import Cli
from tests.support.daemon import Daemon
from tests.support.guests import systems
from tests.support.linux_disk import linux_disk
from tests.support.linux_uefi_disk import MEMORY, linux_uefi_disk
from tests.support.wait import until

LONG = 300.0
SCRIPT = """
until [ -e /dev/vdb ] || [ -e /dev/sdb ]; do sleep 1; done
for each in /sys/bus/*/drivers/*/*; do
    case ${each##*/} in 0000:*|virtio[0-9]*) driver=${each%/*}; echo "driver ${driver##*/}";; esac
done
for each in vdb sdb sda; do mount -t vfat -o ro /dev/$each /mnt 2>/dev/null && break; done
echo "seed $(cat /mnt/meta-data)"
ip link set eth0 up
echo "disks $(ls /sys/block | tr '\\n' ' ')mtu $(cat /sys/class/net/eth0/mtu)"
udhcpc -i eth0 -O mtu -n -q -t 30 -s /bin/lease
echo ready
while :; do echo from the machine | nc -l -p 80; done &
last=
while :; do
    now=$(cd /sys/class/net; echo *; cd /sys/block; echo *)
    if [ "$now" != "$last" ]; then
        for each in $(cd /sys/block; echo [sv]d?); do
            case $(cat /sys/block/$each/size) in 131072|65536) ;; *) continue;; esac
            echo "disk $(cat /sys/block/$each/size) $(head -c 4 /dev/$each)"
            echo kept > /dev/$each
            sync
        done
        case "$last $now" in *eth1*eth1*) ;; *eth1*) [ ! -e /sys/class/net/eth1 ] || {
            ip link set eth1 up; udhcpc -i eth1 -n -q -t 30 -s /bin/lease; } ;; esac
        echo "has" $now
        last=$now
    fi
    sleep 0.2
done
"""
DRIVERS = {"para": {"virtio_net", "virtio_blk"}, "full": {"e1000", "ata_piix"}}
SEEN = {"para": "disks vda vdb mtu 1400", "full": "disks sda sdb mtu 1500"}
"""A device of a PC does not tell the system the MTU of its network: DHCP does."""


@pytest.mark.parametrize("devices", ["para", "full"])
def test_an_unmodified_system_has_its_network_and_its_disks(
    cli: Cli, tmp_path: Path, daemon: Daemon, devices: str
) -> None:
    """By DHCP it gets the addresses of its port, and a container is answered: on the network that it was started on,
    and on one that it is plugged into. Disks of virtio come and go too, others while it does not run."""
    found = systems()
    if found is None:
        pytest.skip("the systems of guests are not there: scripts/systems makes them")
    disk = tmp_path / "disk.raw"
    disk.write_bytes(linux_disk(found / "kernel", SCRIPT))
    image = cli.json("image", "import", "--vm", "--devices", devices, disk, f"linux:{devices}")
    assert image["disk"]["firmware"] == "bios"
    name, network = f"vm-{devices}", f"net-{devices}"
    subnet = "10.7.0" if devices == "para" else "10.8.0"
    cli.ok("network", "create", network, "--subnet", f"{subnet}.0/24", "--mtu", "1400")
    cli.ok("run", "-d", "--name", "beside", "--network", network, "busybox", "sleep", "1000")
    words = ("--name", name, "--network", network, "-m", "256m", f"linux:{devices}")
    cli.ok("run", "-d", "--vm", *words, timeout=LONG)

    def shown() -> str:
        text = cli.ok("logs", name)
        return text if "ready" in text or instance(cli, name)["status"]["state"] == "exited" else ""

    text = until(shown, "it is ready", LONG)
    bound = {line.split()[1] for line in text.splitlines() if line.startswith("driver ")}
    other = "full" if devices == "para" else "para"
    assert bound >= DRIVERS[devices] and not bound & DRIVERS[other], text
    assert SEEN[devices] in text
    own = instance(cli, name)["instance"]
    assert f'"instance-id": "{own["id"]}"' in text and f'"local-hostname": "{name}"' in text
    assert f"lease {own['ports'][0]['address']} router {subnet}.1 mtu 1400" in text

    def answers() -> bool:
        return cli.run("exec", "beside", "nc", "-w", "2", name, "80").out == "from the machine\n"

    until(answers, "a container is answered, by name", LONG)
    assert cli.json("verify")["passed"]
    ports_come_and_go(cli, name)
    if devices == "para":
        disks_come_and_go(cli, name, daemon)
    else:
        assert "while it runs" in cli.fails("disk", "add", "--size", "32m", name, "data")
        assert cli.json("disk", "ls", name) == []
    cli.ok("stop", "-t", "0", name)
    cli.ok("disk", "add", "--size", "32m", name, "more")
    starts = cli.ok("logs", name).count("ready")
    cli.ok("start", name, timeout=LONG)
    until(lambda: cli.ok("logs", name).count("ready") > starts, "it is started again", LONG)
    until(lambda: "has eth0 eth1 lo" in logs_of_start(cli, name), "with the port", LONG)
    until(lambda: f"disk {(32 << 20) // 512}" in logs_of_start(cli, name), "and with the disk", LONG)
    cli.ok("rm", "-f", name, "beside")


@pytest.mark.skipif(firmware.find() is None, reason="UEFI firmware is not installed: apt install ovmf")
def test_devices_of_a_pc_behind_pci_express(cli: Cli, tmp_path: Path) -> None:
    """With UEFI firmware the board has PCI Express, and the network devices are behind a bridge: the system finds those
    of its start and those that come while it runs."""
    found = systems()
    if found is None:
        pytest.skip("the systems of guests are not there: scripts/systems makes them")
    disk = tmp_path / "disk.raw"
    disk.write_bytes(linux_uefi_disk(found / "kernel", SCRIPT))
    how = ("--devices", "full", "--firmware", "uefi")
    cli.ok("image", "import", "--vm", *how, disk, "linux:pcie", timeout=LONG)
    cli.ok("network", "create", "net-pcie", "--subnet", "10.11.0.0/24", "--mtu", "1400")
    cli.ok("run", "-d", "--name", "beside", "--network", "net-pcie", "busybox", "sleep", "1000")
    words = ("--name", "vm-pcie", "--network", "net-pcie", "-m", f"{MEMORY >> 20}m", "linux:pcie")
    cli.ok("run", "-d", "--vm", *words, timeout=LONG)
    text = until(lambda: "ready" in (shown := cli.ok("logs", "vm-pcie")) and shown, "it is ready", LONG)
    bound = {line.split()[1] for line in str(text).splitlines() if line.startswith("driver ")}
    assert bound >= {"e1000", "ahci"} and not bound & DRIVERS["para"], text
    address = instance(cli, "vm-pcie")["instance"]["ports"][0]["address"]
    assert f"lease {address} router 10.11.0.1 mtu 1400" in str(text)
    asks = ("exec", "beside", "nc", "-w", "2", "vm-pcie", "80")
    until(lambda: cli.run(*asks).out == "from the machine\n", "a container is answered, by name", LONG)
    assert cli.json("verify")["passed"]
    ports_come_and_go(cli, "vm-pcie")
    cli.ok("rm", "-f", "vm-pcie", "beside")


def ports_come_and_go(cli: Cli, name: str) -> None:
    """One is plugged in, unplugged, and plugged in again; that of its start goes and comes too."""
    number = {"vm-para": 9, "vm-full": 10, "vm-pcie": 12}[name]
    cli.ok("network", "create", f"other-{name}", "--subnet", f"10.{number}.0.0/24")
    cli.ok("run", "-d", "--name", f"on-other-{name}", "--network", f"other-{name}", "busybox", "sleep", "1000")
    for times in (1, 2):
        cli.ok("port", "plug", name, f"other-{name}", timeout=LONG)
        address = instance(cli, name)["instance"]["ports"][1]["address"]
        until(lambda a=address: f"lease {a}" in cli.ok("logs", name), "it has a lease", LONG)  # type: ignore[misc]
        there = ("exec", f"on-other-{name}", "nc", "-w", "2", address, "80")
        until(lambda there=there: "from" in cli.run(*there).out, "it answers there", LONG)  # type: ignore[misc]
        assert cli.json("verify")["passed"]
        if times == 1:
            cli.ok("port", "unplug", name, "eth1", timeout=LONG)
            until(lambda: last(cli, name).startswith("has eth0 lo"), "the device is gone", LONG)
    cli.ok("port", "unplug", name, "eth0", timeout=LONG)
    until(lambda: last(cli, name).startswith("has eth1 lo"), "the first device goes as well", LONG)
    cli.ok("port", "plug", name, f"net-{name.removeprefix('vm-')}", timeout=LONG)
    until(lambda: last(cli, name).startswith("has eth0 eth1 lo"), "and comes again", LONG)


def disks_come_and_go(cli: Cli, name: str, daemon: Daemon) -> None:
    """What is on them is the system's business. Nothing is left of one that is removed."""
    cli.ok("disk", "add", "--size", "64m", name, "data", timeout=LONG)
    until(lambda: f"disk {(64 << 20) // 512}" in cli.ok("logs", name), "it has the disk", LONG)
    until(lambda: "vdc" in last(cli, name), "and has written to it", LONG)
    [disk] = daemon.root.glob("instances/*/disks/data")
    until(lambda: disk.read_bytes()[:5] == b"kept\n", "it arrives in the file", LONG)
    assert "agent" in cli.fails("disk", "add", "--size", "64m", "--mount", "/data", name, "other")
    cli.ok("disk", "rm", name, "data", timeout=LONG)
    until(lambda: "vdc" not in last(cli, name), "it is gone", LONG)
    assert cli.json("disk", "ls", name) == [] and not disk.exists()


def last(cli: Cli, name: str) -> str:
    """What the system says last that it has."""
    return next((line for line in reversed(cli.ok("logs", name).splitlines()) if line.startswith("has ")), "")


def logs_of_start(cli: Cli, name: str) -> str:
    return cli.ok("logs", name).rpartition("ready")[2]


def instance(cli: Cli, name: str) -> dict[str, Any]:
    [found] = [each for each in cli.json("ps", "-a") if each["instance"]["name"] == name]
    return dict(found)
