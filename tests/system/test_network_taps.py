"""Ports of virtual machines: a tap on a network is reached, confined and verified as the port of a container is.

The machine's side is a network namespace with a tap of its own; frames are passed from one descriptor to the other,
as a hypervisor does.
"""

from __future__ import annotations

import os
import select
import socket
import threading

import pytest

from insula.kernel import netlink, tap
from insula.kernel.netlink import Rtnl
from insula.kernel.netns import call_in
from insula.model.errors import Failed
from insula.model.objects import Port
from insula.network.addresses import gateway_mac
from insula.network.fabric import TapNic
from insula.network.linux import naming, sysctl
from insula.network.linux.interfaces import addresses_of
from insula.network.verify import verify
from tests.support.lab import Instance, Lab, eventually, isolated, two_tenants

_FRAME = 1 << 16


class Guest(Instance):
    """A machine on a tap. `tap` is its descriptor: closing it is the end of the machine."""

    def __init__(self, cloud: Lab, tenant: str, name: str, host: int) -> None:
        super().__init__()
        self.port = cloud.new_port(tenant, name, "net", host)
        self.tap = tap.make()
        self.place = cloud.tenants[tenant], cloud.networks[tenant, "net"], self.port
        nic = TapNic(os.dup(self.tap))
        cloud.fabric.plug(*self.place, nic)
        nic.close()
        self.device = tap.make()
        there = tap.namespace(self.device)
        self._configure(there, self.port)
        os.close(there)
        self._ends, self._ended = os.pipe()
        self._relay = threading.Thread(target=self._pass_on)
        self._relay.start()

    def _configure(self, there: int, port: Port) -> None:
        self.do(lambda: sysctl.write(sysctl.interface(ipv6=port.address6 is not None)))
        with call_in(there, Rtnl) as rtnl:
            index = rtnl.index(tap.name(self.device))
            assert index is not None
            rtnl.execute(netlink.move_link(index, self.netns, name="eth0", new_index=5))
        with call_in(self.netns, Rtnl) as rtnl:
            rtnl.execute(netlink.set_link(5, up=True, mac=port.mac))
            for each in addresses_of(self.place[1], port):
                rtnl.execute(netlink.add_address(5, each.with_prefix))
                rtnl.execute(netlink.add_neighbour(5, each.gateway, gateway_mac(self.place[1].index)))
                rtnl.execute(netlink.add_route(each.everything, index=5, gateway=each.gateway))

    def _pass_on(self) -> None:
        while True:
            ready, _, _ = select.select([self.tap, self.device, self._ends], [], [])
            if self._ends in ready:
                return
            for each in ready:
                try:
                    os.write(self.device if each == self.tap else self.tap, os.read(each, _FRAME))
                except OSError:  # the other end is down
                    continue

    def end(self) -> None:
        """End the machine: its tap goes."""
        os.write(self._ended, b"x")  # a server, which is a fork, has copies of all descriptors
        self._relay.join()
        os.close(self.tap)
        os.close(self.device)


@isolated
def test_a_machine_is_an_instance_like_others() -> None:
    with two_tenants() as cloud:
        db, other = cloud.instances["acme", "db"], cloud.instances["globex", "db"]
        guest = Guest(cloud, "acme", "vm", 9)
        cloud.instances["acme", "vm"] = guest
        for version in (4, 6):
            address = "10.0.0.9" if version == 4 else "fd00::9"
            assert db.pings(address) and guest.pings("10.0.0.3" if version == 4 else "fd00::3")
            assert not other.pings(address, 0.3), "it is not in that tenant"
        guest.serves("from the machine", 80)
        assert db.connects("10.0.0.9", 80) == "from the machine"

        containers = [each for each in cloud.instances.values() if each is not guest]
        found = verify(
            cloud.fabric,
            list(cloud.tenants.values()),
            list(cloud.networks.values()),
            [each.port for each in cloud.instances.values()],
            {each.port.index: each.netns for each in containers},
            taps=[guest.port.index],
        )
        assert found.drift == [] and found.findings == [] and found.passed
        assert any("acme/vm" in (each.source, each.target) and each.probed for each in found.matrix)
        guest.end()


@isolated
def test_a_machine_can_not_send_from_the_address_of_another() -> None:
    with two_tenants() as cloud:
        guest = Guest(cloud, "acme", "vm", 9)
        db = cloud.instances["acme", "db"]
        assert guest.pings("10.0.0.3"), "its MAC address is known from now on"
        spy = db.sniffer()
        for source, mark in (("10.0.0.77", b"forged by a machine"), ("10.0.0.9", b"honest")):
            if source != "10.0.0.9":
                with guest.do(Rtnl) as rtnl:
                    rtnl.execute(netlink.add_address(5, f"{source}/24"))
            with guest.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.bind((source, 0))
                sock.sendto(mark, ("10.0.0.3", 9))
        assert spy.sees(b"honest", 2.0), "the control"
        assert not spy.sees(b"forged by a machine")
        guest.end()


@isolated
def test_nothing_is_left_of_it_and_another_takes_its_place() -> None:
    with two_tenants() as cloud:
        guest = Guest(cloud, "acme", "vm", 9)
        db, device = cloud.instances["acme", "db"], naming.port(guest.port.index)
        with Rtnl() as rtnl:
            assert rtnl.index("tap0") is None, "the host does not see it"
        cloud.fabric.plug(*guest.place, TapNic(None))
        assert db.pings("10.0.0.9"), "insulad was started again"
        again = TapNic(tap.make())
        cloud.fabric.plug(*guest.place, again)
        assert not db.pings("10.0.0.9", 0.3), "its place was taken"
        again.close()
        guest.end()
        cloud.fabric.unplug(*guest.place)
        cloud.apply("acme")
        installed = cloud.fabric.installed(cloud.tenants["acme"])
        eventually(lambda: device not in [port.device for port in cloud.fabric.installed(cloud.tenants["acme"]).ports])
        assert installed.drift == []
        with pytest.raises(Failed, match="tap of vm is gone"):
            cloud.fabric.plug(*guest.place, TapNic(None))
