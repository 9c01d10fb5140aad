"""Changes of policies with 10 and 1,000 ports and policies, and throughput under 1,000 policies.

*Installed* is the time of the fabric's call that changes one policy. *In force* is the time from the beginning of that
call until no datagram of a flow that it forbids arrives any more; the sender sends every millisecond. *New selector* is
the time of the call if the policy has a selector and a range that no other has. Each port belongs to another instance
with labels of its own, all in one namespace. A pair of instances with 1,000 policies is compared with one of a tenant
without.
"""

from __future__ import annotations

import contextlib
import socket
import statistics
import threading
import time
from contextlib import ExitStack

from msgspec.structs import replace

from bench.lib import Bench, Table
from bench.network import ROUNDS, SECONDS, Pair
from insula.model.objects import Port
from insula.model.policies import CidrPeer, InstancePeer, Policy, PolicyRule, PortMatch, Selector
from insula.network.fabric import NetnsNic
from insula.network.intent import PolicyIntent
from tests.support.lab import Instance, Lab
from tests.support.policies import port_of

_FLOW = 4000
_PAUSE = 0.001


def measure(bench: Bench) -> list[Table]:
    changes = Table(
        "A change of a policy", ["ports and policies", "installed, ms", "in force, ms", "new selector, ms", "elements"]
    )
    rounds = 5 if bench.quick else 20
    medians = []
    with ExitStack() as stack:
        lab = Lab()
        stack.callback(lab.fabric.teardown)
        for number in (10, 100, 1000):
            world = World(lab, stack, f"t{number}", number)
            installed, effective = zip(*(world.change(each % 2 == 0) for each in range(rounds)), strict=True)
            medians.append(statistics.median(installed))
            force = statistics.median([each for each in effective if each is not None])
            finer = statistics.median(world.refine(each) for each in range(rounds))
            times = [f"{each * 1e3:.1f}" for each in (medians[-1], force, finer)]
            changes.rows.append([str(number), *times, str(world.elements())])
        changes.notes.append(f"1,000 take {medians[-1] / medians[0]:.1f} times as long as 10")
        pairs = {"with 1,000 policies": world.pair(stack), "without": World(lab, stack, "plain", 0).pair(stack)}
        table = _throughput(bench, pairs)
    return [changes, table]


def _throughput(bench: Bench, pairs: dict[str, Pair]) -> Table:
    seconds, rounds = (0.5, 3) if bench.quick else (SECONDS, ROUNDS)
    streams: dict[str, list[float]] = {name: [] for name in pairs}
    for number in range(rounds):
        for name in sorted(pairs, reverse=bool(number % 2)):
            streams[name].append(pairs[name].measure("stream", seconds))
    table = Table("Between two instances under policies", ["what", "TCP, Mbit/s"])
    for name in pairs:
        table.rows.append([name, f"{statistics.median(streams[name]):.0f}"])
    ratio = statistics.median(a / b for a, b in zip(*streams.values(), strict=True))
    table.notes.append(f"throughput with 1,000 policies is {ratio:.2f} of that without")
    return table


