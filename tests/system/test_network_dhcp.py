"""DHCP, DHCPv6 and router advertisements for guests that ask, with real clients: busybox's udhcpc, and the kernel."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import struct
import subprocess
from pathlib import Path

import pytest

from insula.kernel import netlink
from insula.kernel.netlink import Rtnl
from insula.kernel.netlink.messages import Address
from insula.kernel.netns import OWN
from insula.model.objects import AddressPair
from insula.network.addresses import gateway_mac, link_local
from insula.network.dhcp import frames
from insula.network.linux.guests import GuestServer
from tests.support.lab import Instance, eventually, isolated, two_tenants
from tests.support.policy_lab import policy, policy_lab
from tests.support.wait import patiently

BUSYBOX = shutil.which("busybox") or "/bin/busybox"
SCRIPT = """#!/bin/sh
case $1 in bound|renew) env > {to} ;; esac
"""
pytestmark = pytest.mark.skipif(not Path(BUSYBOX).exists(), reason="the client is that of busybox")


def bare(instance: Instance) -> None:
    """Take the addresses from an instance, as a virtual machine has none at first; its device stays up."""
    with instance.do(Rtnl) as inside:
        link = inside.link("eth0")
        assert link
        mine = [each for each in inside.addresses() if each.index == link.index and not each.link_local]
        inside.execute(*(netlink.delete_address(link.index, each.address) for each in mine))


def udhcpc(instance: Instance, *options: str, device: str = "eth0") -> dict[str, str] | None:
    """What a client of busybox is told; None if nobody answers."""
    told = Path(f"/run/told-{os.urandom(4).hex()}")
    script = told.with_suffix(".sh")
    script.write_text(SCRIPT.format(to=told))
    script.chmod(0o755)
    command = [BUSYBOX, "udhcpc", "-i", device, "-s", str(script), "-f", "-q", "-n", "-t", "4", "-T", "1", *options]
    instance.do(lambda: subprocess.run(command, capture_output=True, timeout=patiently(30)))
    if not told.exists():
        return None
    return dict(line.split("=", 1) for line in told.read_text().splitlines() if "=" in line)


@isolated
def test_a_client_gets_the_addresses_of_its_port() -> None:
    with two_tenants() as cloud:
        cloud.network("acme", "10.7.0.0/16", name="jumbo", mtu=9000)
        big = cloud.instance("acme", "big", "jumbo", 9)
        for tenant, name, address in (("acme", "web", "10.0.0.2"), ("globex", "db", "10.0.0.3")):
            instance = cloud.instances[tenant, name]
            bare(instance)
            found = udhcpc(instance, "-O", "search", "-O", "mtu")
            assert found, "it is answered"
            assert (found["ip"], found["mask"], found["router"], found["dns"]) == (
                address,
                "24",
                "10.0.0.1",
                "10.0.0.1",
            )
            assert (found["hostname"], found["domain"], found["mtu"]) == (name, f"{tenant}.internal", "1500")
            assert found["search"] == f"{tenant}.internal" and found["serverid"] == "10.0.0.1"
        bare(big)
        found = udhcpc(big, "-O", "mtu", "-B")
        assert found and (found["ip"], found["mask"], found["mtu"]) == ("10.7.0.9", "16", "9000"), "by broadcast"


@isolated
def test_routes_of_a_router_are_told_without_classes() -> None:
    with two_tenants() as cloud:
        cloud.network("acme", "10.7.0.0/16", name="back")
        cloud.router("acme", "net", "back", routes={"172.16.0.0/12": "10.7.0.9"})
        web = cloud.instances["acme", "web"]
        found = udhcpc(web, "-O", "staticroutes", "-O", "121")
        assert found and found["staticroutes"].split() == [
            "0.0.0.0/0", "10.0.0.1", "10.7.0.0/16", "10.0.0.1", "172.16.0.0/12", "10.0.0.1",
        ]  # fmt: skip


@isolated
def test_an_address_that_is_not_of_the_port_is_refused() -> None:
    with two_tenants() as cloud:
        found = udhcpc(cloud.instances["acme", "web"], "-r", "10.0.0.77")
        assert found and found["ip"] == "10.0.0.2", "it gets its own"


@isolated
def test_others_get_no_answer() -> None:
    """Another MAC address than the port's; a port that is unplugged."""
    with two_tenants() as cloud:
        web = cloud.instances["acme", "web"]
        with web.do(Rtnl) as inside:
            link = inside.link("eth0")
            assert link
            inside.execute(netlink.set_link(link.index, mac="02:10:00:00:00:99"))
            assert udhcpc(web, "-t", "2") is None
            inside.execute(netlink.set_link(link.index, mac=web.port.mac))
        assert udhcpc(web), "the positive control"


