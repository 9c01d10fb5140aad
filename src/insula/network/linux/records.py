"""Records of the tenants that something was made for on this host, which outlive insulad and not a reboot."""

from __future__ import annotations

import json
from pathlib import Path

from insula.kernel import records, trees
from insula.model.objects import Tenant


class TenantRecords:
    """A directory with a file for each tenant, written before anything is made for it, so that a sweep finds all."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self.directory = run / "tenants"

    def add(self, tenant: Tenant) -> None:
        """Record that this tenant is about to be made; no error if it is recorded."""
        record = self.directory / tenant.name
        if not record.exists():
            draft = self._run / f"{tenant.name}.new"
            draft.write_text(json.dumps({"index": tenant.index}))
            draft.rename(record)

    def has(self, tenant: Tenant) -> bool:
        """Whether something was made for a tenant of this name."""
        return (self.directory / tenant.name).exists()

    def remove(self, name: str) -> None:
        (self.directory / name).unlink(missing_ok=True)

    def indices(self) -> dict[str, int]:
        """Return the index by name of all recorded tenants. A damaged record is removed: `apply` writes it again."""
        found = {}
        for path in self.directory.iterdir():
            try:
                found[path.name] = int(json.loads(records.read(path))["index"])
            except (OSError, ValueError, KeyError, TypeError):
                trees.remove(path)
        return found
