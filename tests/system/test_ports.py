"""Ports as users see them: several networks at a start, plugged and unplugged while the instance runs or not."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from insula.control.identities.authority import OPERATOR
from insula.control.instances.plugging import Plugging
from insula.control.plane import ControlPlane
from insula.kernel import netlink
from insula.kernel.netlink import Rtnl
from insula.kernel.netns import call_in
from insula.model.errors import Conflict, NotFound
from insula.model.objects import InstanceSpec, NetworkAttachment
from insula.settings import Settings
from tests.support.cli import Cli
from tests.support.daemon import Daemon
from tests.support.wait import eventually, patiently, until
from tests.system.conftest import TenantFactory, remove_instances
from tests.system.test_reconciler import run, settings  # noqa: F401 (a fixture)

TENANT = "default"
SERVE = "echo here > /tmp/index.html; exec httpd -f -h /tmp"


@pytest.fixture(scope="module")
def acme(tenants: TenantFactory) -> Cli:
    """A tenant with the networks default, a and b, of which b has IPv6."""
    cli = tenants()
    cli.ok("network", "create", "a", "--subnet", "10.1.0.0/24")
    cli.ok("network", "create", "b", "--subnet", "10.2.0.0/24", "--subnet6", "fd02::/64")
    return cli


@pytest.fixture
def cli(acme: Cli) -> Iterator[Cli]:
    yield acme
    remove_instances(acme)


def sleeps(cli: Cli, name: str, *options: str) -> None:
    cli.ok("run", "-d", "--name", name, "--stop-timeout", "0", *options, "busybox", "sleep", "600")


def serves(cli: Cli, name: str, *options: str) -> None:
    cli.ok("run", "-d", "--name", name, "--stop-timeout", "0", *options, "busybox", "sh", "-c", SERVE)
    until(lambda: cli.run("exec", name, "wget", "-qO-", "http://127.0.0.1/").status == 0, "it serves")


def gets(cli: Cli, name: str, where: str, seconds: int = 10) -> bool:
    """Whether an instance gets the page of a server there."""
    return cli.run("exec", name, "timeout", str(seconds), "wget", "-qO-", f"http://{where}/").out == "here\n"


def ports(cli: Cli, *name: str) -> dict[str, tuple[str, str]]:
    """Network and address by interface."""
    return {port["interface"]: (port["network"], port["address"]) for port in cli.json("port", "ls", *name)}


def findings(cli: Cli, about: str) -> list[str]:
    """What the proof of isolation finds that names an instance."""
    return [line for line in cli.run("verify").out.splitlines() if line[:2] in ("! ", "? ") and f"/{about}" in line]


# -- at a start ---------------------------------------------------------------------------------------------------


def test_an_instance_on_two_networks_is_reached_on_both(cli: Cli) -> None:
    serves(cli, "web", "--network", "a,ip=10.1.0.7", "--network", "b,ip6=fd02::9,mac=02:42:ac:11:00:09")
    assert ports(cli, "web") == {"eth0": ("a", "10.1.0.7"), "eth1": ("b", "10.2.0.2")}
    second = cli.json("port", "ls", "web")[1]
    assert (second["address6"], second["mac"]) == ("fd02::9", "02:42:ac:11:00:09")
    sleeps(cli, "on-a", "--network", "a")
    sleeps(cli, "on-b", "--network", "b")
    assert gets(cli, "on-a", "10.1.0.7") and gets(cli, "on-b", "10.2.0.2") and gets(cli, "on-b", "[fd02::9]")
    assert not gets(cli, "on-a", "10.2.0.2", 1) and not gets(cli, "on-b", "10.1.0.7", 1), "the networks are apart"
    for name in ("on-a", "on-b"):
        found = cli.ok("exec", name, "nslookup", "web")
        assert all(address in found for address in ("10.1.0.7", "10.2.0.2", "fd02::9")), "its name has all addresses"
    hosts = cli.ok("exec", "web", "cat", "/etc/hosts")
    assert all(f"{address}\tweb" in hosts for address in ("10.1.0.7", "10.2.0.2", "fd02::9"))
    assert "10.1.0.7, 10.2.0.2" in cli.ok("ps")
    explained = cli.ok("explain", "web")
    assert all(word in explained for word in ("eth0", "eth1", "10.1.0.7", "fd02::9"))


def test_the_options_for_the_first_network(cli: Cli) -> None:
    sleeps(cli, "web", "--network", "b", "--network", "a", "--ip", "10.2.0.50", "--ip6", "fd02::50")
    assert ports(cli, "web") == {"eth0": ("b", "10.2.0.50"), "eth1": ("a", cli.json("port", "ls", "web")[1]["address"])}
    sleeps(cli, "own", "--network", "a", "--mac", "02:42:ac:11:00:50")
    assert cli.json("port", "ls", "own")[0]["mac"] == "02:42:ac:11:00:50"
    sleeps(cli, "alone", "--network", "none")
    assert cli.json("port", "ls", "alone") == []


def test_an_address_beside_its_own(daemon: Daemon, cli: Cli) -> None:
    """A virtual address and a network behind it: allowed, shown, and no finding of the proof of isolation."""
    sleeps(
        cli,
        "gate",
        "--network",
        "a,ip=10.1.0.60,allow=10.1.0.100,allow=172.16.0.0/16,allow=10.1.0.60@00:00:5e:00:01:07",
    )
    sleeps(cli, "peer", "--network", "a")
    assert "10.1.0.100, 172.16.0.0/16, 10.1.0.60@00:00:5e:00:01:07" in cli.ok("port", "ls", "gate")
    assert cli.run("exec", "peer", "ping", "-c1", "-W1", "10.1.0.100").status
    with inside(cli, "gate") as netns, call_in(netns, Rtnl) as router:
        index = router.index("eth0")
        assert index
        router.execute(netlink.add_address(index, "10.1.0.100/24"))
    until(lambda: cli.run("exec", "peer", "ping", "-c1", "-W1", "10.1.0.100").status == 0, "it answers")
    assert findings(daemon.cli, "gate") == []
    cli.ok("port", "plug", "gate", "b", "--allow", "fd02:0:0:1::/64", "--allow", "10.2.0.100")
    assert findings(daemon.cli, "gate") == []
    refused = cli.fails("port", "plug", "peer", "b", "--allow", "10.2.0.1")
    assert "gateway" in refused
    mac = cli.json("port", "ls", "gate")[1]["mac"]
    assert "another port" in cli.fails("port", "plug", "peer", "b", "--allow", f"10.2.0.9@{mac}")


# -- while it runs -------------------------------------------------------------------------------------------------


def test_a_port_is_plugged_and_unplugged_while_a_connection_on_another_goes_on(cli: Cli) -> None:
    """Every byte of a stream arrives, in order, on the port that stays."""
    sleeps(cli, "web", "--network", "a")
    sleeps(cli, "peer", "--network", "a")
    sleeps(cli, "on-b", "--network", "b")
    with inside(cli, "web") as web, inside(cli, "peer") as peer:
        server = call_in(web, lambda: socket.create_server(("", 99)))
        client = call_in(peer, lambda: socket.socket())
        with server, client, ThreadPoolExecutor(1) as pool:
            client.settimeout(patiently(10))
            client.connect((ports(cli, "web")["eth0"][1], 99))
            connection, _ = server.accept()
            connection.settimeout(patiently(10))
            over = threading.Event()

            def echo() -> int:
                """Send numbers, each after the answer to the one before."""
                for number in itertools.count():
                    client.sendall(struct.pack("!Q", number))
                    connection.sendall(connection.recv(8, socket.MSG_WAITALL))
                    assert struct.unpack("!Q", client.recv(8, socket.MSG_WAITALL)) == (number,)
                    if over.wait(0.001):
                        return number
                return 0

            counted = pool.submit(echo)
            try:
                for _ in range(5):
                    assert cli.ok("port", "plug", "web", "b") == "eth1"
                    there = ports(cli, "web")["eth1"][1]
                    assert cli.run("exec", "on-b", "ping", "-c1", "-W2", there).status == 0
                    cli.ok("port", "unplug", "web", "b")
                    assert list(ports(cli, "web")) == ["eth0"]
            finally:
                over.set()
            assert counted.result() > 100, "it went on all the time"
            connection.close()


@contextlib.contextmanager
def inside(cli: Cli, name: str) -> Iterator[int]:
    """A descriptor of the instance's network namespace."""
    netns = os.open(f"/proc/{cli.json('inspect', name)[0]['status']['pid']}/ns/net", os.O_RDONLY)
    try:
        yield netns
    finally:
        os.close(netns)


