"""`verify` passes on a correct host, and finds each way of breaking isolation, by reading or by packets."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from ipaddress import ip_address

import pytest

from insula.kernel import netlink
from insula.kernel.netlink import Rtnl
from insula.kernel.netns import call_in
from insula.kernel.nftables import Nft
from insula.model.views import Reachability, VerifyReport
from insula.network.endpoints import Endpoint
from insula.network.linux import naming
from insula.network.packets import UDP_PORT
from insula.network.probe import Measurement
from insula.network.proof.verify import MOST_PROBED, verify
from tests.support.descriptors import descriptors
from tests.support.frames import mac
from tests.support.lab import SOON, Instance, Lab, World, checksum, isolated, two_tenants

PROBE = struct.pack("!HH", 40000, UDP_PORT)  # the ports of a probe


def report(cloud: Lab) -> VerifyReport:
    instances = list(cloud.instances.values())
    return verify(
        cloud.fabric,
        list(cloud.tenants.values()),
        list(cloud.networks.values()),
        [instance.port for instance in instances],
        {instance.port.index: instance.netns for instance in instances},
        list(cloud.routers.values()),
    )


def cell(found: VerifyReport, source: str, target: str) -> Reachability:
    return next(c for c in found.matrix if (c.source, c.target) == (source, target))


def wrong(found: VerifyReport) -> set[tuple[str, str]]:
    return {(c.source, c.target) for c in found.matrix if not c.ok}


@isolated
def test_all_is_well() -> None:
    with two_tenants() as cloud:
        cloud.network("acme", "10.1.0.0/24", "fd01::/64", name="back")
        cloud.instance("acme", "back", "back")
        found = report(cloud)
        assert found.drift == [] and wrong(found) == set() and found.passed
        assert all(c.control for c in found.matrix)
        reached = {(c.source, c.target) for c in found.matrix if c.probed}
        assert ("acme/web", "acme/db") in reached and ("acme/web", "acme/gateway:net") in reached
        assert ("acme/back", "outside") in reached and ("globex/db", "globex/web") in reached
        for pair in [
            ("acme/web", "globex/db"), ("acme/web", "acme/back"), ("acme/web", "host"), ("host", "acme/web"),
            ("outside", "globex/web"), ("acme/web", "globex/gateway:net"), ("acme/web", "acme/gateway:back"),
        ]:  # fmt: skip
            assert cell(found, *pair).probed is False, pair


@isolated
def test_of_many_ports_some_are_probed_and_all_are_proven() -> None:
    with two_tenants() as cloud:
        for number in range(MOST_PROBED):
            cloud.instance("acme", f"i{number}")
        found = report(cloud)
        assert found.passed and (found.ports, found.probed_ports) == (MOST_PROBED + 4, MOST_PROBED)
        probed = {c.source for c in found.matrix if "/" in c.source}
        assert len(probed) == MOST_PROBED
        with in_tenant(cloud, "acme") as nft:
            nft("delete element inet lab epoch { 2 }")
        found = report(cloud)
        assert {f"acme/i{n}" for n in range(MOST_PROBED)} <= {each.source for each in found.findings}


@isolated
def test_networks_that_a_router_joins_reach_each_other() -> None:
    with two_tenants() as cloud:
        for number, name in enumerate(("back", "apart"), 1):
            cloud.network("acme", f"10.{number}.0.0/24", f"fd0{number}::/64", name=name, mtu=1400)
            cloud.instance("acme", name, name)
        cloud.network("globex", "10.3.0.0/24", name="shut", outbound="none")
        cloud.instance("globex", "shut", "shut")
        cloud.router("acme", "net", "back", routes={"172.16.0.0/12": "10.0.0.2"})
        cloud.router("globex", "net", "shut", routes={"0.0.0.0/0": "10.0.0.3"})
        found = report(cloud)
        assert found.drift == [] and wrong(found) == set() and found.passed
        for pair in [
            ("acme/web", "acme/back"), ("acme/back", "acme/web"), ("acme/web", "acme/gateway:back"),
            ("acme/back", "acme/gateway:net"), ("globex/shut", "globex/web"), ("globex/web", "globex/shut"),
        ]:  # fmt: skip
            assert cell(found, *pair).probed is True, pair
        for pair in [
            ("acme/web", "acme/apart"), ("acme/apart", "acme/back"), ("acme/web", "acme/gateway:apart"),
            ("globex/shut", "outside"), ("globex/web", "outside"),
        ]:  # fmt: skip
            assert cell(found, *pair).probed is False, pair


@isolated
def test_a_path_too_many_and_one_too_few_are_found() -> None:
    with two_tenants() as cloud:
        for number, name in enumerate(("back", "apart"), 1):
            cloud.network("acme", f"10.{number}.0.0/24", name=name)
            cloud.instance("acme", name, name)
        cloud.router("acme", "net", "back")
        devices = {name: naming.bridge(cloud.networks["acme", name].index) for name in ("net", "back", "apart")}
        with in_tenant(cloud, "acme") as nft:
            number = naming.bridge_index(cloud.networks["acme", "net"].index)  # the router's
            nft(f"delete element inet lab joined {{ {devices['net']} . {number} }}")
            nft(f"add element inet lab paths {{ {devices['net']} . {devices['apart']} }}")
        found = report(cloud)
        assert "acme: network net reaches apart, back, net, not back, net" in found.drift
        assert "acme: network back reaches back, not back, net" in found.drift
        assert ("acme/web", "acme/apart") in wrong(found) and cell(found, "acme/web", "acme/apart").probed
        assert ("acme/back", "acme/web") in wrong(found) and cell(found, "acme/back", "acme/web").probed is False
        cloud.apply("acme")
        assert report(cloud).passed


@contextlib.contextmanager
def in_tenant(cloud: Lab, tenant: str) -> Iterator[Callable[[str], object]]:
    """nft(8) in a tenant's namespace."""
    inside = cloud.inside(tenant)
    with call_in(inside, Nft) as nft:
        yield nft.run
    os.close(inside)


