"""Virtual machines that move while they run, with their disk: from one QEMU in its container to another one.

Kernel, QEMU, agent and shim are real; the link between two hosts is a pair of queues. That of two insulads is
tested in test_migration_hosts.py.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from insula.control.instances.drivers.machine import migration, moving, network
from insula.control.instances.drivers.machine.shim import ask
from insula.control.instances.drivers.migration import Unsettled
from insula.kernel import tap
from insula.machine.qemu.root import QEMU
from insula.model.errors import Conflict, Failed, NotFound
from insula.model.migration import MachineFacts, MigrationTarget
from insula.model.stream import Kind
from insula.network.fabric import TapNic
from tests.support.guests import Guest, Guests
from tests.support.hosts import Cloud
from tests.support.lab import isolated
from tests.support.migrations import Move, Output, QueueLink, describe
from tests.support.objects import instance
from tests.support.wait import patiently, until

WORK = """\
dd if=/dev/urandom of=/data bs=1M count=30 2>/dev/null; sync; sha256sum /data | cut -c1-64 > /sum
echo ready; n=0
while :; do n=$((n + 1)); echo $n; echo $n > /counter; sync; sleep 0.02; done
"""


@contextmanager
def waiting(guests: Guests, source: Guest, **others: Any) -> Iterator[Guest]:
    """A guest that waits for the source to come."""
    with guests.start(arriving=describe(source)["machine"], **others) as target:
        until(lambda: target.pid, "its container is there", 30)
        yield target


def check_files(guest: Guest, least: int) -> None:
    """What was written before is there, and what is written now; the clock is right."""
    status, out, err = guest.execute("sh", "-c", "sha256sum /data; cat /sum /counter; date +%s")
    assert status == 0, err
    found, _, kept, counter, now = out.split()
    assert found == kept and len(kept) == 64
    assert int(counter) >= least and abs(int(now) - time.time()) < patiently(2)


def test_it_goes_on_with_its_memory_its_disk_and_its_streams(guests: Guests) -> None:
    with guests.start("sh", "-c", WORK) as source:
        first = Output(source)
        until(lambda: first.numbers, "it works", 60)
        with ThreadPoolExecutor(1) as pool, waiting(guests, source) as target:
            second, move = Output(target), Move(source, target)
            beside = pool.submit(source.execute, "sh", "-c", "echo began >> /began; exec sleep 1000")
            until(lambda: source.execute("cat", "/began")[1] == "began\n", "it runs", 30)
            assert move.run() == [None, None]
            assert len(move.given) == len(move.owned) == 1
            before = len(second.lines)
            asyncio.run(moving.settle(source.netns, gone=True))
            assert source.process.wait(patiently(60)) == 0
            status, _, err = beside.result(patiently(60))
            assert status == 126 and "the machine has moved to another host" in err
            second.goes_on()
            assert len(second.lines) > before
            numbers = [*first.numbers, *second.numbers]
            assert numbers == list(range(1, len(numbers) + 1)), "each line once, in order, at one of the hosts"
            check_files(target, first.numbers[-1])


def at(kind: Kind, least: int, do: Callable[[], object]) -> Callable[[QueueLink, QueueLink], Awaitable[None]]:
    """Do something as soon as so many bytes of a kind were sent."""

    async def during(ours: QueueLink, theirs: QueueLink) -> None:
        while ours.carried[kind] < least:
            await asyncio.sleep(0.001)
        done = do()
        if isinstance(done, Awaitable):
            await done

    return during


def test_it_goes_on_where_it_was_if_it_can_not_move(guests: Guests) -> None:
    """Whatever ends, and whenever."""
    with guests.start("sh", "-c", WORK) as source:
        output = Output(source)
        until(lambda: output.numbers, "it works", 60)
        for kind, least in ((Kind.DISK, 10 << 20), (Kind.MEMORY, 10 << 20)):
            with waiting(guests, source) as target:
                move = Move(source, target)
                found = move.run(at(kind, least, lambda target=target: os.kill(target.pid, signal.SIGKILL)))  # type: ignore[misc]
                assert [type(each) for each in found] == [Failed, NotFound], found
                assert move.given == move.owned == []
            output.goes_on()
            with waiting(guests, source) as target:
                move = Move(source, target)

                async def cut(ours: QueueLink, theirs: QueueLink, kind: Kind = kind, least: int = least) -> None:
                    await at(kind, least, ours.cut)(ours, theirs)
                    await theirs.cut()

                found = move.run(cut)
                assert [type(each) for each in found] == [Failed, Failed], found
                assert move.given == move.owned == []
            output.goes_on()

        with waiting(guests, source) as target:  # insulad of the destination ends just as it is given the machine
            move = Move(source, target)

            async def ends(ours: QueueLink, theirs: QueueLink) -> None:
                def look(kind: Kind, payload: bytes) -> None:
                    if b'"own"' in payload:
                        ours.is_cut = theirs.is_cut = True

                ours.on_send = look
                while not ours.is_cut:
                    await asyncio.sleep(0.01)
                await ours.cut()
                await theirs.cut()

            found = move.run(ends)
            assert [type(each) for each in found] == [Unsettled, Failed], found
            assert len(move.given) == 1 and move.owned == []
            seen = len(output.lines)
            time.sleep(1)
            assert len(output.lines) == seen, "it stands still, until it is known whose it is"
        asyncio.run(moving.settle(source.netns, gone=False))
        output.goes_on()
        assert output.numbers == list(range(1, len(output.numbers) + 1))
        check_files(source, 1)
        assert asyncio.run(ask(source.netns(), {"ask": "end"})) == {"running": True}, "nobody ends one that is here"
        for question, why in {
            "nonsense": "there is no such question",
            "arrive": "it comes from no other host",
            "attach": "it comes with a descriptor",
        }.items():
            told = asyncio.run(ask(source.netns(), {"ask": question, "disk": "data", "path": None}))
            assert told == {"error": why}, "it goes on, and says why it refuses"
        with waiting(guests, source) as target:
            there = Output(target)
            assert Move(source, target).run() == [None, None], "and it may move after all"
            there.goes_on()


class MachinePort:
    """The port of a machine in a cloud of hosts: `tap` is the machine's side, one for each host that it is on."""

    def __init__(self, cloud: Cloud, name: str, host: int) -> None:
        self.cloud = cloud
        stands = cloud.instance("acme", name, host)  # in its place, to get a port
        cloud.unplug(stands, cloud.hosts[host - 1])
        self.port = stands.port
        self.network = cloud.networks["acme", self.port.network]
        self.tap = tap.make()
        self.plug(self.tap, host)

    def plug(self, fd: int, host: int) -> None:
        there, nic = self.cloud.hosts[host - 1], TapNic(os.dup(fd))
        self.cloud.places["acme", self.port.instance] = there
        there.do(lambda: there.fabric.plug(self.cloud.tenants["acme"], self.network, self.port, nic))
        nic.close()
        self.cloud.apply("acme")

    def move(self, fd: int, to: int) -> None:
        """Have another machine's tap be the port, on another host."""
        source = self.cloud.places["acme", self.port.instance]
        source.do(lambda: source.fabric.unplug(self.cloud.tenants["acme"], self.network, self.port))
        self.plug(fd, to)

    @property
    def plan(self) -> dict[str, Any]:
        """The agent's request for it."""
        port = msgspec.structs.replace(self.port, interface="eth0")
        return network.plan([port], [self.network])


