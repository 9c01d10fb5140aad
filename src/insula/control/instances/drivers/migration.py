"""The part of a driver that moves instances to other hosts while they run: what passes between two hosts."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol

from insula.model.errors import Failed
from insula.model.migration import MachineFacts, MigrationTarget
from insula.model.objects import Instance
from insula.model.stream import Kind


class HostLink(Protocol):
    """A connection to another host, as frames. `send` waits while the other side takes nothing, and raises OSError if
    the connection is lost; `next` returns None at its end."""

    async def send(self, kind: Kind, payload: bytes = b"") -> None: ...
    async def next(self) -> tuple[Kind, bytes] | None: ...


class Unsettled(Failed):
    """The instance was given away, and it is not known whether the other host has it: it has to be asked."""


class Migrations(Protocol):
    """Moves of instances. What a crash interrupts is told by `given` and by the record of the instance."""

    # -- the source ------------------------------------------------------------------------------------------------

    async def facts(self, instance: Instance) -> MachineFacts:
        """What another host has to have for an instance that runs. Failed, NotFound."""

    async def leave(self, instance: Instance, target: MigrationTarget, link: HostLink) -> None:
        """Send an instance to the other end of the link, and return when it runs there. Failed, NotFound: it goes on
        here. Unsettled: the other host has to be asked. From then on the instance is not started here before
        `settle`."""

    def given(self, instance_id: str) -> MigrationTarget | None:
        """The host that an instance was given to, if that is not settled; None if it was not given away. Blocks."""

    async def settle(self, instance_id: str, *, gone: bool) -> None:
        """End an instance that is `gone`, and else have it go on here; also after a crash before it was given away."""

    def is_leaving(self, instance_id: str) -> bool:
        """Whether there is something to settle. Blocks."""

    # -- the destination -------------------------------------------------------------------------------------------

    async def check(self, facts: MachineFacts) -> None:
        """Check that this host has what is needed. Conflict, Unavailable."""

    def expect(self, instance_id: str, facts: MachineFacts | None) -> None:
        """Have the next start of an instance wait for what `arrive` receives; None: expect it no more."""

    async def arrive(self, instance: Instance, link: HostLink, own: Callable[[], Awaitable[None]]) -> None:
        """Receive an instance that was started, and return when it runs here. `own` records that it is this host's.
        Failed, NotFound: it is not here, unless `own` has returned."""

    def disown(self, instance_id: str) -> None:
        """Make sure that an instance which has not become this host's never goes on here. OSError. Blocks."""
