"""Hints for users, by the step of a container's start that failed."""

from __future__ import annotations

import errno

from insula.container.create.steps import Step, Steps

_IN_THE_WAY = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EEXIST, errno.ENAMETOOLONG})
_BY_STEP = {
    Steps.SET_SYSCTL: "look at the name and the value: the kernel has no such parameter, or does not allow this value",
    Steps.CHANGE_USER: "use another --user: IDs are 0 to 65535",
    Steps.OPEN_TERMINAL: "leave out --tty, or end processes that have a terminal there",
    Steps.ENTER_DIRECTORY: "name a directory of the image, or leave it out",
    Steps.SET_RLIMIT: "ask for less, or raise the hard limits of insulad (see `insula doctor`)",
    Steps.MAKE_ROOT: "remove instances or images, or free some space below INSULA_ROOT",
    Steps.HOLD_DESCRIPTORS: "remove instances, or start insulad with a higher LimitNOFILE",
}


def hint(step: Step | None, number: int) -> str:
    """The hint for a step that failed with the errno `number`.

    It names `insula doctor`, which examines the host, only if neither the image nor a limit explains the failure.
    """
    if number in (errno.ENOSPC, errno.EDQUOT) and step is not Steps.OPEN_TERMINAL:
        return "free some space on the disk that holds Insula's state"
    if number == errno.ENOMEM:
        return "allow it more memory (--memory, or `insula tenant update`), or free some on the host"
    if number == errno.EAGAIN:
        return "end some of its processes, or allow more (`insula update --pids`)"
    if step is Steps.MOUNT and number in _IN_THE_WAY:
        return "look at what the image has at that path, or use another path"
    return _BY_STEP.get(step, "run `insula doctor` to see what this host lacks") if step else "run `insula doctor`"