def test_plug_with_addresses_and_by_interface(cli: Cli) -> None:
    sleeps(cli, "web", "--network", "none")
    assert cli.ok("exec", "web", "ls", "/sys/class/net") == "lo"
    assert cli.ok("port", "plug", "web", "b", "--ip", "10.2.0.77", "--ip6", "fd02::77") == "eth0"
    assert cli.ok("port", "plug", "web", "a,ip=10.1.0.77", "--mac", "02:42:ac:11:00:77") == "eth1"
    inside = cli.ok("exec", "web", "ip", "address")
    assert all(text in inside for text in ("10.2.0.77/24", "fd02::77/64", "10.1.0.77/24", "02:42:ac:11:00:77"))
    assert "default via 10.2.0.1 dev eth0" in cli.ok("exec", "web", "ip", "route")
    cli.ok("port", "unplug", "web", "eth0")
    assert "default via 10.1.0.1 dev eth1" in cli.ok("exec", "web", "ip", "route")
    assert ports(cli, "web") == {"eth1": ("a", "10.1.0.77")}
    found = cli.json("inspect", "web")[0]["instance"]
    assert [each["network"] for each in found["spec"]["networks"]] == ["a"]
    assert cli.ok("port", "plug", "web", "default") == "eth0"
    cli.ok("restart", "-t", "0", "web")
    assert {interface: network for interface, (network, _) in ports(cli, "web").items()} == {
        "eth0": "default",
        "eth1": "a",
    }
    assert "default via 10.0.0.1 dev eth0" in cli.ok("exec", "web", "ip", "route")
    sleeps(cli, "other", "--network", "b,ip=10.2.0.77")  # the address is free again


