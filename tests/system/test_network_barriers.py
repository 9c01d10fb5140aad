"""Each barrier alone: it stops a packet when all other barriers are off.

Two barriers in a row hide that one of them is broken. So each test opens all others, shows that the packet passes when
the last is open too, and that it doesn't with this one, as it is installed.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import struct
import time

import pytest

from insula.kernel import netlink
from insula.kernel.netlink import Rtnl
from insula.kernel.netns import call_in
from insula.network.addresses import gateway_mac
from insula.network.linux import rules, sysctl
from tests.support.frames import ethernet, udp
from tests.support.lab import Instance, Lab, World, eventually, isolated, query, two_tenants
from tests.support.wait import patiently

UPLINKS = {4: ("100.64.0.3", "100.64.0.5"), 6: ("fd69:6e73:756c:6100::3", "fd69:6e73:756c:6100::5")}
IP, IPV6 = 0x0800, 0x86DD


def host(cloud: Lab, command: str) -> None:
    cloud.fabric._handles()[1].run(command)


def installed(cloud: Lab, part: str) -> str:
    """The rule of the host's table with this in it, as it is installed."""
    lines = cloud.fabric._handles()[1].rules("inet", "lab").splitlines()
    (found,) = [line.strip() for line in lines if part in line]
    return found


def open_tenant(cloud: Lab, tenant: str) -> None:
    nft = cloud.fabric._tenant(cloud.tenants[tenant]).nft
    nft.run("flush chain inet lab forward; chain inet lab forward { policy accept; }")


def route_to(cloud: Lab, tenant: int, subnet: str) -> None:
    """The host knows the way to a tenant's network, as it should not."""
    with Rtnl() as rtnl:
        uplink = rtnl.link(cloud.fabric.naming.uplink(tenant))
        assert uplink
        gateway = UPLINKS[6 if ":" in subnet else 4][tenant - 1]
        rtnl.execute(netlink.add_route(subnet, index=uplink.index, gateway=gateway))


def passes(source: Instance, target: Instance, address: str, expected: bool, dscp: int = 0) -> bool:
    """Whether a datagram arrives; it is sent again until it does if that is expected, else waited for shortly."""
    sniffer, mark = target.sniffer(), os.urandom(8)
    with source.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        option = (socket.IPPROTO_IPV6, socket.IPV6_TCLASS) if ":" in address else (socket.IPPROTO_IP, socket.IP_TOS)
        sock.setsockopt(*option, dscp << 2)
        seen = False
        for _ in range(20 if expected else 1):
            sock.sendto(mark, (address, 9))
            if seen := sniffer.sees(mark, patiently(0.5) if expected else 0.2):
                break
    sniffer.socket.close()
    return seen


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("barrier", ["host", "tenant"])
@isolated
def test_from_outside_to_an_instance(barrier: str, version: int) -> None:
    world = World()
    with call_in(world.instance.netns, Rtnl) as far:
        eth0 = far.link("eth0")
        assert eth0
        far.execute(netlink.add_route("fd00::/8", index=eth0.index, gateway=World.HOST6))
    with two_tenants() as cloud:
        web, address = cloud.instances["acme", "web"], "fd00::2" if version == 6 else "10.0.0.2"
        route_to(cloud, 1, "fd00::/64" if version == 6 else "10.0.0.0/24")

        def opened(which: str) -> None:
            if which == "tenant":
                open_tenant(cloud, "acme")
            else:
                host(cloud, "flush chain inet lab to_tenant")

        opened("host" if barrier == "tenant" else "tenant")
        assert not passes(world.instance, web, address, False)
        opened(barrier)
        assert passes(world.instance, web, address, True), "the control: nothing else stops it"


@pytest.mark.parametrize("version", [4, 6])
@isolated
def test_from_one_tenant_to_another(version: int) -> None:
    with two_tenants() as cloud:
        cloud.network("globex", "10.9.0.0/24", "fd09::/64", name="far")
        far, web = cloud.instance("globex", "far", "far", host=2), cloud.instances["acme", "web"]
        subnet, address = ("fd09::/64", "fd09::2") if version == 6 else ("10.9.0.0/24", "10.9.0.2")
        route_to(cloud, 2, subnet)
        open_tenant(cloud, "globex")
        rule = installed(cloud, 'oifname "lab-u*" goto to_tenant comment')
        host(cloud, "flush chain inet lab from_tenant")
        assert passes(web, far, address, True), "the control"
        host(cloud, f"add rule inet lab from_tenant {rule}")
        assert not passes(web, far, address, False)


