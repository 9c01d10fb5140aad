"""Where Insula keeps its things on a host. Everything else asks here, so that several daemons can run side by side."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from insula.model.errors import Invalid
from insula.model.units import shorten

_PREFIX = re.compile(r"[a-z][a-z0-9]{0,7}")


@dataclass(frozen=True)
class Settings:
    """`root` holds what must survive a reboot, `run` what must not. `prefix` begins the names of everything that the
    kernel keeps by name: network namespaces, nftables tables, the parent control group. `spares` containers are made
    ahead for each tenant that launches."""

    root: Path = Path("/var/lib/insula")
    run: Path = Path("/run/insula")
    prefix: str = "insula"
    socket: Path = Path("/run/insula/insulad.sock")
    spares: int = 2

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Settings:
        """The defaults, overridden by INSULA_ROOT, INSULA_RUN, INSULA_PREFIX, INSULA_SOCKET and INSULA_SPARES."""
        root = Path(environ.get("INSULA_ROOT") or cls.root)
        run = Path(environ.get("INSULA_RUN") or cls.run)
        prefix = environ.get("INSULA_PREFIX") or cls.prefix
        for name, path in (("INSULA_ROOT", root), ("INSULA_RUN", run)):
            if not path.is_absolute():
                raise Invalid(f"{name} {shorten(str(path))} is not absolute", "write the whole path")
        if not _PREFIX.fullmatch(prefix):
            raise Invalid(f"INSULA_PREFIX {shorten(prefix)} is no prefix", "use 1 to 8 of a-z and 0-9, a letter first")
        spares = environ.get("INSULA_SPARES") or str(cls.spares)
        if not (spares.isascii() and spares.isdigit() and int(spares) <= 32):
            raise Invalid(f"INSULA_SPARES {shorten(spares)} is not a number from 0 to 32", "leave it out for 2")
        return cls(root, run, prefix, Path(environ.get("INSULA_SOCKET") or run / "insulad.sock"), int(spares))

    @property
    def state(self) -> Path:
        return self.root / "state.db"

    @property
    def images(self) -> Path:
        return self.root / "images"

    @property
    def instances(self) -> Path:
        return self.root / "instances"

    def make(self) -> None:
        """The directories, for root alone: what is below has owners of tenants' ranges. The run directory can be
        entered, for the socket in it is for a group; what is private there guards itself."""
        for path in (self.root, self.instances):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.chmod(0o700)
        self.run.mkdir(mode=0o711, parents=True, exist_ok=True)
        self.run.chmod(0o711)