@isolated
def test_an_instance_is_no_server_for_others() -> None:
    with two_tenants() as cloud:
        web, db = cloud.instances["acme", "web"], cloud.instances["acme", "db"]
        seen, other = web.sniffer(), web.sniffer()
        for source, ports in ((db.port.address, (67, 68)), (str(db.port.address6), (547, 546))):
            target = "255.255.255.255" if "." in source else "ff02::1"
            db.send_frame(frames.udp((db.port.mac, "ff:ff:ff:ff:ff:ff"), (source, target), ports, b"forged answer"))
            fine = (ports[0] + 1000, ports[1])
            db.send_frame(frames.udp((db.port.mac, "ff:ff:ff:ff:ff:ff"), (source, target), fine, b"another port"))
        assert seen.sees(b"another port", 5), "the positive control"
        assert not other.sees(b"forged answer")


@isolated
def test_who_asks_too_often_gets_fewer_answers_and_others_all() -> None:
    with two_tenants() as cloud:
        web, db = cloud.instances["acme", "web"], cloud.instances["acme", "db"]
        with web.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
            sock.bind(("eth0", 0))
            flood = discover(web)
            for _ in range(3000):
                with contextlib.suppress(OSError):
                    sock.send(flood)
        assert udhcpc(db)


def discover(instance: Instance) -> bytes:
    mac = bytes.fromhex(instance.port.mac.replace(":", ""))
    head = struct.pack("!BBBBIHH16s16s192s4s", 1, 1, 6, 0, 7, 0, 0, b"", mac, b"", bytes([99, 130, 83, 99]))
    everybody = ("0.0.0.0", "255.255.255.255")
    return frames.udp((instance.port.mac, "ff:ff:ff:ff:ff:ff"), everybody, (68, 67), head + b"\x35\1\1\xff")


@isolated
def test_clients_are_answered_after_a_restart_of_the_daemon() -> None:
    with two_tenants() as cloud:
        web = cloud.instances["acme", "web"]
        assert udhcpc(web)
        cloud.fabric.close()
        assert udhcpc(web, "-t", "1") is None
        cloud.fabric.open()
        for tenant in ("acme", "globex"):
            cloud.apply(tenant)
        assert udhcpc(web)


# -- IPv6 ------------------------------------------------------------------------------------------------------------


@isolated
def test_the_kernel_of_a_guest_takes_router_advertisements() -> None:
    with two_tenants() as cloud:
        cloud.network("acme", "10.7.0.0/16", "fd00:7::/64", name="small", mtu=1400)
        guest = cloud.instance("acme", "guest", "small", 9)
        bare(guest)
        before = {each.address for each in of_eth0(guest)}
        set_in(guest, "accept_ra", "2")
        set_in(guest, "autoconf", "1")
        again(guest)
        gateway = link_local(gateway_mac(cloud.networks["acme", "small"].index))
        eventually(lambda: has_default_route(guest, gateway))
        assert read_in(guest, "mtu") == "1400"
        with guest.do(Rtnl) as inside:
            assert any(r.destination == "fd00:7::/64" and not r.gateway for r in inside.routes()), "it is on the link"
        assert {each.address for each in of_eth0(guest)} == before, "it makes no address itself"


def has_default_route(guest: Instance, gateway: str) -> bool:
    with guest.do(Rtnl) as inside:
        return any(route.gateway == gateway and route.destination == "::/0" for route in inside.routes())


def of_eth0(instance: Instance) -> list[Address]:
    with instance.do(Rtnl) as inside:
        index = inside.index("eth0")
        return [each for each in inside.addresses() if each.index == index and ":" in each.address]


def again(instance: Instance) -> None:
    """Set the device down and up, so that the kernel sends router solicitations."""
    with instance.do(Rtnl) as inside:
        index = inside.index("eth0")
        assert index
        inside.execute(netlink.set_link(index, up=False))
        inside.execute(netlink.set_link(index, up=True))


def set_in(instance: Instance, name: str, value: str) -> None:
    instance.do(lambda: Path(f"/proc/sys/net/ipv6/conf/eth0/{name}").write_text(value))


def read_in(instance: Instance, name: str) -> str:
    found: str = instance.do(lambda: Path(f"/proc/sys/net/ipv6/conf/eth0/{name}").read_text().strip())
    return found


def dhcp6(instance: Instance, kind: int, *options: tuple[int, bytes]) -> dict[int, bytes] | None:
    """Send a DHCPv6 message as a client with only a link-local address; the options of the answer."""
    number = os.urandom(3)
    body = b"".join(struct.pack("!HH", code, len(value)) + value for code, value in options)
    with instance.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
        index = instance.do(lambda: socket.if_nametoindex("eth0"))
        sock.bind((link_local(instance.port.mac), 546, 0, index))
        sock.settimeout(5)
        sock.sendto(bytes([kind]) + number + body, ("ff02::1:2", 547, 0, index))
        try:
            data = sock.recv(1500)
        except TimeoutError:
            return None
    assert data[1:4] == number
    return {0: data[:1], **parsed(data[4:])}


