"""What a container has in its instance's directory, beside the log and the record of its last start.

upper, work    the writable layer of the root (overlayfs); upper belongs to the tenant's user 0
etc            hostname, hosts and resolv.conf, bind-mounted over the image's
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from insula.control.instances.drivers.directory import Directory
from insula.kernel import records, trees


class ContainerDirectory(Directory):
    def __init__(self, root: Path, instance_id: str) -> None:
        super().__init__(root, instance_id)
        self.upper, self.work = self.path / "upper", self.path / "work"
        self.etc = self.path / "etc"

    def make(self, id_base: int) -> None:
        """Make what is missing. OSError."""
        if (self.work / "work" / "incompat" / "volatile").exists():
            # overlayfs refuses to mount a volatile upper layer again after a crash, for it may be incomplete
            trees.remove(self.upper)
            trees.remove(self.work)
        for path in (self.path, self.upper, self.work, self.log, self.etc):
            if path.is_symlink() or (path.exists() and not path.is_dir()):  # something else of that name
                trees.remove(path)
        for path in (self.path, self.work, self.log, self.etc):
            path.mkdir(mode=0o700, exist_ok=True)
        self.etc.chmod(0o755)
        if not self.upper.exists():
            self.upper.mkdir(mode=0o755)
        os.chown(self.upper, id_base, id_base)

    def is_fresh(self) -> bool:
        """Whether nothing in it is the instance's own yet."""
        try:
            with os.scandir(self.upper) as entries:  # the first is enough: there may be millions
                return next(entries, None) is None
        except (FileNotFoundError, NotADirectoryError):
            return True

    def write_etc(self, files: Mapping[str, str], id_base: int) -> None:
        """In place, for they may be mounted; owned by the instance's root, who may edit them as in any container."""
        for name, content in files.items():
            records.overwrite(self.etc / name, content.encode(), 0o644, id_base)
