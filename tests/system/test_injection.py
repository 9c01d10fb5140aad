"""An injected frame is received by the device that it is injected at, and by no other before."""

from __future__ import annotations

import errno
import os
import socket

import pytest

from insula.kernel import netlink
from insula.kernel.injection import Injector
from insula.kernel.netlink import Rtnl
from insula.kernel.netns import call_in
from tests.support.descriptors import descriptors, opened_since
from tests.support.frames import BROADCAST, ethernet
from tests.support.lab import SOON, Instance, Sniffer, isolated

EXPERIMENTAL = 0x88B5  # a local EtherType (IEEE 802)


@isolated
def test_a_frame_arrives_at_the_device_and_its_other_end_sees_nothing() -> None:
    other = Instance()
    with Rtnl() as host, call_in(other.netns, Rtnl) as far, Injector() as injector:
        host.execute(netlink.veth("near", "eth0", other.netns))
        near, there = host.link("near"), far.link("eth0")
        assert near and there
        far.execute(netlink.set_link(there.index, up=True))
        assert host.sync_carrier("near")
        here = os.open("/proc/self/ns/net", os.O_RDONLY)
        receiver, spy, mark = Sniffer(here, "near"), other.sniffer(), os.urandom(8)
        frame = ethernet(BROADCAST, there.mac, EXPERIMENTAL, mark + bytes(46))
        injector.inject(near.index, frame)
        assert receiver.sees(mark, SOON)
        assert not spy.sees(mark, 0.1)
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:  # the control: this is how a frame is sent
            sock.bind(("near", 0))
            sock.send(frame)
        assert spy.sees(mark, SOON)


@isolated
def test_a_device_that_takes_no_frame_is_an_error() -> None:
    other = Instance()
    frame = ethernet(BROADCAST, "02:00:00:00:00:01", EXPERIMENTAL, bytes(46))
    with Rtnl() as host, Injector() as injector:
        host.execute(netlink.veth("near", "eth0", other.netns))
        near = host.link("near")
        assert near
        injector.inject(near.index, frame)
        host.execute(netlink.set_link(near.index, up=False))
        with pytest.raises(OSError, match="Network is down") as refused:
            injector.inject(near.index, frame)
        assert refused.value.errno == errno.ENETDOWN
        host.execute(netlink.delete_link(name="near"))
        with pytest.raises(OSError, match="No such device") as refused:
            injector.inject(near.index, frame)
        assert refused.value.errno == errno.ENODEV


@isolated
def test_an_injector_leaves_nothing() -> None:
    before = descriptors()
    for _ in range(3):
        with Injector():
            ((_, target, *_),) = opened_since(before)
            assert target == "anon_inode:bpf-prog"
        assert not opened_since(before)
