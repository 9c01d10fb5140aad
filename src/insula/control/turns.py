"""`Turns`: how many long works of tenants go on at the same time.

Some of them wait for servers of others for as long as these like. So no tenant's first work waits for those of others,
except that all together are bounded.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Turns:
    """Turns for at most `each` works of one tenant and `all` in total. Beyond the first one of each tenant there are at
    most `more`. Others wait; those that may go on do so in the order in which they came."""

    def __init__(self, each: int, more: int, all: int) -> None:  # noqa: A002
        self._each, self._more, self._all = each, more, all
        self._running: Counter[str] = Counter()
        self._waiting: dict[asyncio.Future[None], str] = {}

    @asynccontextmanager
    async def turn(self, tenant: str) -> AsyncIterator[None]:
        """Wait for a turn, and keep it while the block runs."""
        mine = asyncio.get_running_loop().create_future()
        self._waiting[mine] = tenant
        self._call()
        try:
            await mine
            yield
        finally:
            if self._waiting.pop(mine, None) is None:
                self._running[tenant] -= 1
                if not self._running[tenant]:
                    del self._running[tenant]
                self._call()

    def _call(self) -> None:
        """Give turns to those that may have them."""
        for each, tenant in [*self._waiting.items()]:
            if self._may(tenant):
                del self._waiting[each]
                self._running[tenant] += 1
                if not each.done():  # else it was cancelled, and gives the turn back
                    each.set_result(None)

    def _may(self, tenant: str) -> bool:
        running, total = self._running[tenant], self._running.total()
        if running == 0:
            return total < self._all
        return running < self._each and total < self._all and total - len(+self._running) < self._more
