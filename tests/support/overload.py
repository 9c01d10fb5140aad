"""Several hosts whose senders are limited: what insulad runs on each, and a switch that drops what does not fit."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Coroutine, Mapping
from typing import Any

from insula.control.networks.overload import OverloadControl
from insula.control.tasks import Tasks
from insula.kernel.netlink import Rtnl
from insula.kernel.netlink import traffic_control as tc
from tests.support.hosts import Cloud, Host


def switch_port_of(host: Host, link: int) -> None:
    """Make the switch's port to a host a queue of its own, as wide as the link: it drops what does not fit, whose ever
    it is."""
    with Rtnl() as middle:
        index = middle.index(f"to{host.number}")
        assert index is not None
        middle.execute(tc.set_tbf(index, link, 64 << 10, 1 << 20))


class Controls:
    """What insulad runs on each host, and messages between the hosts without a way that takes time."""

    def __init__(self, cloud: Cloud) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._tasks = Tasks()
        self.of: dict[str, OverloadControl] = {}
        self.call(self._begin(cloud))

    async def _begin(self, cloud: Cloud) -> None:
        for host in cloud.hosts:
            tell = functools.partial(self._tell, host.address)
            control = self.of[host.address] = OverloadControl(host.fabric, self._tasks, tell)
            control.set_hosts(each.address for each in cloud.hosts if each is not host)
            self._tasks.spawn(control.run())

    async def _tell(self, receiver: str, sender: str, ceilings: Mapping[int, int]) -> None:
        await self.of[sender].limit(receiver, ceilings)

    def close(self) -> None:
        self.call(self._tasks.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def call(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(30)
