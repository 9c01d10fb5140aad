"""The message that tells a warm container which container it becomes, with the descriptors that it needs.

A child that is made for a container inherits what its parent opened, by fork(2). A warm container
(`insula.container.service.warm_pool`) gets the same over its socket (SCM_RIGHTS, unix(7)). Its config comes as an open
file, since a message has a limit.
"""

from __future__ import annotations

import os

from insula.container import wire
from insula.container.create.exec_process import Filter
from insula.container.create.sources import Sources
from insula.model.plainjson import loads

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket
    from typing import Any

MAX_DESCRIPTORS = wire.MAX_DESCRIPTORS


class Handover:
    """`config` is an open file with a `Launch`; `program` an open file with a compiled filter (-1: there is none) and
    its flags; `root`, `sources` and `stdio` as of `insula.container.create.init.Inheritance`."""

    def __init__(
        self, *, config: int, program: int, flags: int, root: int, sources: Sources, stdio: list[int]
    ) -> None:
        self.config, self.program, self.flags, self.root = config, program, flags, root
        self.sources, self.stdio = sources, stdio

    def send(self, sync: _socket.socket) -> None:
        """To the child. ValueError if that are more descriptors than a message takes."""
        descriptors = [self.config, self.root, *self.sources.descriptors(), *(fd for fd in self.stdio if fd >= 0)]
        if self.program >= 0:
            descriptors.append(self.program)
        if len(descriptors) > MAX_DESCRIPTORS:
            raise ValueError(f"{len(descriptors)} descriptors")
        message = {
            "event": "launch",
            "mounts": list(self.sources.mounts),
            "devices": list(self.sources.devices),
            "stdio": [fd >= 0 for fd in self.stdio],
            "program": self.program >= 0,
            "flags": self.flags,
        }
        wire.send(sync, message, descriptors)

    @classmethod
    def receive(cls, sync: _socket.socket) -> Handover | None:
        """In the child: what it shall be; None if the parent is gone."""
        received = wire.receive(sync)
        if received is None:
            return None
        message, descriptors = received
        given = iter(descriptors)
        sources = Sources()
        config, root = next(given), next(given)
        sources.mounts = {index: next(given) for index in message["mounts"]}
        sources.devices = {path: next(given) for path in message["devices"]}
        stdio = [next(given) if there else -1 for there in message["stdio"]]
        program = next(given) if message["program"] else -1
        return cls(config=config, program=program, flags=message["flags"], root=root, sources=sources, stdio=stdio)

    def read_config(self) -> dict[str, Any]:
        """The config.json in the file of the launch."""
        config: dict[str, Any] = loads(_read(self.config))["config"]
        return config

    def read_program(self) -> Filter | None:
        return Filter(_read(self.program), self.flags) if self.program >= 0 else None


def _read(fd: int) -> bytes:
    data = os.pread(fd, os.fstat(fd).st_size, 0)
    os.close(fd)
    return data
