"""Named steps of a child, errors that name the step, and what each child does first with what fork(2) copied.

The modules in C beneath `socket` and `signal` are used directly: those two cost 13 ms to import.
"""

from __future__ import annotations

import os
import sys

from insula.container import wire
from insula.kernel import syscalls
from insula.model.cpython import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from insula.model.cpython import socket

INTERRUPTED = 254
"""The exit status of a child that lost its parent before it was told to start."""


class Step:
    """A step of making a process: its name in messages and records, and a text that completes "cannot ...".

    "{}" in the text stands for the object of the step, such as a path. An enum.Enum would do, but takes 9 ms to import.
    """

    __slots__ = ("name", "text")

    def __init__(self, text: str) -> None:
        self.text = text

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name.lower()


class Steps:
    """All steps."""

    PREPARE = Step("prepare")
    MAKE_ROOT = Step("make the root file system")
    HOLD_DESCRIPTORS = Step("hold more descriptors")
    READ_REQUEST = Step("read the request")
    START = Step("start")
    MAKE_NAMESPACES = Step("make the namespaces")
    MAKE_TIME_NAMESPACE = Step("make the time namespace")
    MAKE_CGROUP_NAMESPACE = Step("make the cgroup namespace")
    JOIN_NAMESPACE = Step("join the {} namespace")
    JOIN_NAMESPACES = Step("join the namespaces")
    JOIN_CGROUP = Step("join the cgroup")
    JOIN_CONTAINER = Step("join the container")
    HIDE = Step("hide from the container")
    START_PROCESS = Step("start another process")
    SET_OOM_SCORE = Step("set oom_score_adj")
    LEAVE_KEYRING = Step("leave the host's keyring")
    BECOME_ROOT = Step("become root inside")
    START_SESSION = Step("start a session")
    BRING_UP_LOOPBACK = Step("bring up loopback")
    PART_FROM_MOUNTS = Step("detach from the host's mounts")
    LEAVE_HOST = Step("leave the host's files")
    MOVE_NET_DEVICE = Step("move the network device {}")
    ATTACH_ROOT = Step("attach the root")
    MOUNT = Step("mount {}")
    MAKE_DEVICES = Step("make the devices")
    MAKE_DEVICE_LINKS = Step("make the links of /dev")
    PROTECT_PATHS = Step("protect paths")
    SEAL_MOUNTS = Step("make the mounts read-only")
    SEAL_ROOT = Step("make the root read-only")
    SET_PROPAGATION = Step("set the root's propagation")
    ENTER_ROOT = Step("enter the root")
    RUN_HOOK = Step("{}")
    SET_HOSTNAME = Step("set the host name")
    SET_DOMAINNAME = Step("set the domain name")
    SET_SYSCTL = Step("set the sysctl {}")
    MAKE_NOTIFY_SOCKET = Step("make the socket of NOTIFY_SOCKET")
    MAKE_DIRECTORY = Step("make the working directory")
    ENTER_DIRECTORY = Step("enter the working directory")
    OPEN_TERMINAL = Step("open the terminal")
    SET_UP_TERMINAL = Step("set up the terminal")
    CONNECT_STREAMS = Step("connect standard input and output")
    SET_RLIMIT = Step("set {}")
    SET_MEMORY_POLICY = Step("set the memory policy")
    SET_SCHEDULER = Step("set the scheduler")
    SET_IO_PRIORITY = Step("set the I/O priority")
    SET_AFFINITY = Step("set the CPU affinity")
    SET_PERSONALITY = Step("set the personality")
    SET_APPARMOR = Step("set the AppArmor profile {}")
    SET_SELINUX = Step("set the SELinux label {}")
    SET_NO_NEW_PRIVS = Step("set no_new_privs")
    DROP_CAPABILITIES = Step("drop capabilities")
    CHANGE_USER = Step("change the user")
    LOAD_FILTER = Step("load the seccomp filter")
    EXECUTE = Step("execute")


_BY_NAME = {each.name: each for each in vars(Steps).values() if isinstance(each, Step)}


def find_step(message: wire.Message) -> Step | None:
    """The step of an error's message; None for one that this build doesn't know, and for messages of 0.1.0."""
    return _BY_NAME.get(message["step"]) if "object" in message else None


def text_of(message: wire.Message) -> str:
    """The text of the step of an error's message; 0.1.0 has the text where later builds have the name."""
    found = find_step(message)
    return found.text.format(message["object"]) if found else str(message["step"])


class StepError(Exception):
    """A failed step. `message` is sent and stored: step, object, errno, error, path."""

    def __init__(self, step: Step, error: OSError, about: str = "") -> None:
        self.message: wire.Message = {
            "step": step.name,
            "object": about,
            "errno": error.errno or 0,
            "error": error.strerror or str(error),
            "path": error.filename,
        }
        super().__init__(self.message)

    @classmethod
    def from_message(cls, message: wire.Message) -> StepError:
        """The error that a child has sent."""
        error = OSError(message["errno"], message["error"], message["path"])
        return cls(find_step(message) or Steps.PREPARE, error, message.get("object", ""))

    @property
    def step(self) -> Step:
        """The step that failed."""
        return _BY_NAME[self.message["step"]]

    @property
    def text(self) -> str:
        """The text of the step, with its object."""
        return text_of(self.message)

    def __str__(self) -> str:
        path = f"{self.message['path']}: " if self.message["path"] else ""
        return f"{self.text}: {path}{self.message['error']}"


def send_error(sync: socket.socket, error: StepError) -> None:
    """Send the parent an error."""
    send(sync, {"event": "error", **error.message})


def send(sync: socket.socket, message: wire.Message, descriptors: list[int] | None = None) -> None:
    """Send the parent a message; exit if the parent is gone."""
    try:
        wire.send(sync, message, descriptors)
    except OSError:
        os._exit(INTERRUPTED)


def recv(sync: socket.socket) -> wire.Message:
    """Receive the parent's next message; exit if the parent is gone."""
    received = wire.receive(sync)
    if received is None:
        os._exit(INTERRUPTED)
    return received[0]


def forbid_imports() -> None:
    """Make imports of modules that aren't loaded fail: inside they would be looked for among the container's files.

    A file of the image in the place of one of our modules would otherwise run with all rights that are left.
    """
    sys.meta_path.clear()


def close_others(keep: list[int]) -> None:
    """Close all descriptors but `keep`: those that the parent holds for other containers, and its end of our
    channel."""
    first = 3  # the standard streams are replaced later
    for fd in sorted({fd for fd in keep if fd > 2}):
        if fd > first:
            syscalls.close_range(first, fd - 1)
        first = fd + 1
    syscalls.close_range(first, 0x7FFFFFFF)


def step(which: Step, action: Callable[..., object], *arguments: Any, about: str = "") -> None:
    """Call `action` with `arguments`; StepError if that fails. `about` is the object of the step."""
    try:
        action(*arguments)
    except OSError as error:
        raise StepError(which, error, about) from None


def reset_signals() -> None:
    """Set the default action for each signal, and block none, as a program expects it."""
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if signal.getsignal(number) != signal.SIG_DFL:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