def test_while_it_is_stopped_or_paused(cli: Cli) -> None:
    serves(cli, "web", "--network", "a")
    sleeps(cli, "on-b", "--network", "b")
    cli.ok("pause", "web")
    cli.ok("port", "plug", "web", "b,ip=10.2.0.80")
    assert cli.json("inspect", "web")[0]["status"]["state"] == "paused"
    assert not gets(cli, "on-b", "10.2.0.80", 1)
    cli.ok("unpause", "web")
    assert gets(cli, "on-b", "10.2.0.80")
    cli.ok("stop", "web")
    cli.ok("port", "unplug", "web", "a")
    assert ports(cli, "web") == {"eth1": ("b", "10.2.0.80")}
    cli.ok("port", "plug", "web", "a,ip=10.1.0.80")
    assert cli.json("inspect", "web")[0]["status"]["state"] == "exited"
    cli.ok("start", "web")
    until(lambda: gets(cli, "on-b", "10.2.0.80"), "it serves again")
    assert ports(cli, "web") == {"eth0": ("a", "10.1.0.80"), "eth1": ("b", "10.2.0.80")}


def test_names_follow(cli: Cli) -> None:
    sleeps(cli, "web", "--network", "a,ip=10.1.0.9")
    sleeps(cli, "peer", "--network", "a")

    def found() -> set[str]:
        words = cli.run("exec", "peer", "nslookup", "web").out.split()
        return {word for word in words if word in ("10.1.0.9", "10.2.0.9")}

    assert found() == {"10.1.0.9"}
    cli.ok("port", "plug", "web", "b,ip=10.2.0.9")
    until(lambda: found() == {"10.1.0.9", "10.2.0.9"}, "its name has both")
    cli.ok("port", "unplug", "web", "a")
    until(lambda: found() == {"10.2.0.9"}, "its name has the other")


