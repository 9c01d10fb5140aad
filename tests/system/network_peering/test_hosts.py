"""A peering of tenants whose instances are on different hosts: the same passes as on one host, and nothing else."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import msgspec
import pytest

from insula.kernel.netlink import Rtnl
from insula.kernel.netns import call_in
from insula.model.errors import InsulaError
from insula.model.guarantees import Rate, Shaping
from insula.model.policies import CidrPeer, Policy, PolicyRule, PortMatch, Selector
from insula.network.addresses import gateway_mac, host_mac
from insula.network.intent import PeerPort, PolicyIntent
from tests.support.frames import ethernet, udp
from tests.support.hosts import Host
from tests.support.lab import SOON, Instance, eventually, isolated
from tests.system.network_overlay.test_attacks import IP, IPV6, encapsulated
from tests.system.network_peering.hosts import VNIS, PeeredCloud, overlapping, serve, spread
from tests.system.network_peering.world import ICMP, SHORT, TCP80, address, only_its_ports_are_reached

UDP = PortMatch(protocol="udp")
APART, CROSSED = {"web": 1, "app": 2, "db": 1, "spy": 2}, {"web": 1, "app": 2, "db": 2, "spy": 1}


def four(cloud: PeeredCloud) -> list[Instance]:
    return [cloud.instances[key] for key in (("acme", "web"), ("acme", "db"), ("globex", "app"), ("globex", "spy"))]


@pytest.mark.parametrize("underlay", [4, 6])
@pytest.mark.parametrize("places", [APART, CROSSED], ids=["apart", "both on each"])
@isolated
def test_only_the_ports_of_the_networks_in_it_are_reached(places: dict[str, int], underlay: int) -> None:
    cloud = spread(places, count=2, version=underlay)
    web, _, app, _ = four(cloud)
    peer = partial(cloud.peer, acme=(["net"], [TCP80, ICMP, UDP]), globex=(["net"], []))
    only_its_ports_are_reached(four(cloud), peer)
    for version in (4, 6):
        assert echoes(app, web, version)
    assert cloud.drift() == []


def echoes(client: Instance, server: Instance, version: int) -> bool:
    """Whether a datagram arrives with the sender's own address, and its answer comes back."""
    family = socket.AF_INET6 if version == 6 else socket.AF_INET
    with client.socket(family, socket.SOCK_DGRAM) as here, server.socket(family, socket.SOCK_DGRAM) as there:
        there.bind(("", 99))
        here.settimeout(SOON)
        there.settimeout(SOON)
        here.sendto(b"ping", (address(server, version), 99))
        data, sender = there.recvfrom(100)
        assert (data, sender[0]) == (b"ping", address(client, version))
        there.sendto(os.urandom(4), sender)
        return len(here.recv(100)) == 4


def devices(cloud: PeeredCloud, tenant: str, host: Host) -> list[str]:
    with call_in(host.inside(tenant), Rtnl) as rtnl:
        return [link.name for link in rtnl.links() if link.kind == "vxlan"]


@isolated
def test_a_host_has_only_what_its_instances_need() -> None:
    cloud = spread({"web": 1, "app": 2}, count=3)
    first, second, third = cloud.hosts
    cloud.peer(acme=(["net"], [ICMP]), globex=(["net"], []))
    assert cloud.instances["globex", "app"].pings("10.1.0.9")
    assert not cloud.has("globex", first) and not cloud.has("acme", second)
    assert not cloud.has("acme", third) and not cloud.has("globex", third)
    assert devices(cloud, "acme", first) == devices(cloud, "globex", second) == ["peervx7"]
    near = cloud.instance("globex", "near", 1, "back")
    cloud.peer(acme=(["net"], [ICMP]), globex=(["net", "back"], []))
    assert near.pings("10.1.0.9") and cloud.instances["globex", "app"].pings("10.1.0.9")
    assert devices(cloud, "globex", first) == [], "all of acme's instances are here"
    db = cloud.instance("acme", "db", 3, "back")
    cloud.peer(acme=(["net", "back"], [ICMP]), globex=(["net", "back"], []))
    assert near.pings(db.port.address) and cloud.instances["globex", "app"].pings(db.port.address)
    assert devices(cloud, "globex", first) == ["peervx7"]
    assert cloud.drift() == []
    cloud.peer()
    assert [name for host in (first, third) for name in devices(cloud, "acme", host)] == []
    assert cloud.drift() == []


