"""Two control planes on one store promise no more together than there is, however their requests interleave."""

from __future__ import annotations

import asyncio

import msgspec

from insula.control.keys import GUARANTEES
from insula.control.plane import ControlPlane
from insula.model.errors import Conflict
from insula.model.guarantees import GuaranteePatch
from insula.settings import Settings
from tests.system.test_two_planes import hosts, run

__all__ = ["hosts"]
MBIT = 1_000_000
TENANTS = [f"t{number}" for number in range(6)]


def test_floors_are_never_oversold(hosts: list[Settings]) -> None:
    linked = [
        msgspec.structs.replace(each, network=msgspec.structs.replace(each.network, link="100mbit")) for each in hosts
    ]

    async def body(a: ControlPlane, b: ControlPlane) -> None:
        for name in TENANTS:
            await a.tenants.create(name)

        async def take(plane: ControlPlane, tenant: str, mbit: int) -> bool:
            try:
                await plane.guarantees.set(tenant, GuaranteePatch(floor_out=mbit * MBIT))
            except Conflict:
                return False
            return True

        for mbit in (30, 20):
            requests = [take(plane, tenant, mbit) for tenant in TENANTS for plane in (a, b)]
            await asyncio.gather(*requests)
            floors = [each.floor_out or 0 for each in await GUARANTEES.list(a.context.store)]
            assert sum(floors) <= 95 * MBIT, floors
            assert 95 * MBIT - sum(floors) < mbit * MBIT or len(floors) == len(TENANTS), "what fits was admitted"

    run(linked, body)
