"""Guarantees by the command line: who may set them, what is refused, and what is in force."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import TypeVar

import pytest

from insula.kernel.cgroups.hierarchy import hierarchy
from insula.kernel.netlink import Rtnl
from insula.kernel.netlink import traffic_control as tc
from insula.kernel.netlink.traffic_control import ClassCounters, HtbClass
from insula.kernel.netns import call_in
from insula.network.linux.guarantees import tree
from insula.network.linux.naming import Naming
from tests.support.cli import Cli
from tests.support.daemon import Daemon
from tests.support.load import rates, sink, tcp
from tests.support.wait import until

USAGE = 2
T = TypeVar("T")
RANGE4, RANGE6 = IPv4Network("100.64.0.0/10"), IPv6Network("fd00::/64")
MBIT = 1_000_000
CPUS = len(os.sched_getaffinity(0))


class Host:
    """A daemon whose link has 100 Mbit/s, with tenants acme and globex."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon, self.cli = daemon, daemon.cli
        self.acme, self.globex = (self.tenant(name) for name in ("acme", "globex"))

    def tenant(self, name: str) -> Cli:
        self.cli.ok("tenant", "create", name)
        cli = self.cli.of(name)
        cli.ok("network", "create", "default", "--subnet", "10.0.0.0/24")
        return cli

    def index(self, tenant: str) -> int:
        index: int = self.cli.json("tenant", "show", tenant)["tenant"]["index"]
        return index

    def device(self, direction: str) -> str:
        return f"{Naming(self.daemon.prefix, RANGE4, RANGE6).uplinks[:-1]}{direction}"

    def classes(self, direction: str = "out") -> dict[int, HtbClass]:
        def read() -> dict[int, HtbClass]:
            with Rtnl() as rtnl:
                index = rtnl.index(self.device(direction))
                return {} if index is None else tc.classes(rtnl, index)

        return self._inside(read)

    def of(self, tenant: str, direction: str = "out") -> HtbClass:
        return self.classes(direction)[tree.tenant(self.index(tenant))]

    def counters(self, direction: str = "out") -> dict[int, ClassCounters]:
        def read() -> dict[int, ClassCounters]:
            with Rtnl() as rtnl:
                index = rtnl.index(self.device(direction))
                return {} if index is None else tc.class_counters(rtnl, index)

        return self._inside(read)

    def _inside(self, read: Callable[[], T]) -> T:
        netns = os.open(self.daemon.namespaces.host, os.O_RDONLY)
        try:
            return call_in(netns, read)
        finally:
            os.close(netns)


@pytest.fixture
def host(unstarted: Daemon) -> Host:
    unstarted.configure('[network]\nlink = "100mbit"\n')
    unstarted.start()
    return Host(unstarted)


def test_floors_of_tenants_are_admitted_against_the_link_and_installed(host: Host) -> None:
    acme, globex = host.acme, host.globex
    assert host.classes() == {}, "nothing is shaped before the first guarantee"
    acme.ok("guarantee", "set", "--out", "60mbit", "--in", "40mbit", "--ceil-out", "80mbit")
    assert (host.of("acme").rate, host.of("acme").ceiling) == (60 * MBIT, 80 * MBIT)
    assert (host.of("acme", "in").rate, host.of("acme", "in").ceiling) == (40 * MBIT, 95 * MBIT)
    assert host.of("globex").rate == tree.LEAST, "others are shaped too, or they would take it"
    assert "35mbit is left" in globex.fails("guarantee", "set", "--out", "40mbit")
    assert "no guarantee" in globex.fails("guarantee", "show")
    globex.ok("guarantee", "set", "--out", "35mbit", "--in", "55mbit")
    assert "0bit is left" in host.tenant("initech").fails("guarantee", "set", "--in", "1mbit")
    acme.ok("guarantee", "set", "--out", "10mbit")
    assert host.of("acme").rate == 10 * MBIT
    assert acme.json("guarantee", "show")["floor_in"] == 40 * MBIT, "what is not given stays"
    globex.ok("guarantee", "set", "--out", "85mbit")
    assert "10mbit is left" in acme.fails("guarantee", "set", "--out", "11mbit")
    assert host.of("acme").rate == 10 * MBIT, "a refusal changes nothing"
    globex.ok("guarantee", "clear")
    acme.ok("guarantee", "set", "--out", "none", "--in", "none", "--ceil-out", "none")
    assert host.classes() == {}
    assert acme.json("guarantee", "ls") == []


