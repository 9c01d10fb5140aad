"""A laboratory for network tests: a "host" made of namespaces only, and instances to send packets from.

`isolated` runs a test in a child process with network, mount and PID namespaces of its own, so that what the test
leaves behind ends with it. `Lab` is a fabric on that host with tenants, networks and instances.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import select
import signal
import socket
import struct
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import msgspec
import pytest

from insula.kernel import netlink, syscalls
from insula.kernel.netlink import Rtnl
from insula.kernel.netns import call_in
from insula.model.objects import AddressPair, Network, Outbound, Port, Tenant
from insula.model.routers import Router, StaticRoute
from insula.network.addresses import port_mac
from insula.network.fabric import NetnsNic, Nic
from insula.network.intent import TenantIntent
from insula.network.linux.fabric import LinuxFabric
from insula.network.linux.state import addresses
from tests.support.wait import patiently, until

TIMEOUT = 60.0
SOON = patiently(1.0)
"""How long is waited for what should come. For what should not, tests wait a shorter time."""


def isolated(test: Callable[..., None]) -> Callable[..., None]:
    """Run the test as PID 1 of new namespaces, with a /proc of its own and an empty /run."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        if os.geteuid() != 0:
            pytest.skip("needs root")
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            _become_host(writer, lambda: test(*args, **kwargs))
        os.close(writer)
        try:
            said = b""
            deadline = time.monotonic() + patiently(TIMEOUT)
            while select.select([reader], [], [], max(0.0, deadline - time.monotonic()))[0]:
                if not (chunk := os.read(reader, 65536)):
                    break
                said += chunk
            else:
                said = b"the test did not end in time"
        finally:
            os.close(reader)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        if said != b"passed":
            pytest.fail(said.decode(errors="replace") or "the test's process died", pytrace=False)

    return run


def _become_host(writer: int, test: Callable[[], None]) -> None:
    try:
        gc.freeze()  # what the parent's tests have left to the collector stays, and so do its descriptors
        syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
        syscalls.unshare(syscalls.CLONE_NEWNET | syscalls.CLONE_NEWNS | syscalls.CLONE_NEWPID)
        first = os.fork()
        if first:
            os.close(writer)
            os.waitpid(first, 0)
            os._exit(0)
        syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
        syscalls.mount(None, "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
        syscalls.mount("proc", "/proc", "proc")
        syscalls.mount("tmpfs", "/run", "tmpfs", 0, "mode=755")
        test()
        os.write(writer, b"passed")
    except BaseException:
        os.write(writer, traceback.format_exc().encode())
    finally:
        os._exit(0)


class Instance:
    """A namespace as the container runtime makes it, owned by a user namespace, held by a sleeping process."""

    def __init__(self) -> None:
        reader, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                syscalls.unshare(syscalls.CLONE_NEWUSER | syscalls.CLONE_NEWNET)
                os.write(writer, b"x")
                syscalls.close_range(0, 0x7FFFFFFF)  # else it would hold the fabric's namespaces
                while True:
                    signal.pause()
            finally:
                os._exit(1)
        os.close(writer)
        assert os.read(reader, 1) == b"x"
        os.close(reader)
        self.netns = os.open(f"/proc/{self.pid}/ns/net", os.O_RDONLY)
        self.port: Port
        self.more: list[Port] = []  # further ports

    def nic(self) -> Nic:
        """What the fabric plugs its port into, for the caller to close."""
        return NetnsNic(os.dup(self.netns))

    def plugged(self, network: Network) -> None:
        """Do what is to be done inside, where the fabric can't: nothing in a container."""

    def remove(self) -> None:
        os.close(self.netns)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)

    def do(self, function: Callable[[], Any]) -> Any:
        return call_in(self.netns, function)

    def socket(self, family: int, kind: int, protocol: int = 0) -> socket.socket:
        made: socket.socket = self.do(lambda: socket.socket(family, kind, protocol))
        return made

    def sniffer(self, device: str = "eth0") -> Sniffer:
        return Sniffer(self.netns, device)

    def send_frame(self, frame: bytes) -> None:
        with self.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
            sock.bind(("eth0", 0))
            sock.send(frame)

    def pings(self, address: str, timeout: float = SOON, size: int = 8, dont_fragment: bool = False) -> bool:
        return ping(self.netns, address, timeout, size, dont_fragment)

    def connects(self, address: str, port: int, timeout: float = SOON) -> str:
        """The first data of a TCP server there; "" if none answers, or if it sends nothing within the time."""
        with self.socket(_family(address), socket.SOCK_STREAM) as sock:
            sock.settimeout(timeout)
            try:
                sock.connect((address, port))
                return sock.recv(100).decode()
            except OSError:
                return ""

    def serves(self, text: str, port: int) -> None:
        """A TCP server that says `text`, in a process of its own."""
        with self.socket(socket.AF_INET6 if self.port.address6 else socket.AF_INET, socket.SOCK_STREAM) as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(("", port))
            server.listen(64)
            if os.fork() == 0:
                while True:
                    connection, _ = server.accept()
                    connection.send(text.encode())
                    connection.close()