def test_what_an_unplugged_port_has_moved_stays_in_the_sum(cli: Cli) -> None:
    """To the byte, and when its interface is used again."""
    sleeps(cli, "web", "--network", "a")
    sleeps(cli, "on-b", "--network", "b,ip=10.2.0.99")

    def used() -> tuple[int, int]:
        (mine,) = (each for each in cli.json("usage")["instances"] if each["name"] == "web")
        return mine["used"]["received_packets"], mine["used"]["sent_packets"]

    before = used()
    for round_ in (1, 2):
        cli.ok("port", "plug", "web", "b")
        cli.ok("exec", "web", "ping", "-c", "50", "-i", "0.01", "10.2.0.99")
        cli.ok("port", "unplug", "web", "b")
        received, sent = (now - then for now, then in zip(used(), before, strict=True))
        assert received >= 50 * round_ and sent >= 50 * round_, "all of the pings"
        assert received < 50 * round_ + 40 and sent < 50 * round_ + 40, "and they count once"


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("port", "plug", "web", "nowhere"), 1, "nowhere"),
        (("port", "plug", "nobody", "a"), 1, "nobody"),
        (("port", "plug", "web", "a"), 1, "already"),
        (("port", "plug", "web", "No"), 1, "DNS label"),
        (("port", "plug", "web", "b", "--ip", "10.1.0.9"), 1, "outside"),
        (("port", "plug", "web", "b", "--ip", "10.2.0.1"), 1, "gateway"),
        (("port", "plug", "web", "default", "--ip6", "fd02::5"), 1, "no IPv6"),
        (("port", "plug", "web", "b", "--mac", "01:00:5e:00:00:01"), 1, "group"),
        (("port", "plug", "web", "b", "--allow", "224.0.0.1"), 1, "multicast"),
        (("port", "plug", "web", "b", "--allow", "10.2.0.9/24"), 1, "neither an address nor a range"),
        (("port", "plug", "web", "b,x=1"), 2, "option"),
        (("port", "plug", "web", "b,ip=10.2.0.9", "--ip", "10.2.0.80"), 2, "twice"),
        (("port", "unplug", "web", "b"), 1, "no port 'b'"),
        (("port", "unplug", "web", "eth7"), 1, "no port 'eth7'"),
        (("port", "unplug", "web", "../x"), 1, "there is no"),
        (("run", "--network", "a", "--network", "a", "busybox", "true"), 125, "twice"),
        (("run", "--network", "a", "--network", "none", "busybox", "true"), 2, "without a network"),
        (("run", "--network", "a,ip=10.1.0.300", "busybox", "true"), 125, "10.1.0.300"),
        (("run", "--network", "a,", "busybox", "true"), 2, "option"),
        (("run", "--network", "", "busybox", "true"), 125, "DNS label"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_bad_input_changes_nothing(acme: Cli, words: tuple[str, ...], status: int, said: str) -> None:
    if acme.run("inspect", "web").status:
        sleeps(acme, "web", "--network", "a")
    before = acme.json("ps", "-a")
    assert said in acme.fails(*words, status=status)
    assert [view["instance"] for view in acme.json("ps", "-a")] == [view["instance"] for view in before]


def test_a_tenant_has_so_many_ports_and_no_more(tenants: TenantFactory) -> None:
    cli = tenants("--ports", "2")
    cli.ok("network", "create", "a", "--subnet", "10.1.0.0/24")
    sleeps(cli, "web")
    sleeps(cli, "free", "--network", "none")
    assert "2 ports" in cli.fails("run", "--network", "a", "--network", "default", "busybox", "true", status=125)
    cli.ok("port", "plug", "web", "a")
    assert "2 ports" in cli.fails("port", "plug", "free", "a")
    assert cli.json("port", "ls", "free") == []
    cli.ok("port", "unplug", "web", "a")
    cli.ok("port", "plug", "free", "a")
    assert cli.json("tenant", "show", str(cli.tenant))["usage"]["ports"] == 2


# -- kills and faults -------------------------------------------------------------------------------------------------


def spec(name: str, *networks: str) -> InstanceSpec:
    attachments = [NetworkAttachment(network=each) for each in networks]
    return InstanceSpec(image="busybox", name=name, command=["sleep", "600"], stop_timeout=0, networks=attachments)


@pytest.mark.parametrize("verb", ["plug", "unplug"])
def test_a_daemon_that_dies_between_commit_and_action(
    settings: Settings,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    verb: str,
) -> None:
    """The next one does it; the instance goes on, and its other port works throughout."""

    async def die(*_: object) -> None:
        await asyncio.Event().wait()

    async def before(plane: ControlPlane) -> None:
        plane.begin()
        await plane.networks.create(TENANT, "b", "10.98.0.0/24")
        await plane.instances.run(TENANT, spec("peer", "b"), by=OPERATOR)
        await plane.instances.run(TENANT, spec("web", "default", *(["b"] if verb == "unplug" else [])), by=OPERATOR)
        monkeypatch.setattr(Plugging, verb, die)
        if verb == "plug":
            work = plane.instances.plug(TENANT, "web", NetworkAttachment(network="b"))
        else:
            work = plane.instances.unplug(TENANT, "web", "b")
        task = asyncio.ensure_future(work)
        managed = plane.managed.find(TENANT, "web")
        assert managed
        await eventually(lambda: managed.instance.generation == 2, "it is committed")
        task.cancel()

    run(settings, before)
    monkeypatch.undo()

    async def after(plane: ControlPlane) -> None:
        managed = plane.managed.find(TENANT, "web")
        assert managed and len(managed.instance.ports) == 2
        plane.begin()
        wanted = 2 if verb == "plug" else 1
        await eventually(lambda: managed.reconciled.is_set() and not managed.busy, "it was looked at")
        assert len(managed.instance.ports) == len(managed.status.ports) == wanted
        assert managed.status.state == "running" and managed.status.starts == 1
        tenant = managed.tenant
        found = await plane.context.fabric_call(TENANT, plane.context.fabric.installed, tenant)
        assert {port.index for port in found.ports if port.index in managed.status.ports} == {*managed.status.ports}
        assert len(found.ports) == wanted + 1, "with the peer's"
        report = await plane.host.verify()
        assert report.passed, report.drift
        if verb == "unplug":
            address = await plane.instances.plug(TENANT, "web", NetworkAttachment(network="b"))
            assert address.instance.ports[1].interface == "eth1"

    run(settings, after)


def test_a_port_that_can_not_be_plugged_is_taken_back(
    settings: Settings,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def body(plane: ControlPlane) -> None:
        plane.begin()
        await plane.networks.create(TENANT, "b", "10.98.0.0/24")
        await plane.instances.run(TENANT, spec("web", "default"), by=OPERATOR)
        before = await plane.instances.get(TENANT, "web")
        plug = plane.context.fabric.plug

        def full(tenant: object, network: object, *rest: object) -> None:
            raise Conflict("network b has as many ports as a bridge can have", "make another network")

        monkeypatch.setattr(plane.context.fabric, "plug", full)
        with pytest.raises(Conflict, match="as many ports"):
            await plane.instances.plug(TENANT, "web", NetworkAttachment(network="b", address="10.98.0.9"))
        monkeypatch.setattr(plane.context.fabric, "plug", plug)
        after = await plane.instances.get(TENANT, "web")
        assert after.instance.ports == before.instance.ports and after.instance.spec == before.instance.spec
        assert after.status.state == "running" and after.status.error is None
        found = await plane.instances.plug(TENANT, "web", NetworkAttachment(network="b", address="10.98.0.9"))
        assert found.instance.ports[1].address == "10.98.0.9", "the address is free again"

    run(settings, body)


def test_changes_at_once(settings: Settings) -> None:  # noqa: F811
    """Ten verbs on one instance: each is done whole, and none is lost."""

    async def body(plane: ControlPlane) -> None:
        plane.begin()
        names = [f"n{number}" for number in range(8)]
        for number, name in enumerate(names):
            await plane.networks.create(TENANT, name, f"10.{100 + number}.0.0/24")
        await plane.instances.run(TENANT, spec("web", "default"), by=OPERATOR)
        work = [plane.instances.plug(TENANT, "web", NetworkAttachment(network=name)) for name in names]
        again = [plane.instances.plug(TENANT, "web", NetworkAttachment(network=names[0])) for _ in range(2)]
        results = await asyncio.gather(*work, *again, return_exceptions=True)
        assert sum(isinstance(each, Conflict) for each in results) == 2, results
        managed = plane.managed.find(TENANT, "web")
        assert managed and [port.interface for port in managed.instance.ports] == [f"eth{n}" for n in range(9)]
        assert {port.index for port in managed.instance.ports} == {*managed.status.ports}
        with pytest.raises(Conflict, match="is used by web"):
            await plane.networks.remove(TENANT, "n3")
        gone = [plane.instances.unplug(TENANT, "web", name) for name in names]
        gone += [plane.instances.unplug(TENANT, "web", names[1]) for _ in range(2)]
        results = await asyncio.gather(*gone, return_exceptions=True)
        assert sum(isinstance(each, NotFound) for each in results) == 2, results
        assert [port.interface for port in managed.instance.ports] == ["eth0"]
        for name in names:
            await plane.networks.remove(TENANT, name)
        report = await plane.host.verify()
        assert report.passed, report.drift

    run(settings, body)


def test_insulad_is_killed_while_ports_are_plugged(fresh: Daemon) -> None:
    """kill -9 at some moments of plugging and unplugging. What was answered holds; all else is one of the two."""
    cli = fresh.cli
    cli.ok("network", "create", "b", "--subnet", "10.98.0.0/24")
    sleeps(cli, "web")
    pid = cli.json("inspect", "web")[0]["status"]["pid"]
    for number, delay in enumerate((0.0, 0.01, 0.03, 0.06, 0.12)):
        verb = ("plug", "web", "b") if number % 2 == 0 else ("unplug", "web", "b")
        asked = cli.start("port", *verb)
        time.sleep(0.15 + delay)
        fresh.kill("insulad")
        fresh.reap()
        asked.communicate(timeout=patiently(30))
        fresh.start()
        cli.run("port", *verb)  # done already, or now
        wanted = ["default", "b"] if number % 2 == 0 else ["default"]
        until(lambda wanted=wanted: [port["network"] for port in cli.json("port", "ls", "web")] == wanted, "it is so")  # type: ignore[misc]
        found = cli.ok("exec", "web", "ls", "/sys/class/net").split()
        assert found == (["eth0", "eth1", "lo"] if number % 2 == 0 else ["eth0", "lo"])
        assert cli.json("inspect", "web")[0]["status"]["pid"] == pid
        assert findings(cli, "web") == []
