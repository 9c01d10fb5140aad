"""The registry of fabrics: a new fabric is a new entry, and the setting names it."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import Any, cast

import msgspec
import pytest

from insula.control.networks import fabrics
from insula.model.errors import Invalid, Unavailable
from insula.model.objects import Network, Port, Tenant
from insula.network.fabric import Fabric, VfNic
from insula.network.linux.fabric import LinuxFabric
from insula.settings import Settings


class Recorded:
    """A fabric that remembers what it is told."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.told = settings, list[str]()

    def open(self) -> None:
        self.told.append("open")

    def close(self) -> None:
        self.told.append("close")


def opened(settings: Settings) -> tuple[Fabric, list[str]]:
    """The fabric, and what it was told before it was closed."""

    async def work() -> tuple[Fabric, list[str]]:
        async with AsyncExitStack() as closing:
            fabric = await fabrics.open_fabric(settings, closing)
            return fabric, list(cast(Any, fabric).told)

    return asyncio.run(work())


def test_another_fabric_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fabrics.FABRICS, "recorded", cast(Any, Recorded))
    settings = msgspec.structs.replace(Settings(), fabric="recorded")
    fabric, told = opened(settings)
    assert isinstance(fabric, Recorded) and fabric.settings is settings
    assert told == ["open"] and fabric.told == ["open", "close"]


def test_an_unknown_fabric_is_refused_with_the_names_of_all() -> None:
    with pytest.raises(Invalid, match="there is no fabric ovs") as refused:
        opened(msgspec.structs.replace(Settings(), fabric="ovs"))
    assert refused.value.hint == "set fabric to one of linux"


def test_the_default_is_the_linux_fabric_with_the_settings() -> None:
    fabric = fabrics.FABRICS[Settings().fabric](Settings(prefix="other"))
    assert isinstance(fabric, LinuxFabric)
    assert fabric.naming.prefix == "other"
    assert {"100.64.0.0/10", "fd69:6e73:756c:6100::/64"} < {*fabric.reserved}, "and the addresses of the gate"


def test_the_linux_fabric_refuses_virtual_functions(tmp_path: Any) -> None:
    fabric = LinuxFabric(tmp_path, "other", resolvers=())
    fabric._calls.open()
    tenant = Tenant(name="a", index=1, id_base=1 << 16, created=0.0)
    network = Network(
        tenant="a", name="n", index=1, vni=1, subnet="10.0.0.0/24", gateway="10.0.0.1", mtu=1500, created=0.0
    )
    port = Port(tenant="a", network="n", instance="vm", index=1, mac="02:10:00:00:00:01", address="10.0.0.2")
    with pytest.raises(Unavailable, match="vm has a virtual function") as refused:
        fabric.plug(tenant, network, port, VfNic("0000:01:10.0"))
    assert refused.value.hint
