"""A tenant with a peering that wants more: other addresses and networks, third tenants, all connections."""

from __future__ import annotations

import contextlib
import os
import socket

import pytest

from insula.kernel import netlink
from insula.kernel.netlink import Rtnl
from insula.kernel.netns import call_in
from insula.network.addresses import gateway_mac
from insula.network.linux import rules, sysctl
from tests.support.frames import ethernet, icmpv6, udp
from tests.support.lab import SOON, Instance, isolated
from tests.system.network_peering.world import ICMP, TCP80, PeeredLab, two_tenants

IP, IPV6 = 0x0800, 0x86DD
SHORT = 0.3


def joined() -> tuple[PeeredLab, Instance, Instance]:
    """globex, the hostile one, may ping and use UDP on acme's network net."""
    from insula.model.policies import PortMatch

    cloud = two_tenants()
    cloud.peer(acme=(["net"], [ICMP, PortMatch(protocol="udp")]), globex=(["net"], []))
    return cloud, cloud.instances["acme", "web"], cloud.instances["globex", "app"]


@pytest.mark.parametrize("version", [4, 6])
@isolated
def test_no_forged_source_passes_a_peering(version: int) -> None:
    """Neither another's of its own tenant, nor one of the peer, the gateway or outside, nor of a network beside."""
    cloud, web, app = joined()
    network = cloud.networks["globex", "net"]
    six = version == 6
    target = str(web.port.address6 if six else web.port.address)
    spy = web.sniffer()
    sources = {
        "its own": (str(app.port.address6 if six else app.port.address), True),
        "of nobody in its network": ("fd00:2::77" if six else "10.2.0.77", False),
        "of its network that is not in the peering": ("fd00:2:1::9" if six else "10.2.1.9", False),
        "of its gateway": ("fd00:2::1" if six else "10.2.0.1", False),
        "of the target's network": ("fd00:1::77" if six else "10.1.0.77", False),
        "of the target's gateway": ("fd00:1::1" if six else "10.1.0.1", False),
        "of the target": (target, False),
        "outside": ("2001:470::9" if six else "203.0.113.9", False),
        "loopback": ("::1" if six else "127.0.0.1", False),
        "of the next hop": ("fe80::1" if six else "169.254.127.1", False),
    }
    for what, (source, arrives) in sources.items():
        mark = os.urandom(6)
        frame = ethernet(
            gateway_mac(network.index), app.port.mac, IPV6 if six else IP, udp(source, target, mark, dport=99)
        )
        app.send_frame(frame)
        assert spy.sees(mark, SOON if arrives else SHORT) == arrives, what


@isolated
def test_a_peering_is_no_way_to_the_outside_nor_to_a_third_tenant() -> None:
    """Routes that the hostile tenant's instance makes for itself lead to its own router only."""
    cloud, web, app = joined()
    cloud.tenant("hooli")
    cloud.network("hooli", "10.3.0.0/24", "fd00:3::/64")
    third = cloud.instance("hooli", "third", "net", 9)
    spies = {name: each.sniffer() for name, each in (("web", web), ("third", third))}
    with app.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for target, seen in (
            ("10.1.0.9", "web"),
            ("10.1.0.1", None),  # the router of acme
            ("10.1.1.9", None),  # its other network
            ("10.1.0.255", None),  # everybody in its network
            ("10.3.0.9", None),  # another tenant
            ("100.64.0.3", None),  # its uplink
            ("169.254.127.1", None),  # the next hop
        ):
            mark = os.urandom(8)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            sock.sendto(mark, (target, 99))
            for name, spy in spies.items():
                assert spy.sees(mark, SOON if seen == name else 0.1) == (seen == name), (target, name)


@isolated
def test_messages_of_the_link_do_not_pass() -> None:
    """Neither router advertisements nor redirects. Solicitations are routed: receivers ignore those with a hop limit
    below 255 (RFC 4861, section 7.1)."""
    cloud, web, app = joined()
    spy, network = web.sniffer(), cloud.networks["globex", "net"]
    for kind in (133, 134, 137):
        mark = os.urandom(8)
        packet = icmpv6(str(app.port.address6), str(web.port.address6), kind, bytes(16) + mark)
        app.send_frame(ethernet(gateway_mac(network.index), app.port.mac, IPV6, packet))
        assert not spy.sees(mark, SHORT), kind
    assert app.pings(str(web.port.address6))


