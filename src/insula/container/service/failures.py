"""What the zygote or a child reported, as an error with one line for the user."""

from __future__ import annotations

import errno

from insula.container.wire import Message
from insula.model.errors import Failed

_IN_THE_WAY = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EEXIST, errno.ENAMETOOLONG})


class StartFailed(Failed):
    """The program could not be executed; `exit_status` is 127 if it was not found, else 126."""

    exit_status = 125


class ZygoteDied(Failed):
    """What was asked may have been done or not; what was not told to start dies with the zygote."""


def explain(error: Message) -> Failed:
    """What the zygote or the child reported, as one line for the user."""
    path = f" {error['path']}" if error.get("path") else ""
    if error["step"] != "execute":
        return Failed(f"cannot {error['step']}: {error['error']}{path}", _hint(error["step"], error["errno"]))
    missing = error["errno"] in (errno.ENOENT, errno.ENOTDIR)
    hint = "give a command that the image contains" if missing else "look at that file: its mode, and what it is"
    failure = StartFailed(f"cannot execute{path}: {error['error']}", hint)
    failure.exit_status = 127 if missing else 126
    return failure


def _hint(step: str, number: int | None) -> str:
    """What to do: `doctor` knows the host, so it is named only for what neither the image nor a limit explains."""
    if number in (errno.ENOSPC, errno.EDQUOT) and not step.startswith("open the terminal"):
        return "make room on the disk that holds Insula's state"
    if number == errno.ENOMEM:
        return "allow it more memory (--memory, or `insula tenant update`), or free some on the host"
    if number == errno.EAGAIN:
        return "end some of its processes, or allow more (`insula update --pids`)"
    if step.startswith("mount ") and number in _IN_THE_WAY:
        return "look at what the image has at that path, or use another path"
    if step.startswith("set the sysctl "):
        return "look at the name and the value: the kernel has no such parameter, or refuses this for it"
    if step == "change the user":
        return "use another --user: IDs are 0 to 65535"
    if step.startswith("open the terminal"):
        return "leave out --tty, or end processes that have a terminal there"
    if step == "enter the working directory":
        return "name a directory of the image, or leave it out"
    if step.startswith("set RLIMIT_"):
        return "ask for less, or raise the hard limits of insulad (see `insula doctor`)"
    if step == "make the root file system":
        return "remove instances or images, or make room where INSULA_ROOT is"
    if step == "hold more descriptors":
        return "remove instances, or start insulad with a higher LimitNOFILE"
    return "run `insula doctor` to see what this host lacks"