def test_floors_of_instances_are_parts_of_those_of_their_tenant(host: Host) -> None:
    acme = host.acme
    for name in ("web", "db"):
        acme.ok("run", "-d", "--name", name, "--network", "none", "busybox", "sleep", "1d")
    assert "an operator can set one" in acme.run("guarantee", "set", "web", "--out", "1mbit").err
    acme.ok("guarantee", "set", "--out", "50mbit", "--in", "50mbit", "--cpu", "0.5")
    acme.ok("guarantee", "set", "web", "--out", "30mbit", "--cpu", "0.2")
    assert "20mbit is left" in acme.fails("guarantee", "set", "db", "--out", "21mbit")
    assert "0.3 is left" in acme.fails("guarantee", "set", "db", "--cpu", "0.31")
    assert "instances of tenant acme have 30mbit" in acme.fails("guarantee", "set", "--out", "29mbit")
    assert "instances of tenant acme have 30mbit" in acme.fails("guarantee", "clear")
    acme.ok("guarantee", "set", "db", "--out", "20mbit")
    assert [each["instance"] for each in acme.json("guarantee", "ls")] == [None, "db", "web"]
    acme.ok("rm", "-f", "db")
    acme.ok("run", "-d", "--name", "db", "--network", "none", "busybox", "sleep", "1d")
    assert "no guarantee" in acme.fails("guarantee", "show", "db"), "another instance of the name has none"
    acme.ok("guarantee", "set", "db", "--out", "20mbit")
    acme.ok("rename", "web", "www")
    assert acme.json("guarantee", "show", "www")["floor_out"] == 30 * MBIT
    assert "has no instance web" in acme.fails("guarantee", "show", "web")


def test_two_requests_can_not_take_the_same_rest(host: Host) -> None:
    with ThreadPoolExecutor() as pool:
        clis = [host.acme, host.globex, *(host.tenant(f"t{n}") for n in range(4))]
        statuses = [each.status for each in pool.map(lambda cli: cli.run("guarantee", "set", "--out", "30mbit"), clis)]
    assert sorted(statuses) == [0, 0, 0, 1, 1, 1]
    floors = [each.rate for each in host.classes().values() if each.parent == tree.root() and each.rate > tree.LEAST]
    assert floors == [30 * MBIT] * 3


def test_bad_input_is_one_line_and_changes_nothing(host: Host) -> None:
    acme = host.acme
    for arguments, status, said in (
        ((), USAGE, "nothing to set"),
        (("--out", "fast"), USAGE, "rate"),
        (("--out", "1"), 1, "can't be guaranteed"),
        (("--out", "9999gbit"), 1, "can't be guaranteed"),
        (("--cpu", "0"), USAGE, "CPUs"),
        (("--cpu", "60000"), 1, "can't be promised"),
        (("--memory", "1k"), 1, "can't be guaranteed"),
        (("--memory", "9000g"), 1, "can't be promised"),
        (("--out", "50mbit", "--ceil-out", "40mbit"), 1, "above the ceiling"),
        (("--pps-out", "1000"), 1, "for instances only"),
        (("nobody", "--out", "1mbit"), 1, "has no instance nobody"),
        (("No", "--out", "1mbit"), 1, "not a DNS label"),
    ):
        assert said in acme.fails("guarantee", "set", *arguments, status=status), arguments
    host.cli.ok("tenant", "update", "acme", "--bandwidth", "10m")
    assert "limited to 10mbit" in acme.fails("guarantee", "set", "--out", "20mbit")
    assert acme.json("guarantee", "ls") == []
    host.cli.ok("tenant", "update", "acme", "--bandwidth", "none")
    host.globex.ok("guarantee", "set", "--out", "20mbit")
    acme = _without_link(host)
    assert "no known speed" in acme.fails("guarantee", "set", "--out", "1mbit")
    acme.ok("guarantee", "set", "--cpu", "0.5", "--ceil-out", "100mbit")
    doctor = {each["name"]: each for each in host.cli.json("doctor")}
    assert doctor["link speed"]["state"] == "degraded" and 'link = "1gbit"' in doctor["link speed"]["hint"]
    assert "not in force" in str(host.cli.json("status")["problems"])


def _without_link(host: Host) -> Cli:
    host.daemon.configure()
    host.daemon.stop()
    host.daemon.start()
    return host.acme


def test_only_operators_promise_anything_of_the_host(host: Host, tmp_path: Path) -> None:
    host.acme.ok("guarantee", "set", "--out", "20mbit")
    host.acme.ok("run", "-d", "--name", "web", "--network", "none", "busybox", "sleep", "1d")
    host.acme.ok("user", "create", "ci", "--service-account")
    host.acme.ok("user", "bind", "acme/ci", "member")
    token = tmp_path / "token"
    token.write_text(host.acme.ok("token", "create", "--user", "acme/ci"))
    token.chmod(0o600)
    member = host.acme.by(token)
    for arguments in (("set", "--out", "1mbit"), ("clear",)):
        assert "may" in member.fails("guarantee", *arguments)
    assert member.json("guarantee", "show")["floor_out"] == 20 * MBIT
    member.ok("guarantee", "set", "web", "--out", "5mbit")
    assert member.of("globex").run("guarantee", "show").status == 1
    assert host.acme.json("guarantee", "show")["floor_out"] == 20 * MBIT