@isolated
def test_answers_are_no_way_in() -> None:
    """A datagram that looks like an answer opens nothing, and an open connection opens no other port."""
    cloud = two_tenants()
    web, app = cloud.instances["acme", "web"], cloud.instances["globex", "app"]
    cloud.peer(acme=(["net"], []), globex=(["net"], [TCP80, ICMP]))
    app.serves("app", 80)
    assert web.connects(app.port.address, 80) == "app", "acme may connect to globex"
    spy = web.sniffer()
    with web.socket(socket.AF_INET, socket.SOCK_STREAM) as client:
        client.settimeout(SOON)
        client.connect((app.port.address, 80))
        port = client.getsockname()[1]
        for source, target in ((80, port + 1), (81, port), (80, 22)):
            mark = os.urandom(8)
            frame = udp(app.port.address, web.port.address, mark, sport=source, dport=target)
            app.send_frame(ethernet(gateway_mac(cloud.networks["globex", "net"].index), app.port.mac, IP, frame))
            assert not spy.sees(mark, SHORT), (source, target)
    assert not app.pings(web.port.address, SHORT)


@isolated
def test_a_flow_that_began_before_the_peering_uses_it_too() -> None:
    """Its source was translated to the uplink's address, which nobody could answer."""
    from insula.model.policies import PortMatch

    cloud = two_tenants()
    web, app = cloud.instances["acme", "web"], cloud.instances["globex", "app"]
    spy = web.sniffer()
    with app.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("", 7000))
        sock.sendto(b"before there is a way", (web.port.address, 99))
        assert not spy.sees(b"before there is a way", SHORT)
        cloud.peer(acme=(["net"], [PortMatch(protocol="udp")]), globex=(["net"], []))
        sock.sendto(b"after that, the same port", (web.port.address, 99))
        assert spy.sees(b"after that, the same port", SOON)


@isolated
def test_an_address_on_the_device_of_a_peering_gives_no_way_in() -> None:
    """Whoever could change the hostile tenant's namespace from inside would still have the rules of the other's."""
    cloud, web, app = joined()
    spy, there = web.sniffer(), cloud.inside("globex")
    with call_in(there, Rtnl) as rtnl:
        device = rtnl.index("peer7")
        assert device
        rtnl.execute(netlink.add_address(device, "10.2.1.1/32"))

    def send(source: str, target: str, mark: bytes) -> None:
        def open_() -> socket.socket:
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            sock.bind((source, 0))
            return sock

        with call_in(there, open_) as sock:
            sock.sendto(mark, (target, 99))

    send("10.2.0.1", web.port.address, b"from a network of the peering")
    assert spy.sees(b"from a network of the peering", SOON)
    send("10.2.1.1", web.port.address, b"from another network of it")
    assert not spy.sees(b"from another network of it", SHORT)
    assert app.pings(web.port.address)


FEW = 40


@isolated
def test_a_peer_can_not_use_up_the_connections_of_a_tenant(few: None) -> None:
    cloud, web, app = joined()
    cloud.instance("acme", "other", "net", 10)
    cloud.instance("globex", "second", "net", 10)
    for client in (app, cloud.instances["globex", "second"]):
        for family, target in ((socket.AF_INET, web.port.address), (socket.AF_INET6, str(web.port.address6))):
            with client.socket(family, socket.SOCK_DGRAM) as sock:
                for port in range(1, 2 * FEW):
                    with contextlib.suppress(OSError):  # nobody listens there
                        sock.sendto(b"x", (target, port))
    count = int(call_in(cloud.inside("acme"), lambda: sysctl.read("netfilter/nf_conntrack_count")) or 0)
    assert FEW < count < 3 * FEW, "of both versions together"
    assert not cloud.instances["globex", "second"].pings(web.port.address, SHORT)
    assert cloud.instances["acme", "other"].pings(web.port.address), "its own are not counted with them"


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "CONNECTIONS", 2 * FEW)