class World:
    """A tenant with two instances to measure between, ports of others, and policies."""

    def __init__(self, lab: Lab, stack: ExitStack, tenant: str, number: int) -> None:
        self.lab, self.tenant, self.number = lab, tenant, number
        lab.tenant(tenant)
        self.network = lab.network(tenant, "10.0.0.0/16", "fd00::/64")
        self.labels = {"web": {"app": "web"}, "db": {"app": "db"}}
        self.policies = [_policy(tenant, n) for n in range(number)]
        if number:
            self.policies.append(_about_db(tenant, _FLOW))
        self.web, self.db = (lab.instance(tenant, name, labels=self.labels[name]) for name in ("web", "db"))
        stack.callback(self.web.remove)
        stack.callback(self.db.remove)
        others = Instance()
        stack.callback(others.remove)
        ports = [self._plugged(others, each) for each in range(number)]
        ports += [self.web.port, self.db.port]
        lab.others[tenant] = {"ports": ports, "policy": self.intent()}
        lab.apply(tenant)

    def _plugged(self, others: Instance, number: int) -> Port:
        """A port of an instance more."""
        port = port_of(f"i{number}", self.network, 100 + number)
        index = self.lab.tenants[self.tenant].index * 10_000 + number
        port = replace(port, tenant=self.tenant, index=index, interface=f"eth{number}")
        self.labels[port.instance] = {"app": f"a{number}", "team": f"t{number % 10}"}
        owner, nic = self.lab.tenants[self.tenant], NetnsNic(others.netns)
        self.lab.fabric.plug(owner, self.network, port, nic, labels=self.labels[port.instance])
        return port

    def intent(self) -> PolicyIntent:
        return PolicyIntent(policies=self.policies, labels=self.labels)

    def elements(self) -> int:
        installed = self.lab.fabric.installed(self.lab.tenants[self.tenant])
        return installed.rules.count(" : ") + installed.rules.count(" . ")

    def pair(self, stack: ExitStack) -> Pair:
        return Pair(stack, f"/proc/{self.web.pid}/ns/net", f"/proc/{self.db.pid}/ns/net", self.db.port.address)

    def change(self, forbids: bool) -> tuple[float, float | None]:
        """Change the policy of the flow. Seconds until it is installed, and until the flow has ended if it is forbidden
        now."""
        with Flow(self.web, self.db) as flow:
            self.policies[-1] = _about_db(self.tenant, _FLOW + 1 if forbids else _FLOW)
            if forbids:
                flow.wait()
            begin = time.monotonic()
            self.lab.fabric.enforce(self.lab.tenants[self.tenant], self.intent())
            installed = time.monotonic() - begin
            time.sleep(0.05)
            return installed, max(0.0, flow.last - begin) if forbids else None

    def refine(self, number: int) -> float:
        """Replace a policy by one with a selector and a range that no other has. Seconds until it is installed."""
        policies = [*self.policies, _finer(self.tenant, number)]
        begin = time.monotonic()
        self.lab.fabric.enforce(self.lab.tenants[self.tenant], replace(self.intent(), policies=policies))
        return time.monotonic() - begin


class Flow:
    """Datagrams every millisecond, and the time at which the last has arrived."""

    def __init__(self, one: Instance, other: Instance) -> None:
        self.last = 0.0
        self._gets = other.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._gets.bind((other.port.address, _FLOW))
        self._gets.settimeout(0.2)
        self._sends = one.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._where = (other.port.address, _FLOW)
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=each) for each in (self._send, self._get)]

    def __enter__(self) -> Flow:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()
        self._gets.close()
        self._sends.close()

    def wait(self) -> None:
        """Wait until datagrams arrive."""
        while not self.last:
            time.sleep(_PAUSE)

    def _send(self) -> None:
        while not self._ended.wait(_PAUSE):
            with contextlib.suppress(OSError):  # it is told that it is refused
                self._sends.sendto(b"x", self._where)

    def _get(self) -> None:
        while not self._ended.is_set():
            with contextlib.suppress(TimeoutError):
                self._gets.recv(10)
                self.last = time.monotonic()


def _policy(tenant: str, number: int) -> Policy:
    """A policy about one instance, which lets another one in."""
    peer = InstancePeer(select=Selector(labels={"app": f"a{number + 1}"}))
    rule = PolicyRule(direction="in", peers=[peer], ports=[PortMatch(protocol="tcp", port=1 + number % 60000)])
    select = Selector(labels={"app": f"a{number}"})
    return Policy(tenant=tenant, name=f"p{number}", select=select, directions=["in"], rules=[rule], created=0)


def _finer(tenant: str, number: int) -> Policy:
    """A policy about an instance by two labels, which lets in a range of addresses."""
    rule = PolicyRule(direction="in", peers=[CidrPeer(cidr=f"172.16.{number}.0/24")], ports=[])
    select = Selector(labels={"app": f"a{number % 10}", "team": f"t{number % 10}"})
    return Policy(tenant=tenant, name="finer", select=select, directions=["in"], rules=[rule], created=0)


def _about_db(tenant: str, port: int) -> Policy:
    """The policy that changes: web reaches db by one port of UDP, and by all of TCP."""
    peers = [InstancePeer(select=Selector(labels={"app": "web"}))]
    ports = [PortMatch(protocol="udp", port=port), PortMatch(protocol="tcp")]
    rule = PolicyRule(direction="in", peers=peers, ports=ports)  # type: ignore[arg-type]
    select = Selector(labels={"app": "db"})
    return Policy(tenant=tenant, name="db", select=select, directions=["in"], rules=[rule], created=0)