@isolated
def test_no_probe_leaves_the_host() -> None:
    world = World()
    with two_tenants() as cloud:
        cloud.network("globex", "10.9.0.0/24", name="far")
        cloud.instance("globex", "far", "far")
        spy = world.instance.sniffer()
        assert report(cloud).passed
        assert not spy.sees(PROBE, 0.1)
        mark = os.urandom(8)
        with cloud.instances["acme", "web"].socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(mark, ("10.9.0.2", 9))
        assert spy.sees(mark, SOON), "the spy is deaf"


def tenants_joined_by_a_cable(cloud: Lab) -> None:
    """Somebody connects the bridges of two tenants."""
    with call_in(cloud.inside("acme"), Rtnl) as acme, call_in(cloud.inside("globex"), Rtnl) as globex:
        one, two = naming.bridge_index(1), naming.bridge_index(2)
        acme.execute(netlink.veth("cable", "cable", cloud.inside("globex"), master=one))
        link = globex.link("cable")
        assert link
        globex.execute(netlink.set_link(link.index, up=True, master=two))
        assert acme.sync_carrier("cable") and globex.sync_carrier("cable")
        allow_everything(cloud, "acme")
        allow_everything(cloud, "globex")


def allow_everything(cloud: Lab, tenant: str) -> None:
    run_nft(cloud, tenant, "flush chain bridge lab prerouting; chain bridge lab prerouting { policy accept; }")


def run_nft(cloud: Lab, tenant: str, command: str) -> None:
    cloud.fabric._tenant(cloud.tenants[tenant]).nft.run(command)


def tenants_routed_to_each_other(cloud: Lab) -> None:
    """globex's other network is reachable from acme through a host that routes between uplinks."""
    cloud.network("globex", "10.9.0.0/24", name="far")
    cloud.instance("globex", "far", "far")
    with Rtnl() as host:
        uplink = host.link(cloud.fabric.naming.uplink(2))
        assert uplink
        host.execute(netlink.add_route("10.9.0.0/24", index=uplink.index, gateway="100.64.0.5"))
    # the rule that keeps tenants apart is gone, and globex lets in what comes
    host_nft = cloud.fabric._handles()[1]
    host_nft.run("flush chain inet lab from_tenant")
    run_nft(cloud, "globex", "flush chain inet lab forward; chain inet lab forward { policy accept; }")


