"""Ports of virtual machines: a tap on a network is reached, confined and verified as the port of a container is."""

from __future__ import annotations

import socket
import subprocess
from typing import TypeVar

import pytest

from insula.kernel import netlink, tap
from insula.kernel.netlink import Rtnl
from insula.kernel.netns import call_in
from insula.model.errors import Failed
from insula.model.objects import Network, Port, Tenant
from insula.network.addresses import link_local
from insula.network.fabric import DeviceNic, TapNic
from insula.network.linux import naming
from insula.network.proof.verify import verify
from tests.support.lab import Instance, Lab, eventually, isolated, two_tenants
from tests.support.taps import DEVICE, DeviceInstance, MachineInstance, TapInstance

Kind = TypeVar("Kind", bound=MachineInstance)


def machine(cloud: Lab, kind: type[Kind]) -> Kind:
    """The machine vm of acme, at 10.0.0.9 and fd00::9."""
    made = cloud.instance("acme", "vm", host=9, kind=kind)
    assert isinstance(made, kind)
    return made


def place(cloud: Lab, guest: Instance) -> tuple[Tenant, Network, Port]:
    port = guest.port
    return cloud.tenants[port.tenant], cloud.networks[port.tenant, port.network], port


def learn_its_link_local(guest: Instance, cloud: Lab) -> None:
    """Have the router know the link-local address that the guest's kernel has made, as when it is asked from there."""
    own, bridge = link_local(guest.port.mac), naming.bridge(cloud.networks["acme", "net"].index)
    command = ["ip", "neigh", "replace", own, "lladdr", guest.port.mac, "dev", bridge, "nud", "reachable"]
    call_in(cloud.inside("acme"), lambda: subprocess.run(command, check=True))


@isolated
def test_a_machine_is_an_instance_like_others() -> None:
    with two_tenants() as cloud:
        db, other = cloud.instances["acme", "db"], cloud.instances["globex", "db"]
        guest = machine(cloud, TapInstance)
        for version in (4, 6):
            address = "10.0.0.9" if version == 4 else "fd00::9"
            assert db.pings(address) and guest.pings("10.0.0.3" if version == 4 else "fd00::3")
            assert not other.pings(address, 0.3), "it is not in that tenant"
        learn_its_link_local(guest, cloud)
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
        assert_honest(cloud, machine(cloud, TapInstance))


def assert_honest(cloud: Lab, guest: MachineInstance) -> None:
    """Have a machine send from an address that is not its own. It is ended."""
    db = cloud.instances["acme", "db"]
    spy = db.sniffer()
    for source, mark in (("10.0.0.77", b"forged by a machine"), ("10.0.0.9", b"honest")):
        if source != "10.0.0.9":
            with guest.do(Rtnl) as rtnl:
                rtnl.execute(netlink.add_address(DEVICE, f"{source}/24"))
        with guest.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind((source, 0))
            sock.sendto(mark, ("10.0.0.3", 9))
    assert spy.sees(b"honest", 2.0), "the control"
    assert not spy.sees(b"forged by a machine")
    guest.end()


@isolated
def test_nothing_is_left_of_it_and_another_takes_its_place() -> None:
    with two_tenants() as cloud:
        guest = machine(cloud, TapInstance)
        db, device = cloud.instances["acme", "db"], naming.port(guest.port.index)
        with Rtnl() as rtnl:
            assert rtnl.index("tap0") is None, "the host does not see it"
        cloud.fabric.plug(*place(cloud, guest), TapNic(None))
        assert db.pings("10.0.0.9"), "insulad was started again"
        again = TapNic(tap.make())
        cloud.fabric.plug(*place(cloud, guest), again)
        assert not db.pings("10.0.0.9", 0.3), "its place was taken"
        again.close()
        guest.end()
        where = place(cloud, guest)
        del cloud.instances["acme", "vm"]
        cloud.fabric.unplug(*where)
        cloud.apply("acme")
        installed = cloud.fabric.installed(cloud.tenants["acme"])
        eventually(lambda: device not in [port.device for port in cloud.fabric.installed(cloud.tenants["acme"]).ports])
        assert installed.drift == []
        with pytest.raises(Failed, match="tap of vm is gone"):
            cloud.fabric.plug(*where, TapNic(None))


@isolated
def test_the_device_of_a_hypervisor_is_a_port_as_a_tap_is() -> None:
    with two_tenants() as cloud:
        db, other = cloud.instances["acme", "db"], cloud.instances["globex", "db"]
        guest = machine(cloud, DeviceInstance)
        with Rtnl() as rtnl:
            assert rtnl.index(guest.device) is None, "it was moved into the tenant's namespace"
        for version in (4, 6):
            address = "10.0.0.9" if version == 4 else "fd00::9"
            assert db.pings(address) and guest.pings("10.0.0.3" if version == 4 else "fd00::3")
            assert not other.pings(address, 0.3), "it is not in that tenant"
        cloud.fabric.plug(*place(cloud, guest), DeviceNic(None))
        assert db.pings("10.0.0.9"), "insulad was started again"
        learn_its_link_local(guest, cloud)
        found = verify(
            cloud.fabric,
            list(cloud.tenants.values()),
            list(cloud.networks.values()),
            [each.port for each in cloud.instances.values()],
            {each.port.index: each.netns for each in cloud.instances.values() if each is not guest},
            taps=[guest.port.index],
        )
        assert found.drift == [] and found.findings == [] and found.passed
        guest.end()
        cloud.fabric.unplug(*place(cloud, guest))
        with pytest.raises(Failed, match="network device of vm is gone"):
            cloud.fabric.plug(*place(cloud, guest), DeviceNic(None))
        with pytest.raises(Failed, match=f"network device {guest.device} of vm is missing"):
            cloud.fabric.plug(*place(cloud, guest), DeviceNic(guest.device))


@isolated
def test_it_can_not_send_from_the_address_of_another() -> None:
    with two_tenants() as cloud:
        assert_honest(cloud, machine(cloud, DeviceInstance))