def test_its_connections_follow_it_on_an_overlay(guests: Guests) -> None:
    """A connection is open to an instance on another host, when the machine moves to a third one, and when it moves to
    the host of the instance."""

    @isolated
    def test() -> None:
        cloud = Cloud()
        cloud.tenant("acme")
        cloud.network("acme")
        web, beside = cloud.instance("acme", "web", 1), cloud.instance("acme", "beside", 2)
        port = MachinePort(cloud, "vm", 2)
        with ExitStack() as stack:
            server = stack.enter_context(web.socket(socket.AF_INET, socket.SOCK_STREAM))
            server.bind(("", 80))
            server.listen()
            server.settimeout(patiently(60))
            dial = ("nc", web.port.address, "80")
            guest = stack.enter_context(guests.start(*dial, tap=port.tap, network=port.plan))
            connection, peer = server.accept()
            connection.settimeout(patiently(60))
            assert peer[0] == port.port.address
            outputs = [Output(guest)]

            def speaks(guest: Guest, output: Output) -> None:
                word = os.urandom(8).hex()
                connection.send(f"{word}\n".encode())
                until(lambda: output.lines[-1:] == [word], "it hears", 60)
                assert guest.process.stdin
                guest.process.stdin.write(f"{word}\n")
                guest.process.stdin.flush()
                assert connection.recv(64).decode() == f"{word}\n"

            speaks(guest, outputs[0])
            for host in (3, 1):
                there = tap.make()
                target = stack.enter_context(waiting(guests, guest, tap=there, network=port.plan))
                outputs.append(Output(target))
                move = Move(guest, target)
                move.on_own = lambda there=there, host=host: port.move(there, host)  # type: ignore[misc]
                assert move.run() == [None, None]
                asyncio.run(moving.settle(guest.netns, gone=True))
                speaks(target, outputs[-1])
                guest = target
                assert beside.pings(port.port.address) and web.pings(port.port.address), "others find it there"
            assert [len(each.lines) for each in outputs] == [1, 1, 1], "each word once"
            assert cloud.drift() == []

    test()