class Conversation:
    """An open connection from app to a port of web."""

    def __init__(self, cloud: PeeredCloud, port: int, version: int) -> None:
        web, app = cloud.instances["acme", "web"], cloud.instances["globex", "app"]
        family = socket.AF_INET6 if version == 6 else socket.AF_INET
        self.client = app.socket(family, socket.SOCK_STREAM)
        with web.socket(family, socket.SOCK_STREAM) as server:
            if version == 6:
                server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            server.bind(("", port))
            server.listen()
            for each in (server, self.client):
                each.settimeout(SOON)
            self.client.connect((address(web, version), port))
            self.server, _ = server.accept()
        assert self.goes_on()

    def goes_on(self, timeout: float = SOON) -> bool:
        """Whether something arrives in both directions."""
        return all(self._passes(*ends, timeout) for ends in ((self.client, self.server), (self.server, self.client)))

    def is_cut(self) -> bool:
        """Whether nothing arrives in any direction."""
        return not any(self._passes(*ends, SHORT) for ends in ((self.client, self.server), (self.server, self.client)))

    def _passes(self, here: socket.socket, there: socket.socket, timeout: float) -> bool:
        there.settimeout(timeout)
        try:
            here.send(b"x")
            return there.recv(100) != b""
        except OSError:
            return False


@pytest.mark.parametrize("ends", ["acme", "globex", "both", "ports", "instance"])
@isolated
def test_what_is_taken_back_ends_open_connections_and_others_go_on(ends: str) -> None:
    cloud = spread({"web": 1, "app": 2}, count=2)
    both = [TCP80, PortMatch(protocol="tcp", port=82)]
    cloud.peer(acme=(["net"], both), globex=(["net"], []))
    ended = [Conversation(cloud, 80, version) for version in (4, 6)]
    kept = [Conversation(cloud, 82, version) for version in (4, 6)]
    cloud.apply("acme", policy=PolicyIntent(labels={"web": {"a": "b"}}))
    assert all(each.goes_on() for each in (*ended, *kept)), "a change that takes nothing back"
    if ends == "both":
        cloud.peer()
    elif ends == "ports":
        cloud.peer(acme=(["net"], both[1:]), globex=(["net"], []))
    elif ends == "instance":
        peering = cloud.peering("acme", "globex", cloud.hosts[0])
        cloud.apply("acme", peerings=[msgspec.structs.replace(peering, remotes=[])])
    else:
        cloud.apply(ends, peerings=[])  # the other side is not told
    assert all(each.is_cut() for each in ended)
    assert all(each.goes_on() if ends == "ports" else each.is_cut() for each in kept)


def only(cidrs: list[str], port: int) -> PolicyIntent:
    """web accepts one port from these ranges."""
    policy = Policy(
        tenant="acme",
        name="web",
        select=Selector(labels={"app": "web"}),
        directions=["in"],
        rules=[
            PolicyRule(
                direction="in",
                peers=[CidrPeer(cidr=cidr) for cidr in cidrs],
                ports=[PortMatch(protocol="tcp", port=port)],
            )
        ],
        created=0.0,
    )
    return PolicyIntent(policies=[policy], labels={"web": {"app": "web"}})


@isolated
def test_policies_of_both_tenants_hold_and_reach_open_connections() -> None:
    cloud = spread({"web": 1, "app": 2}, count=2)
    cloud.instance("globex", "other", 2)
    cloud.peer(acme=(["net"], [PortMatch(protocol="tcp")]), globex=(["net"], []))
    web, app, other = (cloud.instances[key] for key in (("acme", "web"), ("globex", "app"), ("globex", "other")))
    web.serves("web", 90)
    open_ = [Conversation(cloud, 80, version) for version in (4, 6)]
    app_only = ["10.2.0.9/32", "fd00:2::9/128"]
    for cidrs, port, passing in ((app_only, 80, True), (app_only, 90, False), (["10.9.0.0/16"], 80, False)):
        cloud.apply("acme", policy=only(cidrs, port))
        assert all(each.goes_on() if passing else each.is_cut() for each in open_), (cidrs, port)
        for version in (4, 6):
            assert app.connects(address(web, version), 90, SOON if port == 90 else SHORT) == (
                "web" if port == 90 else ""
            )
            assert other.connects(address(web, version), 90, SHORT) == "", "it is not named"
    deaf = Policy(tenant="globex", name="deaf", select=Selector(), directions=["out"], rules=[], created=0.0)
    cloud.apply("acme", policy=PolicyIntent())
    assert app.connects(address(web, 4), 90) == other.connects(address(web, 6), 90) == "web"
    cloud.apply("globex", policy=PolicyIntent(policies=[deaf]))
    assert app.connects(address(web, 4), 90, SHORT) == other.connects(address(web, 6), 90, SHORT) == ""