class Sniffer:
    """A packet socket on one device of a namespace that keeps what arrives."""

    def __init__(self, netns: int, device: str) -> None:
        def make() -> socket.socket:
            sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
            sock.bind((device, 3))
            return sock

        self.socket: socket.socket = call_in(netns, make)

    def sees(self, mark: bytes, timeout: float = 0.3) -> bool:
        """Whether a frame with `mark` in it arrives (not: leaves) in time; those that are there are all read."""
        deadline = time.monotonic() + timeout
        with contextlib.suppress(TimeoutError, BlockingIOError):
            while True:
                self.socket.settimeout(max(0.0, deadline - time.monotonic()))
                frame, (_, _, kind, *_) = self.socket.recvfrom(65536)
                if kind != 4 and mark in frame:  # PACKET_OUTGOING
                    return True
        return False


def ping(netns: int, address: str, timeout: float = SOON, size: int = 8, dont_fragment: bool = False) -> bool:
    """Whether an ICMP echo comes back."""
    six = ":" in address
    family, protocol = (socket.AF_INET6, 58) if six else (socket.AF_INET, 1)
    with call_in(netns, lambda: socket.socket(family, socket.SOCK_RAW, protocol)) as sock:
        if dont_fragment and not six:
            sock.setsockopt(socket.IPPROTO_IP, 10, 2)  # IP_MTU_DISCOVER, IP_PMTUDISC_DO
        token = os.urandom(8)
        body = struct.pack("!BBHHH", 128 if six else 8, 0, 0, 7, 1) + token + bytes(size - 8)
        if not six:
            body = body[:2] + struct.pack("!H", checksum(body)) + body[4:]
        deadline = time.monotonic() + timeout
        try:
            sock.sendto(body, (address, 0))
            while True:  # an answer that is there is read, however late this process looks for it
                sock.settimeout(max(0.0, deadline - time.monotonic()))
                packet, sender = sock.recvfrom(65536)
                kind = packet[0] if six else packet[20]
                if token in packet and kind == (129 if six else 0) and sender[0] == address:
                    return True
        except OSError:
            return False


