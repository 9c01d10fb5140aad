"""Files of a container in its instance's directory, beside the log and the record of its last start.

upper, work    the writable layer of the root file system (overlayfs); upper belongs to the tenant's user 0
etc            hostname, hosts and resolv.conf, bind-mounted over the image's

With a pool, upper and work of new instances are in it, in a directory of the same name.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

from insula.control.instances.drivers.directory import Directory, remove_tree
from insula.kernel import records, trees


class ContainerDirectory(Directory):
    def __init__(self, root: Path, instance_id: str, pool: Path | None = None) -> None:
        """`pool` is the directory of the pool, if there is one."""
        super().__init__(root, instance_id)
        self.pooled = pool is not None and not os.path.lexists(self.path / "upper")
        self.layer = pool / instance_id if pool and self.pooled else self.path
        self.upper, self.work = self.layer / "upper", self.layer / "work"
        self.etc = self.path / "etc"

    def make(self, id_base: int) -> None:
        """Make the files and directories that are missing. OSError."""
        try:
            os.mkdir(self.path, 0o700)
        except FileExistsError:
            self._clear()
        for path, mode in (
            (self.path, 0o700),
            (self.layer, 0o700),
            (self.work, 0o700),
            (self.log, 0o700),
            (self.etc, 0o700),
            (self.upper, 0o755),
        ):
            with contextlib.suppress(FileExistsError):
                os.mkdir(path, mode)
        os.chmod(self.etc, 0o755)
        os.chown(self.upper, id_base, id_base)

    def _clear(self) -> None:
        """Remove what is in the way of `make`."""
        if (self.work / "work" / "incompat" / "volatile").exists():
            # after a crash overlayfs refuses to mount a volatile upper layer again, since it may be incomplete
            trees.remove(self.upper)
            trees.remove(self.work)
        for path in (self.path, self.layer, self.upper, self.work, self.log, self.etc):
            if path.is_symlink() or (path.exists() and not path.is_dir()):  # not a directory
                trees.remove(path)

    async def remove(self) -> None:
        if self.pooled:
            await remove_tree(self.layer)
        await super().remove()

    def is_fresh(self) -> bool:
        """Whether the instance has written nothing into its root file system yet."""
        try:
            with os.scandir(self.upper) as entries:  # only the first is read; there may be millions
                return next(entries, None) is None
        except (FileNotFoundError, NotADirectoryError):
            return True

    def write_etc(self, files: Mapping[str, str], id_base: int) -> None:
        """Write files in etc/. They are written in place, since they may be mounted, and belong to the instance's root,
        which may edit them as in any container."""
        for name, content in files.items():
            records.overwrite(self.etc / name, content.encode(), 0o644, id_base)
