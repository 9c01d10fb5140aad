"""`ProjectQuota`: project quotas of ext4 (with the features `project` and `quota`) and xfs, mounted with `prjquota`.

The limits hold for whoever writes, through an overlay too: overlayfs writes as its mounter, and without
CAP_SYS_RESOURCE. Upper and work directory of an overlay must be of one project before it is mounted, since files are
renamed from the one to the other. The directory above them must have no ID to inherit: that would override theirs.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from secrets import randbelow
from typing import Final

from insula.kernel import quota
from insula.volume.quota import DiskLimit, DiskUsage

FIRST_PROJECT: Final = 1 << 30
PROJECTS: Final = 1 << 30
"""IDs from FIRST_PROJECT on are for trees. Other programs take low ones: Kubernetes those from 1,048,577 on."""
_TRIALS: Final = 256  # few, because xfs keeps the record of each ID that was ever used
_FIRST_TRIAL: Final = FIRST_PROJECT - _TRIALS
_TRIAL: Final = 1 << 20  # bytes
_CHUNK: Final = 1 << 16
_ABSENT: Final = (errno.ESRCH, errno.ENOSYS, errno.ENOTTY, errno.EOPNOTSUPP, errno.EINVAL)


class ProjectQuota:
    """The driver for trees below `directory`; the methods are described in `DiskQuota`."""

    name = "project quotas"
    enforced = True
    trouble: str | None = None

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    @classmethod
    def open(cls, directory: Path) -> ProjectQuota | str:
        """A driver that has proven to enforce limits, else why it can't."""
        try:
            driver = cls(directory)
        except OSError as error:
            return str(error)
        if reason := driver.refutation():
            driver.close()
            return reason
        return driver

    def assign(self, project: int, paths: Sequence[Path]) -> None:
        for path in paths:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                if quota.get_project(fd) != (project, True):
                    quota.set_project(fd, project, inherit=True)
            finally:
                os.close(fd)

    def limit(self, project: int, limit: DiskLimit) -> None:
        quota.set_limits(self._fd, project, limit.space, limit.inodes)

    def usage(self, project: int) -> DiskUsage | None:
        found = quota.get_usage(self._fd, project)
        return DiskUsage(found.space, found.inodes)

    def release(self, project: int) -> None:
        quota.set_limits(self._fd, project, None, None)

    def refutation(self) -> str | None:
        """Limit a nameless file to 1 MiB, and write twice that as a process without CAP_SYS_RESOURCE would."""
        project = _FIRST_TRIAL + randbelow(_TRIALS)
        try:
            quota.set_limits(self._fd, project, _TRIAL, 8)
            try:
                return self._write_past_limit(project)
            finally:
                quota.set_limits(self._fd, project, None, None)
        except OSError as error:
            return "the file system has no project quotas" if error.errno in _ABSENT else error.strerror or str(error)

    def _write_past_limit(self, project: int) -> str | None:
        file = os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=self._fd)
        try:
            quota.set_project(file, project, inherit=False)
            with quota.without_privilege():
                written = os.write(file, bytes(_TRIAL // 2))  # what fits has to be accepted
                try:
                    while written <= _TRIAL:
                        written += os.write(file, bytes(_CHUNK))
                except OSError as error:
                    if error.errno in quota.REFUSALS:
                        return None
                    raise
            return f"a file grew to {written} bytes under a limit of {_TRIAL}"
        finally:
            os.close(file)

    def close(self) -> None:
        os.close(self._fd)