def parsed(data: bytes) -> dict[int, bytes]:
    found, at = {}, 0
    while at < len(data):
        code, length = struct.unpack_from("!HH", data, at)
        found[code] = data[at + 4 : at + 4 + length]
        at += 4 + length
    return found


CLIENT_ID = (1, b"\0\3\0\1\2\3\4\5\6\7")
IA = (3, struct.pack("!III", 5, 0, 0))


@isolated
def test_dhcpv6_gives_the_address_of_the_port() -> None:
    with two_tenants() as cloud:
        web = cloud.instances["acme", "web"]
        offered = dhcp6(web, 1, CLIENT_ID, IA)
        assert offered and offered[0] == b"\2" and offered[1] == CLIENT_ID[1]
        confirmed = dhcp6(web, 3, CLIENT_ID, (2, offered[2]), IA)
        assert confirmed and confirmed[0] == b"\7"
        assert address_in(confirmed) == web.port.address6 and confirmed[3][:4] == struct.pack("!I", 5)
        assert socket.inet_ntop(socket.AF_INET6, confirmed[23]) == "fd00::1"
        assert confirmed[24] == b"\4acme\x08internal\0"
        rapid = dhcp6(web, 1, CLIENT_ID, IA, (14, b""))
        assert rapid and rapid[0] == b"\7" and 14 in rapid
        only = dhcp6(web, 11)
        assert only and 23 in only and 3 not in only
        assert dhcp6(cloud.instances["globex", "db"], 1, CLIENT_ID, IA)


def address_in(options: dict[int, bytes]) -> str:
    return socket.inet_ntop(socket.AF_INET6, parsed(options[3][12:])[5][:16])


@isolated
def test_duplicate_address_detection_and_probes_pass() -> None:
    """With them a guest may begin: neighbor solicitations from ::, ARP probes from 0.0.0.0 (RFC 4862, RFC 5227)."""
    with two_tenants() as cloud:
        assert probes_arrive(cloud.instances["acme", "web"], cloud.instance("acme", "twin", pairs=SAME))


SAME = [AddressPair(address="10.0.0.2"), AddressPair(address="fd00::2")]


def probes_arrive(web: Instance, neighbour: Instance) -> bool:
    """Whether a neighbour that may have the same addresses gets an ARP probe and a neighbor solicitation of an instance
    without addresses."""
    bare(web)
    seen = neighbour.sniffer()
    mac = bytes.fromhex(web.port.mac.replace(":", ""))
    probe = struct.pack("!HHBBH", 1, 0x800, 6, 4, 1) + mac + bytes(4) + bytes(6) + socket.inet_aton("10.0.0.2")
    web.send_frame(b"\xff" * 6 + mac + b"\x08\x06" + probe)
    if not seen.sees(probe, 5):
        return False
    target = socket.inet_pton(socket.AF_INET6, str(web.port.address6))
    group = f"ff02::1:ff00:{target[-2] << 8 | target[-1]:x}"
    message = struct.pack("!BBHI", 135, 0, 0, 0) + target + b"\x0e\1" + os.urandom(6)  # a nonce, RFC 7527
    web.send_frame(frames.icmpv6((web.port.mac, "33:33:ff:00:00:02"), ("::", group), message))
    return seen.sees(target, 5)


@isolated
def test_a_guest_may_begin_under_a_policy_that_denies_everything() -> None:
    with policy_lab() as lab:
        lab.enforce(policy("none", {}, directions=("in", "out"), dns=False))
        web, db = lab["web"], lab["db"]
        assert not db.pings("10.0.0.2", 0.3), "the policy is in force"
        assert probes_arrive(web, lab.instance("twin", pairs=SAME))
        found = udhcpc(web)
        assert found and found["ip"] == "10.0.0.2"
        rapid = dhcp6(web, 1, CLIENT_ID, IA, (14, b""))
        assert rapid and address_in(rapid) == web.port.address6
        set_in(web, "accept_ra", "2")
        again(web)
        eventually(lambda: has_default_route(web, link_local(gateway_mac(lab.cloud.networks["acme", "net"].index))))


@isolated
def test_the_server_ends_although_a_forked_process_has_its_descriptors() -> None:
    server = GuestServer()
    with Rtnl() as rtnl:
        rtnl.execute(netlink.set_link(1, up=True))
    netns = os.open(OWN, os.O_RDONLY)
    server.serve(netns)
    if (child := os.fork()) == 0:
        signal.pause()
    server.close()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    server.serve(netns)
    server.close()
