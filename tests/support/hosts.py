"""Several hosts for network tests: each is a network namespace with a fabric of its own, and a bridge joins them.

To be used in a test that is `isolated`. Instances are those of `tests.support.lab`. A function of a fabric runs in a
thread that is in its host's namespace, as insulad's threads are.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from ipaddress import ip_network
from pathlib import Path
from typing import Any, TypeVar

from insula.kernel import netlink
from insula.kernel.netlink import Rtnl
from insula.kernel.netns import OWN, call_in, call_in_new
from insula.model.errors import InsulaError
from insula.model.objects import Network, Port, Tenant
from insula.model.routers import Router
from insula.network.addresses import port_mac
from insula.network.fabric import NetnsNic
from insula.network.intent import RemotePort, TenantIntent
from insula.network.linux.fabric import LinuxFabric
from insula.network.linux.state import addresses
from insula.network.linux.underlay import Underlay
from tests.support.lab import Instance, Sniffer

T = TypeVar("T")
UNDERLAY = {4: "198.51.100.{}", 6: "fd20::{}"}
_LENGTH = {4: 24, 6: 64}


class Machine:
    """A network namespace on the bridge that joins the hosts, with an address there."""

    def __init__(self, number: int, version: int, mtu: int) -> None:
        self.number = number
        self.address = UNDERLAY[version].format(number)
        self.netns = call_in_new(lambda: os.open(OWN, os.O_RDONLY | os.O_CLOEXEC))
        with Rtnl() as middle, call_in(self.netns, Rtnl) as here:
            if middle.index("switch") is None:
                middle.execute(netlink.bridge("switch", mac="02:aa:00:00:00:01", mtu=mtu))
            port, switch = f"to{number}", middle.index("switch")
            middle.execute(netlink.veth(port, "wan", self.netns, mtu=mtu, master=switch))
            wan = here.index("wan")
            assert wan is not None
            here.execute(
                netlink.set_link(1, up=True),
                netlink.set_link(wan, up=True, mtu=mtu),
                netlink.add_address(wan, f"{self.address}/{_LENGTH[version]}"),
            )
            middle.sync_carrier(port)
            here.sync_carrier("wan")

    def do(self, function: Callable[[], T]) -> T:
        return call_in(self.netns, function)

    def sniffer(self) -> Sniffer:
        """What arrives on the underlay."""
        return Sniffer(self.netns, "wan")

    def sends(self, packet: bytes, to: str) -> None:
        """Send the payload of a UDP datagram to the VXLAN port of a host."""
        family = socket.AF_INET6 if ":" in to else socket.AF_INET
        with self.do(lambda: socket.socket(family, socket.SOCK_DGRAM)) as sock:
            sock.sendto(packet, (to, 4789))


class Host(Machine):
    """A machine with a fabric."""

    def __init__(self, number: int, version: int, mtu: int) -> None:
        super().__init__(number, version, mtu)
        self.start()

    def start(self, device: str | None = None) -> None:
        """Open a fabric, the first one or one that replaces another that was killed."""
        run, prefix = Path(f"/run/h{self.number}"), f"h{self.number}"
        self.fabric = LinuxFabric(run, prefix, resolvers=(), underlay=Underlay(self.address, device))
        self.do(self.fabric.open)

    def inside(self, tenant: str) -> int:
        """A descriptor of the tenant's namespace."""
        return os.open(self.fabric.naming.namespace(tenant), os.O_RDONLY)