def test_bandwidth_of_a_tenant_limits_it_as_a_whole_also_after_a_crash(host: Host) -> None:
    """In both directions, and nothing moves when insulad is killed and starts again."""
    host.cli.ok("tenant", "update", "acme", "--bandwidth", "10m")
    assert (host.of("acme").ceiling, host.of("acme", "in").ceiling) == (10 * MBIT, 10 * MBIT)
    assert tree.tenant(host.index("globex")) not in host.classes(), "a tenant without a ceiling is not shaped"
    host.acme.ok("run", "-d", "--name", "web", "busybox", "sleep", "1d")
    pid = host.acme.json("inspect", "web")[0]["status"]["pid"]
    outside = os.open(host.daemon.namespaces.outside, os.O_RDONLY)
    inside = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
    number = tree.tenant(host.index("acme"))
    with sink(outside, 7000), tcp(inside, host.daemon.namespaces.OUTSIDE, 7000, connections=2):
        before = rates(lambda: {"acme": host.counters()[number].bytes}, 2)["acme"]
        assert 7 * MBIT <= before <= 10.3 * MBIT
        classes = host.classes()
        host.daemon.kill("insulad")
        host.daemon.reap()
        without = rates(lambda: {"acme": host.counters()[number].bytes}, 1, settle=0)["acme"]
        assert 7 * MBIT <= without <= 10.6 * MBIT
        host.daemon.start()
        assert host.classes() == classes
    os.close(outside)
    os.close(inside)
    host.cli.ok("tenant", "update", "acme", "--bandwidth", "none")
    assert host.classes() == {}


def test_cpus_and_memory_are_weights_and_protected_memory(host: Host) -> None:
    host.acme.ok("guarantee", "set", "--cpu", "0.5", "--memory", "64m")
    host.acme.ok("run", "-d", "--name", "web", "--network", "none", "busybox", "sleep", "1d")
    host.acme.ok("guarantee", "set", "web", "--cpu", "0.25", "--memory", "32m")
    if hierarchy().version == 2:
        names, factor = ("cpu.weight", "memory.low"), 10_000
    else:
        names, factor = ("cpu.shares", "memory.soft_limit_in_bytes"), 262_144

    def value(path: str, file: str) -> int:
        tree_, controller = hierarchy(), file.split(".")[0]
        top = tree_.unified or tree_.controllers[controller]
        return int(Path(top, path, file).read_text())

    acme = f"{host.daemon.prefix}/acme"
    id_ = host.acme.json("inspect", "web")[0]["instance"]["id"]
    assert value(acme, names[0]) == pytest.approx(factor * 0.5 / CPUS, rel=0.01)
    assert value(f"{acme}/{id_}", names[0]) == pytest.approx(factor * 0.25 / CPUS, rel=0.01)
    assert (value(acme, names[1]), value(f"{acme}/{id_}", names[1])) == (64 << 20, 32 << 20)
    assert value(f"{host.daemon.prefix}/globex", names[0]) < factor * 0.5 / CPUS / 100
    host.acme.ok("restart", "web")
    until(lambda: value(f"{acme}/{id_}", names[1]) == 32 << 20, "its new group has the floors too")
    host.acme.ok("guarantee", "clear", "web")
    host.acme.ok("guarantee", "clear")
    assert (
        value(acme, names[0]) == value(f"{host.daemon.prefix}/globex", names[0]) == (100 if factor == 10_000 else 1024)
    )


DECLARED = """
apiVersion: insula/v1
kind: Tenant
metadata: {name: hooli}
spec: {guarantee: {floor_out: 20000000, ceiling_out: 50000000}}
---
apiVersion: insula/v1
kind: Instance
metadata: {name: web, tenant: hooli}
spec: {image: busybox, networks: [], command: [sleep, 1d]}
---
apiVersion: insula/v1
kind: Guarantee
metadata: {name: web, tenant: hooli}
spec: {floor_out: 5000000, packets_out: 1000}
"""


def test_guarantees_are_declared_with_their_tenants_and_instances(host: Host, tmp_path: Path) -> None:
    file = tmp_path / "app.yaml"
    file.write_text(DECLARED)
    host.cli.ok("apply", "--host", "-f", str(file))
    hooli = host.cli.of("hooli")
    assert host.of("hooli").rate == 20 * MBIT
    assert hooli.json("guarantee", "show", "web")["packets_out"] == 1000
    assert host.cli.run("diff", "--host", "-f", str(file)).status == 0, "nothing is different then"
    file.write_text(DECLARED.replace("20000000", "30000000").replace("5000000,", "25000000,"))
    host.cli.ok("apply", "--host", "-f", str(file))
    assert host.of("hooli").rate == 30 * MBIT
    assert hooli.json("guarantee", "show", "web")["floor_out"] == 25 * MBIT
    file.write_text(DECLARED.replace("5000000,", "6000,"))
    assert "can't be guaranteed" in host.cli.run("apply", "--host", "-f", str(file)).err
    assert hooli.json("guarantee", "show", "web")["floor_out"] == 25 * MBIT
    dumped = host.cli.ok("dump", "--host")
    assert "kind: Guarantee" in dumped
    assert "floor_out: 30000000" in dumped