def gateway_serves_everybody(cloud: Lab) -> None:
    run_nft(cloud, "acme", "insert rule inet lab forward accept")


def host_listens(cloud: Lab) -> None:
    cloud.fabric._handles()[1].run("flush chain inet lab to_host")


def port_may_use_another_address(cloud: Lab) -> None:
    run_nft(
        cloud, "acme", f'add element bridge lab ipv4 {{ "p1" . {cloud.instances["acme", "web"].port.mac} . 10.0.0.3 }}'
    )


def port_is_on_no_bridge(cloud: Lab) -> None:
    with call_in(cloud.inside("acme"), Rtnl) as acme:
        acme.execute(netlink.set_link(naming.port_index(1), master=0))


def element_is_missing(cloud: Lab) -> None:
    run_nft(cloud, "acme", f'delete element bridge lab macs {{ "p1" . {cloud.instances["acme", "web"].port.mac} }}')


FAULTS: list[tuple[Callable[[Lab], None], str, tuple[str, str] | None]] = [
    # (what breaks, what is said of it, a pair whose packets tell)
    (tenants_joined_by_a_cable, "device cable is not ours", ("acme/db", "globex/web")),
    (tenants_routed_to_each_other, "rule missing in inet lab", None),
    (gateway_serves_everybody, "rule added in inet lab", ("host", "acme/web")),
    (host_listens, "host: rule missing in inet lab", ("acme/web", "host")),
    (port_may_use_another_address, "IPv4 addresses are ['10.0.0.2', '10.0.0.3']", None),
    (port_is_on_no_bridge, "port of web is not on network net", ("acme/web", "acme/db")),
    (element_is_missing, "has no rule elements", ("acme/web", "acme/db")),
]


@pytest.mark.parametrize(("fault", "said", "pair"), FAULTS, ids=lambda value: getattr(value, "__name__", ""))
@isolated
def test_every_fault_is_found(fault: Callable[[Lab], None], said: str, pair: tuple[str, str] | None) -> None:
    with two_tenants(subnet6=None) as cloud:
        assert report(cloud).passed
        fault(cloud)
        found = report(cloud)
        assert not found.passed
        assert any(said in text for text in found.drift), found.drift
        if pair:
            assert pair in wrong(found) | {(c.source, c.target) for c in found.matrix if not c.control}, wrong(found)


@isolated
def test_a_cable_between_two_instances_is_found() -> None:
    """Inside their own namespaces, where none of our rules looks. An instance's own devices are its own affair."""
    with two_tenants(subnet6=None) as cloud:
        spy, victim = cloud.instances["globex", "web"], cloud.instances["acme", "web"]
        nested = Instance()
        with call_in(victim.netns, Rtnl) as one:
            one.execute(netlink.veth("own", "eth0", nested.netns))
            assert report(cloud).drift == []
            one.execute(netlink.veth("cable", "cable", spy.netns))
        found = report(cloud)
        assert not found.passed
        assert found.drift == [
            "device cable in acme/web leads to globex/web",
            "device cable in globex/web leads to acme/web",
        ]


@isolated
def test_an_instance_that_is_not_behind_its_port_is_found() -> None:
    with two_tenants(subnet6=None) as cloud:
        one, two = cloud.instances["acme", "web"], cloud.instances["acme", "db"]
        one.netns, two.netns = two.netns, one.netns
        assert report(cloud).drift == [
            "acme/web has no device at the other end of p1",
            "device eth0 in acme/web leads to tenant acme",
            "acme/db has no device at the other end of p2",
            "device eth0 in acme/db leads to tenant acme",
        ]


LEAKS = {
    "icmp": "ip protocol icmp",
    "udp": "ip protocol udp",
    "tcp": "ip protocol tcp",
    "icmp6": "ip6 nexthdr icmpv6",
    "udp6": "ip6 nexthdr udp",
    "tcp6": "ip6 nexthdr tcp",
}


