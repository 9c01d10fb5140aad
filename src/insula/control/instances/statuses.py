"""`Statuses`: keeps observed statuses in memory, and writes them to the store in the background when they have settled.

An exit must be in the store before the instance's remains on this host are discarded (`saved`): until then they are
the only durable record of it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

import msgspec

from insula.control.instances.managed import ManagedInstance
from insula.control.keys import STATUS
from insula.control.tasks import Tasks
from insula.model.errors import InsulaError, from_dict
from insula.model.objects import InstanceStatus
from insula.store.protocol import Store

log = logging.getLogger("insula.control")
SETTLED = ("running", "paused", "exited", "failed")
_RETRY = 1.0  # seconds between attempts
NO_ERROR: Mapping[str, None] = {"error": None, "hint": None, "error_kind": None, "error_exit": None}


class Statuses:
    def __init__(self, store: Store, tasks: Tasks) -> None:
        self._store = store
        self._tasks = tasks

    def set(self, managed: ManagedInstance, status: InstanceStatus) -> None:
        if status == managed.status:
            return
        managed.status = status
        vanishes = status.state == "exited" and managed.instance.spec.remove  # its status would be deleted at once
        if status.state in SETTLED and not managed.gone and not vanishes:
            managed.unsaved = True
            if managed.saving is None or managed.saving.done():
                managed.saving = self._tasks.spawn(self._save(managed))

    def note(self, managed: ManagedInstance, **measured: Any) -> None:
        """Set some fields of the status."""
        self.set(managed, msgspec.structs.replace(managed.status, **measured))

    async def _save(self, managed: ManagedInstance) -> None:
        while managed.unsaved and not managed.gone:
            managed.unsaved = False
            status = managed.status
            if status.state not in SETTLED:
                continue
            try:
                await self._store.transact([], [STATUS.put(status, *managed.key)])
            except InsulaError as error:  # such as a full disk: try again; the driver keeps its record until then
                log.warning("the status of %s/%s can't be stored: %s", *managed.key, error)
                managed.unsaved = True
                await asyncio.sleep(_RETRY)

    async def saved(self, managed: ManagedInstance) -> None:
        """Return when no status of the instance is being written."""
        while managed.saving and not managed.saving.done():
            await asyncio.wait([managed.saving])


def error_fields(error: InsulaError) -> Mapping[str, Any]:
    """The fields of a status that report this error."""
    return {
        "error": error.message,
        "hint": error.hint,
        "error_kind": type(error).__name__,
        "error_exit": error.exit_status,
    }


def error_of(status: InstanceStatus) -> InsulaError:
    """The error that a status reports; the inverse of `error_fields`."""
    exit_status = None if status.error_exit is None else str(status.error_exit)
    data = {"error": status.error_kind, "message": status.error, "hint": status.hint, "exit_status": exit_status}
    return from_dict(data)