@pytest.mark.parametrize("version", [4, 6])
@isolated
def test_neither_an_instance_nor_a_host_forges_addresses(version: int) -> None:
    cloud = spread({"web": 1, "app": 2, "spy": 2}, count=2)
    cloud.peer(acme=(["net"], [UDP]), globex=(["net"], []))
    web, app, six = cloud.instances["acme", "web"], cloud.instances["globex", "app"], version == 6
    first, second = cloud.hosts
    spy, target, kind = web.sniffer(), address(web, version), IPV6 if six else IP
    sources = {
        "its own": (address(app, version), True),
        "of nobody in its network": ("fd00:2::77" if six else "10.2.0.77", False),
        "of its network that is not in the peering": ("fd00:2:1::9" if six else "10.2.1.9", False),
        "of its gateway": ("fd00:2::1" if six else "10.2.0.1", False),
        "of the target's network": ("fd00:1::77" if six else "10.1.0.77", False),
        "of the target": (target, False),
        "outside": ("2001:470::9" if six else "203.0.113.9", False),
        "of the next hop": ("fe80::1" if six else "169.254.127.1", False),
    }
    for what, (source, arrives) in sources.items():
        for by in ("instance", "host"):
            mark = os.urandom(6)
            packet = udp(source, target, mark, dport=99)
            if by == "instance":
                app.send_frame(ethernet(gateway_mac(cloud.networks["globex", "net"].index), app.port.mac, kind, packet))
            else:
                frame = ethernet(host_mac(first.address), host_mac(second.address), kind, packet)
                second.sends(encapsulated(VNIS["acme"], frame), first.address)
            assert spy.sees(mark, SOON if arrives else SHORT) == arrives, (what, by)
    for to, arrives in ((target, True), ("fd00:1:1::9" if six else "10.1.1.9", False)):
        mark = os.urandom(6)
        frame = ethernet(host_mac(first.address), host_mac(second.address), kind, udp(address(app, version), to, mark))
        second.sends(encapsulated(VNIS["acme"], frame), first.address)
        assert spy.sees(mark, SOON if arrives else SHORT) == arrives, to


@isolated
def test_an_instance_that_moves_is_reached_at_its_new_host() -> None:
    cloud = spread({"web": 1, "app": 2}, count=3)
    cloud.peer(acme=(["net"], [ICMP, UDP]), globex=(["net"], []))
    web, app = cloud.instances["acme", "web"], cloud.instances["globex", "app"]
    for host in (3, 1, 2):
        before = cloud.places["globex", "app"]
        cloud.unplug(app, before)
        after = cloud.places["globex", "app"] = cloud.hosts[host - 1]
        cloud.apply("globex", [after])
        cloud.plug(app)
        for tenant in ("globex", "acme"):
            cloud.apply(tenant)
        for version in (4, 6):
            assert app.pings(address(web, version)), host
            assert echoes(app, web, version), host
        assert cloud.drift() == []


@isolated
def test_damage_is_found_and_repaired() -> None:
    cloud = spread({"web": 1, "app": 2}, count=2)
    cloud.peer(acme=(["net"], [ICMP]), globex=(["net"], []))
    web, app = cloud.instances["acme", "web"], cloud.instances["globex", "app"]
    for command in (
        "ip link del peervx7",
        "ip link set peervx7 down",
        "ip neigh flush dev peervx7 nud permanent",
        "ip route del 10.2.0.9 dev peervx7",
        "ip -6 route flush dev peervx7",
        f"bridge fdb del {host_mac(cloud.hosts[1].address)} dev peervx7",
        "nft delete element inet h1 visitors4 { peervx7 . 10.2.0.9 }",
        "nft add element inet h1 visitors6 { peervx7 . fd00:2::77 }",
    ):
        call_in(cloud.hosts[0].inside("acme"), lambda command=command: subprocess.run(command.split(), check=True))  # type: ignore[misc]
        assert cloud.drift() != [], command
        cloud.apply("acme")
        assert cloud.drift() == [], command
        assert app.pings(address(web, 4)) and app.pings(address(web, 6)), command


@contextmanager
def refused(what: str) -> Iterator[None]:
    with pytest.raises(InsulaError) as caught:
        yield
    assert what in caught.value.message


@isolated
def test_what_is_wrong_is_told_and_the_rest_is_made() -> None:
    cloud = spread({"web": 1, "app": 2}, count=2)
    cloud.peer(acme=(["net"], [ICMP]), globex=(["net"], []))
    app, first = cloud.instances["globex", "app"], cloud.hosts[0]
    right = cloud.peering("acme", "globex", first)
    for wrong, what in (
        ({"vni": None}, "no VNIs"),
        (
            {"remotes": [*right.remotes, PeerPort(addresses=["10.1.0.77"], host=cloud.hosts[1].address)]},
            "no network of",
        ),
        ({"remotes": [*right.remotes, PeerPort(addresses=["10.2.0.10"], host="198.51.100.77")]}, "not of this cloud"),
    ):
        with refused(what):
            cloud.apply("acme", peerings=[msgspec.structs.replace(right, **wrong)])
        assert app.pings("10.1.0.9"), "what there was goes on"