@pytest.mark.parametrize("leak", LEAKS)
@isolated
def test_a_leak_of_one_protocol_is_found_by_packets_alone(leak: str) -> None:
    """Somebody has what an instance sends copied to an instance on another network; no reading shows that."""
    with two_tenants() as cloud:
        cloud.network("acme", "10.1.0.0/24", "fd01::/64", name="back")
        back = cloud.instance("acme", "back", "back")
        rule = f"ether type {'ip6' if leak.endswith('6') else 'ip'} {LEAKS[leak]} dup to p{back.port.index}"
        chain = 'type filter hook ingress device "p1" priority 0; policy accept;'
        evil = f"table netdev evil {{ chain leak {{ {chain} {rule}; }}; }}"
        call_in(cloud.inside("acme"), lambda: run_nft(cloud, "acme", evil))
        found = report(cloud)
        assert found.drift == [] and not found.passed
        address = back.port.address6 if leak.endswith("6") else back.port.address
        leaked = next(c for c in found.matrix if (c.source, c.address) == ("acme/web", address))
        assert leaked.probed is True and leaked.control
        said = leak.removesuffix("6")
        assert leaked.detail == f"arrived by {'broadcast, udp' if said == 'udp' else said}"
        assert {source for source, _ in wrong(found)} == {"acme/web"}


def frames_during(cloud: Lab, spy: Instance) -> list[bytes]:
    """The frames that an instance's packet socket sees during a measurement, in both directions."""
    sniffer = spy.sniffer().socket
    sniffer.setsockopt(socket.SOL_SOCKET, 33, 64 << 20)  # SO_RCVBUFFORCE
    assert report(cloud).passed
    sniffer.setblocking(False)
    seen = []
    with contextlib.suppress(BlockingIOError):
        while True:
            seen.append(sniffer.recv(65536))
    return seen


@pytest.mark.parametrize("outside", [True, False], ids=["with a default route", "without"])
@isolated
def test_an_instance_learns_no_address_from_it(outside: bool) -> None:
    """Not of other tenants, not of other networks, not on its own subnet: neither sent, nor asked for, nor quoted."""
    if outside:
        World()
    cloud = Lab()
    for tenant, subnet, subnet6 in (
        ("acme", "10.0.0.0/24", "fd00::/64"),
        ("globex", "10.9.0.0/24", "fd09::/64"),
        ("initech", "10.0.0.0/24", "fd00::/64"),
    ):
        cloud.tenant(tenant)
        cloud.network(tenant, subnet, subnet6)
    cloud.network("acme", "10.1.0.0/24", "fd01::/64", name="back")
    spy, db = cloud.instance("acme", "spy"), cloud.instance("acme", "db")
    hidden = [
        cloud.instance("globex", "web", host=77),
        cloud.instance("acme", "back", "back", host=78),
        cloud.instance("initech", "web", host=79),  # in the spy's own subnet
    ]
    seen = frames_during(cloud, spy)
    secrets = {str(i.port.address) for i in hidden} | {str(i.port.address6) for i in hidden}
    secrets |= {"10.9.0.1", "10.1.0.1", "fd09::1", "fd01::1", "100.64.0.2", "100.64.0.5"}
    known = [a for a in (db.port.address, db.port.address6) if a]
    assert {a for a in secrets if any(ip_address(a).packed in frame for frame in seen)} == set()
    assert [a for a in known if not any(ip_address(a).packed in frame for frame in seen)] == [], "the spy is deaf"


def repeat_what_is_seen(spy: Instance, others: list[Instance], stop: threading.Event, sent: list[int]) -> None:
    """Send every frame that the spy sees again: as it is, as the payload of a ping, on loopback; and from others."""
    source = spy.sniffer().socket
    source.settimeout(0.05)
    ways = []
    for instance in (spy, *others):
        for device in ("eth0", "lo"):
            sock = instance.socket(socket.AF_PACKET, socket.SOCK_RAW)
            sock.bind((device, 0))
            ways.append((sock, mac(instance.port.mac)))
    pings = [instance.socket(socket.AF_INET, socket.SOCK_RAW, 1) for instance in (spy, *others)]
    while not stop.is_set():
        with contextlib.suppress(TimeoutError):
            frame, origin = source.recvfrom(65536)
            if origin[2] == 4:  # PACKET_OUTGOING: our own
                continue
            for sock, own in ways:
                for forged in (frame, frame[:6] + own + frame[12:], b"\xff" * 6 + own + frame[12:]):
                    with contextlib.suppress(OSError):
                        sent[0] += sock.send(forged) > 0
            for sock in pings:
                body = struct.pack("!BBHHH", 8, 0, 0, 7, 1) + frame
                body = body[:2] + struct.pack("!H", checksum(body)) + body[4:]
                for address in ("10.0.0.1", "10.0.0.2", "10.0.0.3"):
                    with contextlib.suppress(OSError):
                        sent[0] += sock.sendto(body, (address, 0)) > 0