def test_another_host_has_to_be_the_same(tmp_path: Path) -> None:
    """It is refused before anything is sent, with what differs."""
    migrations = migration.MachineMigrations(lambda _: tmp_path, lambda _: tmp_path / "disk", lambda _: -1)
    said = subprocess.run([QEMU, "--version"], capture_output=True, text=True, timeout=60).stdout
    version = said.split("version ")[1].split()[0]
    same = MachineFacts(
        qemu=version,
        machine="pc-q35-7.2",
        accelerator="tcg",
        processor="max",
        memory=256,
        cpus=1,
        disk=1 << 30,
        slots=[1],
        modules=[],
        plugged=0,
    )
    asyncio.run(migrations.check(same))
    for others, told in (
        ({"qemu": "6.1.0"}, f"runs with the QEMU 6.1.0, and the other host has {version}"),
        ({"accelerator": "kvm"}, "runs with the accelerator kvm"),
        ({"processor": "host"}, "has the processor host, which other hosts may not have"),
        ({"machine": "q35"}, "is of type q35, which has no version"),
        ({"machine": "pc-q35-7.2,accel=kvm"}, "which has no version"),
        ({"memory": 1 << 30}, "no places for"),
        ({"memory": 1}, "which this host can't give it"),
        ({"cpus": 1000}, "no places for"),
        ({"disk": 1 << 60}, "the size of the machine's disk"),
        ({"slots": [1, 1]}, "network devices"),
        ({"slots": [77]}, "no places for"),
        ({"further": {"data": 1}}, "network devices or disks"),
        ({"further": {"data": 32}}, "network devices or disks"),
    ):
        with pytest.raises(Conflict, match=told):
            asyncio.run(migrations.check(msgspec.structs.replace(same, **others)))


def test_what_was_given_away_is_not_started(tmp_path: Path) -> None:
    """The refusal names the host that may have it. One that did not arrive isn't started either."""
    migrations = migration.MachineMigrations(lambda _: tmp_path, lambda _: tmp_path / "disk", lambda _: -1)
    vm = instance(name="vm")
    assert migrations.expected(vm) is None and not migrations.is_leaving(vm.id)
    target = MigrationTarget(addresses=["192.0.2.7:7443"], authority="", secret="x")
    (tmp_path / "leaving").write_bytes(msgspec.json.encode(target))
    assert migrations.given(vm.id) == target
    with pytest.raises(Failed, match=r"vm was given to 192\.0\.2\.7:7443, and it is not known yet"):
        migrations.expected(vm)
    (tmp_path / "leaving").unlink()
    with pytest.raises(Failed, match="was being moved here, and did not arrive"):
        migrations.expected(msgspec.structs.replace(vm, arriving=True))
