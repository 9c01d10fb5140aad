"""`FileInUse`: a file of an instance is locked for the machine of another one, of whatever tenant."""

from __future__ import annotations

from insula.model.errors import Conflict


class FileInUse(Conflict):
    """The error, which says nothing of the other instance: only whoever knows the instances can tell whether that is of
    the same tenant (`insula.control.instances.holders`). `file` is what is in use, `holder` the ID of the other."""

    def __init__(self, file: str, holder: str) -> None:
        super().__init__(
            f"{file} is in use by another machine", "ask the operator of this host: insulad's log names the other"
        )
        self.file, self.holder = file, holder
