"""Transit addresses: for each tenant and address of the host that it publishes ports of, an address of its own.

Two addresses of the host may have the same port published by one tenant. Its namespace sees packets after the host's
translation, so it can tell them apart only if each address is translated to another one. Ports of all addresses of the
host lead to the address of the tenant's uplink, which needs no entry here.

The addresses are the last ones of the uplinks' ranges; those of uplinks are the first. They are recorded on a file
system that is empty after a reboot, because connections that are open refer to them: after a restart of insulad they
have to be the same.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Mapping
from itertools import count
from pathlib import Path

from insula.kernel import records
from insula.model.errors import Conflict
from insula.network.linux.naming import Naming
from insula.network.linux.outside.addresses import version

_MOST = 1 << 16


class Transits:
    """The transit addresses of all tenants; `directory` has a file for each tenant with packets from outside."""

    def __init__(self, directory: Path, names: Naming) -> None:
        self._directory = directory
        self._names = names
        self._lock = threading.Lock()

    def tenants(self) -> list[str]:
        """Return the names of the tenants that something was installed for."""
        return [path.name for path in self._directory.iterdir() if path.suffix != ".new"]

    def exists(self, tenant: str) -> bool:
        """Whether something may be installed for this tenant."""
        return (self._directory / tenant).exists()

    def ensure(self, tenant: str, addresses: Iterable[str], *, complete: bool = True) -> Mapping[str, str]:
        """Return the transit address by address of the host; missing ones are allocated, and with `complete` others of
        the tenant freed.

        Conflict if there is none left.
        """
        with self._lock:
            mine = self._read(tenant)
            wanted = sorted({*addresses} if complete else {*addresses, *mine})
            kept = {address: mine[address] for address in wanted if address in mine}
            if len(kept) < len(wanted):
                taken = {number for name in self.tenants() for number in self._read(name).values()}
                free = (number for number in count() if number not in taken)
                for address in wanted:
                    if address not in kept and (kept.setdefault(address, next(free))) >= _MOST:
                        raise Conflict("all transit addresses are in use", "publish ports without an address")
            if kept != mine or not self.exists(tenant):
                draft = self._directory / f"{tenant}.new"
                draft.write_text(json.dumps(kept))
                draft.rename(self._directory / tenant)
            return {address: self._address(address, number) for address, number in kept.items()}

    def known(self, tenant: str) -> Mapping[str, str]:
        """Return the tenant's transit addresses."""
        with self._lock:
            return {address: self._address(address, number) for address, number in self._read(tenant).items()}

    def remove(self, tenant: str) -> None:
        """Free the tenant's addresses."""
        (self._directory / tenant).unlink(missing_ok=True)

    def _address(self, address: str, number: int) -> str:
        range_ = self._names.range6 if version(address) == 6 else self._names.range4
        return str(range_[-2 - number])

    def _read(self, tenant: str) -> dict[str, int]:
        try:
            found = json.loads(records.read(self._directory / tenant))
            return {str(address): int(number) for address, number in found.items()}
        except (OSError, ValueError, AttributeError, TypeError):
            return {}