def checksum(data: bytes) -> int:
    """RFC 1071."""
    data += bytes(len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


class Lab:
    """A fabric with short ways to make tenants, networks and instances."""

    def __init__(
        self, resolvers: tuple[str, ...] = (), run: Path | None = None, floating: tuple[str, ...] = ()
    ) -> None:
        self.run = run or Path("/run/lab")
        self.fabric = LinuxFabric(self.run, "lab", resolvers=resolvers, floating=floating)
        with Rtnl() as host:
            host.execute(netlink.set_link(1, up=True))
        self.fabric.open()
        self.tenants: dict[str, Tenant] = {}
        self.networks: dict[tuple[str, str], Network] = {}
        self.instances: dict[tuple[str, str], Instance] = {}
        self.routers: dict[tuple[str, str], Router] = {}
        self.names: dict[str, dict[str, list[str]]] = {}  # by tenant, instead of those of `instances`
        self.others: dict[str, dict[str, Any]] = {}  # by tenant: further parts of its intent
        self._ports = self._networks = 0

    def intent(self, tenant: str, **others: Any) -> TenantIntent:
        """The intent of a tenant of the lab; `others` replaces parts of it."""
        instances = [each for (owner, _), each in self.instances.items() if owner == tenant]
        ports = [port for each in instances for port in (each.port, *each.more)]
        whole = TenantIntent(
            tenant=self.tenants[tenant],
            networks=[network for (owner, _), network in self.networks.items() if owner == tenant],
            routers=[router for (owner, _), router in self.routers.items() if owner == tenant],
            ports=ports,
            names=self.names.get(tenant, {each.port.instance: self.addresses(each) for each in instances}),
        )
        return msgspec.structs.replace(whole, **(self.others.get(tenant, {}) | others))

    def apply(self, tenant: str, **others: Any) -> None:
        """Apply its intent, and raise what can't be made."""
        for error in self.fabric.apply(self.intent(tenant, **others)).values():
            raise error

    def set_names(self, tenant: str, names: dict[str, list[str]]) -> None:
        """Have these names resolve and no others."""
        self.names[tenant] = names
        self.apply(tenant)

    def tenant(self, name: str) -> Tenant:
        index = len(self.tenants) + 1
        tenant = self.tenants[name] = Tenant(name=name, index=index, id_base=index << 16, created=0.0)
        self.apply(name)
        return tenant

    def network(
        self,
        tenant: str,
        subnet: str = "10.0.0.0/24",
        subnet6: str | None = None,
        name: str = "net",
        mtu: int = 1500,
        outbound: Outbound = "nat",
    ) -> Network:
        self._networks += 1
        index = self._networks
        network = self.networks[tenant, name] = Network(
            tenant=tenant,
            name=name,
            index=index,
            vni=index,
            subnet=subnet,
            gateway=str(ip_network(subnet)[1]),
            subnet6=subnet6,
            gateway6=str(ip_network(subnet6)[1]) if subnet6 else None,
            mtu=mtu,
            outbound=outbound,
            created=0.0,
        )
        self.apply(tenant)
        return network

    def router(self, tenant: str, *networks: str, routes: dict[str, str] | None = None, name: str = "core") -> Router:
        """Make a router, or change the one with that name; without networks there is none any more."""
        made = [StaticRoute(destination=each, next_hop=hop) for each, hop in (routes or {}).items()]
        router = Router(tenant=tenant, name=name, networks=[*networks], routes=made, created=0.0)
        self.routers[tenant, name] = router
        if not networks:
            del self.routers[tenant, name]
        self.apply(tenant)
        return router

    def instance(
        self,
        tenant: str,
        name: str,
        network: str = "net",
        host: int | None = None,
        mac: str | None = None,
        labels: Mapping[str, str] | None = None,
        pairs: Sequence[AddressPair] = (),
        kind: type[Instance] = Instance,
    ) -> Instance:
        host = host or 2 + sum(i.port.tenant == tenant for i in self.instances.values())
        instance = kind()
        instance.port = msgspec.structs.replace(self.new_port(tenant, name, network, host, mac), allowed_pairs=[*pairs])
        self.plug(instance, labels)
        self.instances[tenant, name] = instance
        return instance

    def new_port(
        self, tenant: str, name: str, network: str, host: int, mac: str | None = None, interface: str = "eth0"
    ) -> Port:
        """A port that is not plugged in."""
        self._ports += 1
        net = self.networks[tenant, network]
        return Port(
            tenant=tenant,
            network=network,
            instance=name,
            index=self._ports,
            interface=interface,
            mac=mac or port_mac(f"{tenant}/{network}", str(ip_network(net.subnet)[host])),
            address=str(ip_network(net.subnet)[host]),
            address6=str(ip_network(net.subnet6)[host]) if net.subnet6 else None,
        )

    @staticmethod
    def addresses(instance: Instance) -> list[str]:
        return [address for port in (instance.port, *instance.more) for address in addresses(port)]

    def places(self, instance: Instance, without: Port | None = None) -> list[tuple[Network, Port]]:
        """The instance's ports with their networks."""
        ports = [port for port in (instance.port, *instance.more) if port != without]
        return [(self.networks[port.tenant, port.network], port) for port in ports]

    def plug_more(self, instance: Instance, port: Port) -> None:
        """Plug in a further port."""
        place = self.tenants[port.tenant], self.networks[port.tenant, port.network], port
        self.fabric.plug(*place, NetnsNic(instance.netns), self.places(instance))
        instance.more.append(port)

    def withdraw(self, instance: Instance, port: Port) -> None:
        """Unplug a port of an instance that goes on."""
        beside = self.places(instance, port)
        place = self.tenants[port.tenant], self.networks[port.tenant, port.network], port
        self.fabric.unplug(*place, NetnsNic(instance.netns), beside)
        first, *more = [other for _, other in beside]
        instance.port, instance.more = first, more

    def plug(self, instance: Instance, labels: Mapping[str, str] | None = None) -> None:
        port, network = instance.port, self.networks[instance.port.tenant, instance.port.network]
        with contextlib.closing(instance.nic()) as nic:
            self.fabric.plug(self.tenants[port.tenant], network, port, nic, labels=labels or {})
        instance.plugged(network)

    def unplug(self, instance: Instance) -> None:
        port = instance.port
        self.fabric.unplug(self.tenants[port.tenant], self.networks[port.tenant, port.network], port)

    def inside(self, tenant: str) -> int:
        """A descriptor of the tenant's namespace."""
        return os.open(self.fabric.naming.namespace(tenant), os.O_RDONLY)


@contextlib.contextmanager
def two_tenants(
    subnet6: str | None = "fd00::/64", run: Path | None = None, floating: tuple[str, ...] = ()
) -> Iterator[Lab]:
    """acme and globex, both with 10.0.0.0/24 and in it web at .2 and db at .3; `floating` is the pool."""
    lab = Lab(run=run, floating=floating)
    for tenant in ("acme", "globex"):
        lab.tenant(tenant)
        lab.network(tenant, subnet6=subnet6)
        for name in ("web", "db"):
            lab.instance(tenant, name)
    yield lab


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


class World:
    """A namespace behind the host, with 203.0.113.2 and 2001:470::2, that the host reaches over `wan`."""

    ADDRESS, HOST = "203.0.113.2", "203.0.113.1"
    ADDRESS6, HOST6 = "2001:470::2", "2001:470::1"

    def __init__(self) -> None:
        self.instance = Instance()
        with Rtnl() as host:
            host.execute(netlink.veth("wan", "eth0", self.instance.netns))
            wan = host.link("wan")
            with call_in(self.instance.netns, Rtnl) as far:
                eth0 = far.link("eth0")
                assert wan and eth0
                far.execute(
                    netlink.set_link(1, up=True),
                    netlink.set_link(eth0.index, up=True),
                    netlink.add_address(eth0.index, f"{self.ADDRESS}/24"),
                    netlink.add_address(eth0.index, f"{self.ADDRESS6}/64"),
                    # it would even know the way to the tenants' addresses
                    netlink.add_route("10.0.0.0/8", index=eth0.index, gateway=self.HOST),
                    netlink.add_route("100.64.0.0/10", index=eth0.index, gateway=self.HOST),
                )
            host.execute(
                netlink.add_address(wan.index, f"{self.HOST}/24"),
                netlink.add_address(wan.index, f"{self.HOST6}/64"),
                netlink.add_route("0.0.0.0/0", index=wan.index, gateway=self.ADDRESS),
                netlink.add_route("::/0", index=wan.index, gateway=self.ADDRESS6),
            )

    def also(self, address: str) -> None:
        """Give the host another address on `wan`, with its prefix length."""
        with Rtnl() as host:
            wan = host.link("wan")
            assert wan
            host.execute(netlink.add_address(wan.index, address))

    def tells_callers(self, port: int) -> None:
        """A TCP server that prints the addresses of its clients, in a process of its own."""
        with self.instance.socket(socket.AF_INET6, socket.SOCK_STREAM) as server:
            server.bind(("::", port))
            server.listen(64)
            if os.fork() == 0:
                while True:
                    connection, caller = server.accept()
                    connection.send(caller[0].removeprefix("::ffff:").encode())
                    connection.close()


def query(netns: int, server: str, name: str, kind: int = 1, timeout: float = SOON) -> tuple[int, list[str]] | None:
    """(response code, addresses) that a DNS server answers (RFC 1035), or None; 1 asks for A, 28 for AAAA."""
    number = os.urandom(2)
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split(".")) + b"\0"
    question = number + b"\1\0\0\1\0\0\0\0\0\0" + labels + struct.pack("!HH", kind, 1)
    with call_in(netns, lambda: socket.socket(_family(server), socket.SOCK_DGRAM)) as sock:
        sock.settimeout(timeout)
        try:
            sock.sendto(question, (server, 53))
            answer = sock.recv(4096)
        except OSError:
            return None
    assert answer[:2] == number
    count, at, found = struct.unpack_from("!H", answer, 6)[0], len(question), []
    for _ in range(count):
        at += 2 if answer[at] & 0xC0 else answer.index(b"\0", at) - at + 1
        record, _, _, length = struct.unpack_from("!HHIH", answer, at)
        if record == kind:
            found.append(str(ip_address(answer[at + 10 : at + 10 + length])))
        at += 10 + length
    return answer[3] & 15, found


def eventually(condition: Callable[[], bool]) -> None:
    """Wait for it; fail if it doesn't come true in time."""
    until(condition, "it happens", interval=0.02)