@isolated
def test_an_instance_can_neither_forge_nor_break_it() -> None:
    """Instances of both tenants, which have the same addresses, repeat all that one of them sees."""
    with two_tenants() as cloud:
        before = report(cloud)
        assert before.passed
        stop, sent = threading.Event(), [0]
        spy = cloud.instances["acme", "web"]
        others = [cloud.instances["globex", name] for name in ("web", "db")]
        thread = threading.Thread(target=repeat_what_is_seen, args=(spy, others, stop, sent))
        thread.start()
        try:
            after = [report(cloud) for _ in range(3)]
            while sent[0] <= 1000 and len(after) < 20:
                after.append(report(cloud))
        finally:
            stop.set()
            thread.join()
        assert sent[0] > 1000, "the control: it did repeat them"
        for found in after:
            assert found.passed and cells(found) == cells(before)


@isolated
def test_probes_that_were_lost_are_sent_again() -> None:
    """The first attempt loses every other one, as a flooded network may."""
    with two_tenants() as cloud:
        send, attempts = Measurement._probe, []

        def lossy(self: Measurement, pairs: Sequence[tuple[Endpoint, Endpoint]]) -> None:
            attempts.append(len(pairs))
            send(self, pairs[::2] if len(attempts) == 1 else pairs)

        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(Measurement, "_probe", lossy)
            found = report(cloud)
        assert found.passed
        assert 0 < attempts[1] < attempts[0], "only what should have arrived is sent again"


def cells(found: VerifyReport) -> set[tuple[object, ...]]:
    return {(c.source, c.target, c.address, c.expected, c.installed, c.probed, c.control) for c in found.matrix}


@isolated
def test_nothing_is_left_of_a_measurement() -> None:
    with two_tenants() as cloud:

        def held() -> tuple[object, ...]:
            open_, threads = descriptors(), threading.active_count()
            with Rtnl() as host:
                return open_, threads, len(host.links())

        assert report(cloud).passed
        before = held()
        for _ in range(3):
            report(cloud)
        assert held() == before
        cloud.fabric._handles()[1].run("delete table inet lab")
        report(cloud)  # fails
        assert held() == before


@isolated
def test_silence_is_no_proof() -> None:
    """An instance whose device is down receives nothing: that proves no isolation, and it is not said to."""
    with two_tenants(subnet6=None) as cloud:
        db = cloud.instances["globex", "db"]
        with call_in(db.netns, Rtnl) as within:
            eth0 = within.link("eth0")
            assert eth0
            within.execute(netlink.set_link(eth0.index, up=False))
        found = report(cloud)
        silent = cell(found, "acme/web", "globex/db")
        assert not found.passed and silent.probed is None and silent.detail == "the receiver got no control packet"


@isolated
def test_without_the_hosts_rules_no_packet_is_sent_outside() -> None:
    world = World()
    with two_tenants() as cloud:
        cloud.fabric._handles()[1].run("delete table inet lab")
        spy = world.instance.sniffer()
        found = report(cloud)
        assert not found.passed and not spy.sees(PROBE, 0.1)
        assert cell(found, "acme/web", "outside").probed is None
        assert cell(found, "acme/web", "acme/db").probed is True


@isolated
def test_fifty_instances() -> None:
    cloud = Lab()
    for tenant in ("a", "b", "c", "d", "e"):
        cloud.tenant(tenant)
        cloud.network(tenant)
        for i in range(10):
            cloud.instance(tenant, f"i{i}")
    found = report(cloud)
    assert found.passed and found.ports == 50 and found.classes > 100_000
    assert found.probed_ports == 32 and len(found.matrix) > 32 * 32, "packets go between some of them"
