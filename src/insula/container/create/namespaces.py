"""The namespaces of a container, and the clone of its first process into them (namespaces(7)).

clone3(2) makes a new namespace for each flag that it is given. An existing one is joined with setns(2), through a file
such as /proc/PID/ns/net. If all namespaces are new, one clone3 is enough:

    parent ── clone3(CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNS | …) ──► child

If some are joined, setns must come before the clone. The parent can't call it, because it has to stay in its own
namespaces. So it forks an intermediate process, which joins them and clones the child with CLONE_PARENT. The child is
then a child of the parent, which can wait for it, and the intermediate process exits.

    parent ── fork ──► between: setns(2) … unshare(CLONE_NEWTIME) ── clone3(… | CLONE_PARENT) ──► child, of parent

Three types of namespace are special:

- *user* is joined last. Joining it gives all capabilities in the namespaces that it owns, and takes away all others.
  So the others are joined before it, and those that were refused are tried again after it. A new one is made by the
  same clone3 as the rest, and owns them. The parent maps its IDs (`process.map_ids`), with its rights over the host's.
- *time* shifts two clocks (time_namespaces(7)). The offsets can be set only while it has no process. unshare(2) makes
  one that only later children enter, so they are set before the child is cloned.
- *cgroup* shows the control group that a process is in as the root (cgroup_namespaces(7)). So the child makes it
  itself, after it has joined its group.
"""

from __future__ import annotations

import errno
import os

from insula.container import wire
from insula.container.create.steps import StepError, Steps
from insula.kernel import process, syscalls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from insula.kernel.process import IdMap
    from insula.kernel.rollback import Rollback

FLAGS = {
    "user": syscalls.CLONE_NEWUSER,
    "pid": syscalls.CLONE_NEWPID,
    "mount": syscalls.CLONE_NEWNS,
    "network": syscalls.CLONE_NEWNET,
    "ipc": syscalls.CLONE_NEWIPC,
    "uts": syscalls.CLONE_NEWUTS,
    "cgroup": syscalls.CLONE_NEWCGROUP,
    "time": syscalls.CLONE_NEWTIME,
}
"""The types of the OCI runtime-spec, `linux.namespaces[].type`, and their flags."""

FILES = {"mount": "mnt", "network": "net"}
"""Names in /proc/PID/ns, where they differ from those of the runtime-spec."""


class Plan:
    """The namespaces of one container: which are made and which are joined.

    `make`: flags of what clone3 makes. `join`: descriptors with their flags. `cgroup`: whether the child makes a cgroup
    namespace. `offsets`: contents for timens_offsets, None without a new time namespace. `uids` and `gids` map the
    container's IDs, in a new user namespace or in the one that is joined; they are empty without either.
    """

    def __init__(self) -> None:
        self.make = 0
        self.join: list[tuple[int, int]] = []
        self.cgroup = False
        self.offsets: str | None = None
        self.uids: IdMap = []
        self.gids: IdMap = []

    def makes(self, flag: int) -> bool:
        """Whether clone3 makes this one."""
        return bool(self.make & flag)

    def has_user(self) -> bool:
        """Whether the container is in another user namespace than its parent."""
        return self.makes(syscalls.CLONE_NEWUSER) or any(flag == syscalls.CLONE_NEWUSER for _, flag in self.join)

    def descriptors(self) -> list[int]:
        return [fd for fd, _ in self.join]

    def outside(self, uid: int, gid: int) -> tuple[int, int]:
        """The IDs on the host of a user and a group of the container; 65534 (nobody) if they are not mapped."""
        return _outside(self.uids, uid), _outside(self.gids, gid)


def _outside(lines: IdMap, number: int) -> int:
    for inside, outside, count in lines:
        if inside <= number < inside + count:
            return outside + number - inside
    return 65534 if lines else number


def id_map(entries: Any) -> IdMap:
    """The lines of uid_map or gid_map for `linux.uidMappings` or `linux.gidMappings`."""
    return [(entry["containerID"], entry["hostID"], entry["size"]) for entry in entries or ()]


# -- the plan ----------------------------------------------------------------------------------------------------------


def plan(linux_config: dict[str, Any], undo: Rollback, share: tuple[int, int] | None = None) -> Plan:
    """The plan for `linux.namespaces` of a config. Its files are opened here, and closed by `undo`.

    `share` is another container's first process, as PID and start time: its user and PID namespaces are joined, in
    place of what the config says. OSError if it is gone, or a file is no namespace of its type.
    """
    result = Plan()
    result.uids, result.gids = (id_map(linux_config.get(name)) for name in ("uidMappings", "gidMappings"))
    for entry in linux_config.get("namespaces") or ():
        kind, path = entry["type"], entry.get("path")
        if share and kind in ("user", "pid"):
            result.join.append((undo.hold(process.open_namespace(*share, kind)), FLAGS[kind]))
        elif path:
            _join_by_path(result, kind, path, undo)
        elif kind == "cgroup":
            result.cgroup = True
        elif kind == "time":
            result.offsets = _offsets(linux_config.get("timeOffsets") or {})
        else:
            result.make |= FLAGS[kind]
    result.join.sort(key=lambda joined: joined[1] == syscalls.CLONE_NEWUSER)
    return result