@pytest.mark.parametrize("version", [4, 6])
@isolated
def test_a_forged_source(version: int) -> None:
    """A tenant whose port rules and address translation fail does not send into the world with others' addresses."""
    world = World()
    with two_tenants() as cloud:
        web, nft = cloud.instances["acme", "web"], cloud.fabric._tenant(cloud.tenants["acme"]).nft
        nft.run("flush chain bridge lab prerouting; chain bridge lab prerouting { policy accept; }")
        nft.run("flush chain inet lab postrouting")
        loose = {f"ipv4/conf/{device}/rp_filter": "0" for device in ("all", "br1")}
        call_in(cloud.inside("acme"), lambda: sysctl.write(loose))
        host(cloud, "flush chain inet lab postrouting")
        kind, source = (IPV6, "2001:470:7::77") if version == 6 else (IP, "198.51.100.77")
        target = World.ADDRESS6 if version == 6 else World.ADDRESS

        def arrives(expected: bool) -> bool:
            sniffer, mark = world.instance.sniffer(), os.urandom(8)
            web.send_frame(ethernet(gateway_mac(1), web.port.mac, kind, udp(source, target, mark)))
            return sniffer.sees(mark, 5.0 if expected else 0.2)

        assert not arrives(False)
        rule = installed(cloud, "fib saddr . iif")
        host(cloud, "flush chain inet lab from_tenant")
        assert arrives(True), "the control"
        host(cloud, f"add rule inet lab from_tenant {rule}")
        assert not arrives(False)


@pytest.mark.parametrize("version", [4, 6])
@isolated
def test_packets_with_the_mark_of_a_probe_do_not_leave_the_host(version: int) -> None:
    world = World()
    with two_tenants() as cloud:
        web, address = cloud.instances["acme", "web"], World.ADDRESS6 if version == 6 else World.ADDRESS
        assert not passes(web, world.instance, address, False, dscp=0x3F)
        assert passes(web, world.instance, address, True, dscp=0x3E)
        rule = installed(cloud, f"ip{6 if version == 6 else ''} dscp")
        host(cloud, "flush chain inet lab from_tenant")
        assert passes(web, world.instance, address, True, dscp=0x3F), "the control"
        host(cloud, f"add rule inet lab from_tenant {rule}")
        assert not passes(web, world.instance, address, False, dscp=0x3F)


@isolated
def test_names_are_answered_over_tcp_and_no_more_than_so_often() -> None:
    """Each call costs dnsmasq a process, so the rules count them; another tenant's are counted apart."""
    with two_tenants() as cloud:
        for tenant in cloud.tenants:
            cloud.set_names(tenant, {"web": ["10.0.0.2"]})
        web, other = cloud.instances["acme", "web"], cloud.instances["globex", "web"]
        assert b"\x0a\x00\x00\x02" in asked_by_tcp(web, "10.0.0.1") and asked_by_tcp(web, "fd00::1")
        os.kill(int((cloud.run / "dns/acme/pid").read_text()), signal.SIGKILL)
        with call_in(cloud.inside("acme"), lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            eventually(lambda: binds(server, ("10.0.0.1", 53)))  # dnsmasq and its children are gone
            server.listen(4096)  # dnsmasq itself would take a few only
            began, calls = time.monotonic(), [call(web) for _ in range(6 * rules.DNS_CONNECTIONS)]
            made = connected(calls, rules.DNS_CONNECTIONS // 2)
            allowed = rules.DNS_CONNECTIONS * (time.monotonic() - began + 1)
        assert rules.DNS_CONNECTIONS // 2 <= made < min(1.1 * allowed, 5 * rules.DNS_CONNECTIONS), (
            "the first of them are the control"
        )
        assert asked_by_tcp(other, "10.0.0.1")
        assert query(other.netns, "10.0.0.1", "web") == (0, ["10.0.0.2"])


def binds(sock: socket.socket, address: tuple[str, int]) -> bool:
    try:
        sock.bind(address)
    except OSError as error:
        assert error.errno == errno.EADDRINUSE
        return False
    return True


def asked_by_tcp(instance: Instance, server: str) -> bytes:
    """The answer of a server to a query for the address of web over TCP (RFC 7766)."""
    question = b"\1\2\1\0\0\1\0\0\0\0\0\0\3web\0\0\1\0\1"
    with instance.socket(socket.AF_INET6 if ":" in server else socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.settimeout(patiently(2))
        sock.connect((server, 53))
        sock.sendall(struct.pack("!H", len(question)) + question)
        return sock.recv(512)


def call(instance: Instance) -> socket.socket:
    sock = instance.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.setblocking(False)
    assert sock.connect_ex(("10.0.0.1", 53)) in (0, errno.EINPROGRESS)
    return sock


def connected(calls: list[socket.socket], least: int) -> int:
    """How many calls went through, when no more do for a moment; at least `least` are waited for."""
    poll, made = select.epoll(), 0
    for sock in calls:
        poll.register(sock, select.EPOLLOUT)
    deadline = time.monotonic() + patiently(5)
    while (ready := poll.poll(0.1)) or (made < least and time.monotonic() < deadline):
        for fd, _ in ready:
            poll.unregister(fd)
            made += 1
    for sock in calls:
        sock.close()
    poll.close()
    return made
