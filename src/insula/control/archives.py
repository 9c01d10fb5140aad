"""`insula cp`: trees in and out of instances, running or not, as tar streams."""

from __future__ import annotations

from collections.abc import AsyncIterator

from insula.control.supervisor import Member, Supervisor
from insula.model.errors import Unavailable


class Archives:
    def __init__(self, supervisor: Supervisor) -> None:
        self.engine = supervisor.engine
        self.supervisor = supervisor

    async def get(self, member: Member, path: str) -> AsyncIterator[bytes]:
        raise Unavailable("not there yet")
        yield b""

    async def put(self, member: Member, path: str, pieces: AsyncIterator[bytes]) -> None:
        raise Unavailable("not there yet")