def _join_by_path(result: Plan, kind: str, path: str, undo: Rollback) -> None:
    fd = undo.hold(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    name = FILES.get(kind, kind)
    own = os.stat(f"/proc/self/ns/{name}")
    found = os.fstat(fd)
    if found.st_dev != own.st_dev:
        raise OSError(errno.EINVAL, f"it is no {kind} namespace", path)
    if os.path.samestat(found, own):
        return  # it is ours already: to join it again does nothing, and is refused for the user namespace
    result.join.append((fd, FLAGS[kind]))
    if kind == "user" and not result.uids:
        result.uids, result.gids = (_maps_behind(fd, name) for name in ("uid_map", "gid_map"))


def _maps_behind(fd: int, name: str) -> IdMap:
    """The ID mappings of a user namespace, read from /proc of a child that joins it for that."""
    ours, theirs = os.pipe()
    release, hold = os.pipe()
    pid, pidfd = syscalls.clone3(0)
    if pid == 0:
        try:
            os.close(hold)
            syscalls.setns(fd, syscalls.CLONE_NEWUSER)
            os.write(theirs, b"1")
            os.read(release, 1)
        finally:
            os._exit(0)
    try:
        os.close(theirs)
        if not os.read(ours, 1):
            raise OSError(errno.EPERM, "the user namespace can't be joined")
        with open(f"/proc/{pid}/{name}", "rb") as file:
            lines = [line.split() for line in file]
        return [(int(inside), int(outside), int(count)) for inside, outside, count in lines]
    finally:
        for each in (ours, release, hold, pidfd):
            os.close(each)
        os.waitpid(pid, 0)


def _offsets(clocks: dict[str, Any]) -> str:
    """Lines for timens_offsets, as in ``monotonic 3600 0``: the seconds and nanoseconds that are added to each
    clock."""
    return "".join(f"{clock} {at.get('secs', 0)} {at.get('nanosecs', 0)}\n" for clock, at in clocks.items())


# -- the clone ---------------------------------------------------------------------------------------------------------


def clone(asked: Plan, cgroup: int | None = None) -> tuple[int, int]:
    """fork(2) into the namespaces: (pid, pidfd) in the parent, (0, -1) in the child, whose IDs are yet to be mapped.

    `cgroup` is a descriptor of the version 2 group to be born in, which is far cheaper than to move there later. The
    caller has a single thread. StepError names what the intermediate process could not do; then there is no child.
    """
    if not asked.join and asked.offsets is None:
        return syscalls.clone3(asked.make, cgroup=cgroup)
    ours, theirs = wire.pair()
    between, pidfd = syscalls.clone3(0, cgroup=cgroup)
    if between == 0:
        ours.close()
        try:
            _enter(asked)
            if any(flag == syscalls.CLONE_NEWPID for _, flag in asked.join):
                # the child inherits it: among strangers it could be stopped and looked at before it does so itself
                syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)
            pid, _ = syscalls.clone3(asked.make | syscalls.CLONE_PARENT)
            if pid == 0:
                theirs.close()
                return 0, -1
            wire.send(theirs, {"pid": pid})
        except StepError as error:
            wire.send(theirs, error.message)
        except OSError as error:
            wire.send(theirs, StepError(Steps.MAKE_NAMESPACES, error).message)
        os._exit(0)
    theirs.close()
    try:
        received = wire.receive(ours)
    finally:
        ours.close()
        os.close(pidfd)
        os.waitpid(between, 0)
    if received is None:
        raise StepError(Steps.MAKE_NAMESPACES, OSError(errno.ECHILD, "the intermediate process died"))
    message = received[0]
    if "pid" not in message:
        raise StepError.from_message(message)
    return message["pid"], os.pidfd_open(message["pid"])


def _enter(asked: Plan) -> None:
    """Join the namespaces of the plan, and make a time namespace for the children."""
    if asked.offsets is not None:
        try:
            syscalls.unshare(syscalls.CLONE_NEWTIME)
            if asked.offsets:
                with open("/proc/self/timens_offsets", "w") as file:
                    file.write(asked.offsets)
        except OSError as error:
            raise StepError(Steps.MAKE_TIME_NAMESPACE, error) from None
    join(asked.join)


def join(namespaces: list[tuple[int, int]]) -> None:
    """Call setns(2) for each, in the given order. Those that are refused are tried again after the user namespace.

    StepError names the namespace that can't be joined.
    """
    refused = []
    for fd, flag in namespaces:
        try:
            syscalls.setns(fd, flag)
        except OSError as error:
            if error.errno != errno.EPERM or flag == syscalls.CLONE_NEWUSER:
                raise _step(flag, error) from None
            refused.append((fd, flag))
    for fd, flag in refused:
        try:
            syscalls.setns(fd, flag)
        except OSError as error:
            raise _step(flag, error) from None


def _step(flag: int, error: OSError) -> StepError:
    kind = next(kind for kind, each in FLAGS.items() if each == flag)
    return StepError(Steps.JOIN_NAMESPACE, error, kind)


def differing(pid: int) -> int:
    """The flags of the namespaces in which process `pid` differs from the caller, for setns(2) with its pidfd."""
    flags, directory = 0, process.directory(pid)
    for kind, flag in FLAGS.items():
        name = FILES.get(kind, kind)
        try:
            theirs = os.stat(f"{directory}/ns/{name}")
        except FileNotFoundError:  # a kernel without this type
            if not os.path.exists(f"/proc/{pid}"):
                raise ProcessLookupError(errno.ESRCH, "the process is gone", str(pid)) from None
            continue
        if not os.path.samestat(theirs, os.stat(f"/proc/self/ns/{name}")):
            flags |= flag
    return flags