@isolated
def test_an_endpoint_leads_to_an_instance_on_another_host() -> None:
    """Two clients on two hosts use the same port of their own at once; the provider tells their answers apart."""
    cloud, here = overlapping(), ["10.0.0.50", "fd00::50"]
    db, app, other = cloud.instances["acme", "db"], cloud.instances["globex", "app"], cloud.instances["globex", "other"]
    for port in (80, 81):
        db.serves(f"db {port}", port)
    assert app.connects(here[0], 80, SHORT) == "", "before there is an endpoint"
    serve(cloud, here)
    for endpoint in here:
        for client in (app, other):
            assert client.connects(endpoint, 80) == "db 80"
            assert client.connects(endpoint, 81, SHORT) == ""
    family = socket.AF_INET
    with app.socket(family, socket.SOCK_STREAM) as one, other.socket(family, socket.SOCK_STREAM) as two:
        for sock in (one, two):
            sock.settimeout(SOON)
            sock.bind(("", 5555))
            sock.connect((here[0], 80))
        assert one.recv(100) == two.recv(100) == b"db 80"
    for target in ("10.0.0.2", *here, "240.0.7.12", "240.0.7.3"):
        assert not db.pings(target, SHORT), "the provider has no way to the consumer"
    assert [cloud.drift_of(tenant, host) for tenant, host in (("acme", 1), ("globex", 2), ("globex", 3))] == [
        [],
        [],
        [],
    ]
    serve(cloud, here, there=False)
    assert app.connects(here[0], 80, SHORT) == other.connects(here[1], 80, SHORT) == ""
    assert devices(cloud, "acme", cloud.hosts[0]) == []


@isolated
def test_what_is_sent_belongs_to_the_sender_and_what_arrives_to_the_receiver() -> None:
    """Both tenants are on both hosts, so each host tells their packets of the peering apart by the VNI."""
    cloud = spread(CROSSED, count=2)
    cloud.peer(acme=(["net", "back"], [UDP]), globex=(["net", "back"], []))
    shaping = Shaping(link=100_000_000, out=Rate(floor=10_000_000), in_=Rate(floor=10_000_000))
    for tenant in ("acme", "globex"):
        cloud.apply(tenant, shaping=shaping)
    web, app = cloud.instances["acme", "web"], cloud.instances["globex", "app"]
    before = {(t, d, h.number): sent(cloud, t, d, h) for t in cloud.tenants for d in ("out", "in") for h in cloud.hosts}
    with app.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _ in range(20):
            sock.sendto(bytes(1000), (address(web, 4), 99))
    eventually(lambda: sent(cloud, "acme", "in", cloud.hosts[0]) - before["acme", "in", 1] >= 20_000)
    assert sent(cloud, "globex", "out", cloud.hosts[1]) - before["globex", "out", 2] >= 20_000
    for tenant, direction, host in (("globex", "in", 1), ("globex", "out", 1), ("acme", "out", 2), ("acme", "in", 2)):
        assert sent(cloud, tenant, direction, cloud.hosts[host - 1]) - before[tenant, direction, host] < 20_000


def sent(cloud: PeeredCloud, tenant: str, direction: str, host: Host) -> int:
    """Bytes that have passed a tenant's class on a host."""

    def read() -> int:
        with Rtnl() as rtnl:
            return host.fabric.shaper.counters(rtnl, cloud.tenants[tenant].index)[direction].bytes

    return host.do(read)


@isolated
def test_packets_that_fit_no_underlay_are_reported() -> None:
    cloud = spread({"web": 1, "app": 2}, count=2, mtu=1500)
    cloud.peer(acme=(["net"], [ICMP]), globex=(["net"], []))
    app = cloud.instances["globex", "app"]
    for target, header in (("10.1.0.9", 28), ("fd00:1::9", 48)):
        assert app.pings(target, size=1450 - header, dont_fragment=True)
        assert not app.pings(target, SHORT, size=1500 - header, dont_fragment=True)

        def learned(target: str = target) -> bool:
            words = ["ip", "route", "get", target]
            return "mtu 1450" in app.do(
                lambda: subprocess.run(words, capture_output=True, text=True, check=True).stdout
            )

        eventually(learned)