class Cloud:
    """Hosts with short ways to make tenants, networks and instances, as `tests.support.lab.Lab` has them for one."""

    def __init__(self, count: int = 3, version: int = 4, mtu: int = 1600) -> None:
        self.version, self.mtu = version, mtu
        self.hosts = [Host(number, version, mtu) for number in range(1, count + 1)]
        for host in self.hosts:
            host.do(lambda host=host: host.fabric.set_hosts([each.address for each in self.hosts]))  # type: ignore[misc]
        self.tenants: dict[str, Tenant] = {}
        self.networks: dict[tuple[str, str], Network] = {}
        self.routers: list[Router] = []
        self.instances: dict[tuple[str, str], Instance] = {}
        self.places: dict[tuple[str, str], Host] = {}
        self._ports = 0

    def tenant(self, name: str) -> Tenant:
        index = len(self.tenants) + 1
        tenant = self.tenants[name] = Tenant(name=name, index=index, id_base=index << 16, created=0.0)
        self.apply(name)
        return tenant

    def network(
        self,
        tenant: str,
        subnet: str = "10.0.0.0/24",
        subnet6: str | None = "fd00::/64",
        name: str = "net",
        mtu: int = 1500,
    ) -> Network:
        index = len(self.networks) + 1
        network = self.networks[tenant, name] = Network(
            tenant=tenant,
            name=name,
            index=index,
            vni=4096 + index,
            subnet=subnet,
            gateway=str(ip_network(subnet)[1]),
            subnet6=subnet6,
            gateway6=str(ip_network(subnet6)[1]) if subnet6 else None,
            mtu=mtu,
            created=0.0,
        )
        self.apply(tenant)
        return network

    def instance(self, tenant: str, name: str, host: int, network: str = "net", number: int | None = None) -> Instance:
        """Start an instance on that host, the first of which is 1, and tell the others."""
        self._ports += 1
        net, instance = self.networks[tenant, network], Instance()
        number = number or 2 + sum(owner == tenant for owner, _ in self.instances)
        address = str(ip_network(net.subnet)[number])
        instance.port = Port(
            tenant=tenant,
            network=network,
            instance=name,
            index=self._ports,
            mac=port_mac(f"{tenant}/{network}", address),
            address=address,
            address6=str(ip_network(net.subnet6)[number]) if net.subnet6 else None,
        )
        self.instances[tenant, name], self.places[tenant, name] = instance, self.hosts[host - 1]
        self.plug(instance)
        self.apply(tenant)
        return instance

    def plug(self, instance: Instance) -> None:
        port, nic = instance.port, NetnsNic(instance.netns)
        host = self.places[port.tenant, port.instance]
        network = self.networks[port.tenant, port.network]
        host.do(lambda: host.fabric.plug(self.tenants[port.tenant], network, port, nic))

    def unplug(self, instance: Instance, host: Host) -> None:
        port = instance.port
        network = self.networks[port.tenant, port.network]
        host.do(lambda: host.fabric.unplug(self.tenants[port.tenant], network, port))

    def intent(self, tenant: str, host: Host, **others: Any) -> TenantIntent:
        """The intent of a tenant on one host: the ports on other hosts of networks that have ports there."""
        mine = [each.port for key, each in self.instances.items() if key[0] == tenant and self.places[key] is host]
        used = {port.network for port in mine}
        routers = [router for router in self.routers if router.tenant == tenant]
        used |= {name for router in routers if used & {*router.networks} for name in router.networks}
        remotes = [
            RemotePort(
                network=each.port.network,
                instance=each.port.instance,
                mac=each.port.mac,
                addresses=addresses(each.port),
                host=self.places[key].address,
            )
            for key, each in self.instances.items()
            if key[0] == tenant and self.places[key] is not host and each.port.network in used
        ]
        networks = [network for (owner, _), network in self.networks.items() if owner == tenant]
        parts = {"networks": networks, "ports": mine, "remotes": remotes, "routers": routers, **others}
        return TenantIntent(tenant=self.tenants[tenant], names={}, **parts)

    def errors(self, tenant: str, host: Host, **others: Any) -> dict[str, InsulaError]:
        """Apply the intent of a tenant on one host; returns what can't be made."""
        intent = self.intent(tenant, host, **others)
        return host.do(lambda: host.fabric.apply(intent))

    def apply(self, tenant: str, hosts: Sequence[Host] | None = None, **others: Any) -> None:
        """Apply the intents of a tenant on all hosts, and raise what can't be made."""
        for host in self.hosts if hosts is None else hosts:
            for error in self.errors(tenant, host, **others).values():
                raise error

    def drift(self) -> list[str]:
        """All differences that the hosts report."""
        found = []
        for host in self.hosts:
            found += [f"h{host.number}: {text}" for text in host.do(host.fabric.host_drift)]
            for tenant in self.tenants.values():
                installed = host.do(lambda host=host, tenant=tenant: host.fabric.installed(tenant))  # type: ignore[misc]
                found += [f"h{host.number} {tenant.name}: {text}" for text in installed.drift]
        return found
