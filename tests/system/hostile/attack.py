"""An attacker that sends frames without end, and neighbours whose traffic is measured meanwhile.

Times of a busy machine say little. So rounds with and without the attack take turns, and in those without it the
attacker uses as much of the processors. The best rounds are compared, with a generous bound, and more are made while
these differ too much: what starves a neighbour does so in all of them.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import os
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from insula.kernel import syscalls
from tests.support.lab import Instance, Lab, query, two_tenants
from tests.support.wait import patiently, until

LEAST = 0.2
"""The part of their throughput that neighbours have at least while an attack goes on."""
ROUNDS, MOST_ROUNDS = 5, 50
AMOUNT, PIECE = 1 << 23, 1 << 16  # bytes that a neighbour moves in a round, and at once
_FRAMES_A_LOOK = 64


class Attacker:
    """A process that sends these frames in turn from an instance, from `begin` to `pause`; paused, it is as busy."""

    def __init__(self, instance: Instance, frames: Sequence[bytes]) -> None:
        self.instance = instance
        self._on = mmap.mmap(-1, 1)
        self._pid = os.fork()
        if self._pid == 0:
            try:
                syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
                self._run(frames)
            finally:
                os._exit(1)

    def _run(self, frames: Sequence[bytes]) -> None:
        with self.instance.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
            sock.bind(("eth0", 0))
            at = 0
            while True:
                if self._on[0]:
                    for _ in range(_FRAMES_A_LOOK):
                        with contextlib.suppress(OSError):  # its own queue is full
                            sock.send(frames[at % len(frames)])
                        at += 1

    def begin(self) -> None:
        self._on[0] = 1

    def pause(self) -> None:
        self._on[0] = 0

    def end(self) -> None:
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)

    def left(self) -> int:
        """How many packets have left the instance by its device."""

        def read() -> int:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM), open("/proc/thread-self/net/dev") as file:
                [line] = [line for line in file if line.strip().startswith("eth0:")]
            return int(line.partition(":")[2].split()[9])

        return int(self.instance.do(read))


class Pair:
    """Two instances with a TCP connection between them."""

    def __init__(self, name: str, client: Instance, server: Instance, port: int) -> None:
        self.name = name
        self._there = (server.port.address, port)
        self._client = client
        with server.socket(socket.AF_INET, socket.SOCK_STREAM) as listening:
            listening.bind(self._there)
            listening.listen()
            self._from = client.socket(socket.AF_INET, socket.SOCK_STREAM)
            self._from.settimeout(patiently(5))
            self._from.connect(self._there)
            self._to, _ = listening.accept()
            self._to.settimeout(patiently(5))

    def seconds(self) -> float:
        """How long AMOUNT takes from one to the other."""
        piece, began = bytes(PIECE), time.perf_counter()
        for _ in range(AMOUNT // PIECE):
            self._from.sendall(piece)
            left = PIECE
            while left:
                left -= len(self._to.recv(left))
        return time.perf_counter() - began


@dataclass
class Town:
    """acme with the attacker web, and its neighbours db and third; globex with web and db."""

    cloud: Lab
    pairs: list[Pair]

    @property
    def web(self) -> Instance:
        return self.cloud.instances["acme", "web"]

    @property
    def db(self) -> Instance:
        return self.cloud.instances["acme", "db"]

    def contains(self, what: str, frames: Sequence[bytes]) -> None:
        """Fail unless the neighbours' connections, and those they open, go on while `web` sends these frames."""
        attacker = Attacker(self.web, frames)
        try:
            before = attacker.left()
            attacker.begin()
            until(lambda: attacker.left() - before > len(frames), f"{what}: the control: all frames have left web")
            ratios = self._ratios(attacker)
            assert min(ratios.values()) > LEAST, f"{what}: parts of their throughput that neighbours have: {ratios}"
            self.meet(what)
        finally:
            attacker.end()

    def _ratios(self, attacker: Attacker) -> dict[str, float]:
        """The parts of their throughput that the pairs have during the attack, which goes on at the end."""
        best: dict[tuple[str, bool], float] = {}  # seconds that AMOUNT took, by the pair and whether it was attacked
        for number in range(MOST_ROUNDS):
            for on in (False, True):
                attacker.begin() if on else attacker.pause()
                time.sleep(0.01)
                for pair in self.pairs:
                    best[pair.name, on] = min(pair.seconds(), best.get((pair.name, on), 3600.0))
            ratios = {pair.name: best[pair.name, False] / best[pair.name, True] for pair in self.pairs}
            if number >= ROUNDS and min(ratios.values()) > LEAST:
                break
        return ratios

    def meet(self, what: str = "") -> None:
        """Fail unless neighbours reach each other anew: by ping, by TCP, and names are answered."""
        third = self.cloud.instances["acme", "third"]
        globex = self.cloud.instances["globex", "web"]
        for client in (third, globex):
            for address in ("10.0.0.3", "fd00::3"):
                until(functools.partial(client.pings, address), f"{what}: {client.port.tenant} pings {address}")
            opened = functools.partial(client.connects, "10.0.0.3", 80)
            until(opened, f"{what}: {client.port.tenant} opens a connection")
            answered = functools.partial(_knows_db, client)
            until(answered, f"{what}: names are answered to {client.port.tenant}")


def _knows_db(client: Instance) -> bool:
    return query(client.netns, "10.0.0.1", f"db.{client.port.tenant}.internal") == (0, ["10.0.0.3"])


@contextlib.contextmanager
def town() -> Iterator[Town]:
    with two_tenants() as cloud:
        third = cloud.instance("acme", "third")
        cloud.apply("acme")
        instances = cloud.instances
        for tenant in cloud.tenants:
            instances[tenant, "db"].serves("db", 80)
        pairs = [
            Pair("the same tenant", third, instances["acme", "db"], 7),
            Pair("another tenant", instances["globex", "web"], instances["globex", "db"], 7),
        ]
        yield Town(cloud, pairs)
