"""``exec ID COMMAND``: run one more process in a running container. Ends as the process did, unless with --detach.

User, capabilities, environment and directory are those of the container's first process where no option changes them.
With --process they are all read from a file (`process` of the runtime-spec).
"""

from __future__ import annotations

import os

from insula.container import config as checks
from insula.container import wire
from insula.container.create import join, namespaces
from insula.container.create.steps import StepError
from insula.kernel import process, scheduling, syscalls
from insula.kernel.cgroups import Cgroup
from insula.kernel.rollback import Rollback
from insula.model.cpython import loads, signal
from insula.model.errors import Conflict, Failed, Invalid
from insula.oci import foreground, log, streams
from insula.oci.creation import outside_uid, seccomp_filter
from insula.oci.failure import explain
from insula.oci.state import Container

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from insula.oci.options import VerbArguments
    from insula.oci.state import StateRecord


def run(arguments: VerbArguments) -> int:
    streams.fill_standard_streams()
    container = Container(arguments.root, arguments.id)
    record, config = container.load(), container.config()
    status = container.status(record)
    if status not in ("running", "created", "paused"):
        raise Conflict(
            f"cannot exec in a {status} container: container not running", "only a running container can be joined"
        )
    if status == "paused" and not arguments.ignore_paused:
        raise Conflict("cannot exec in a paused container", "resume it, or use --ignore-paused to wait")
    what = checks.check_process(asked(arguments, config), config, warn=lambda message: log.warning(message, arguments))
    with Rollback() as undo:
        joined = Joined(container, record, config, what, arguments)
        if not arguments.detach:
            foreground.hold_signals()
        try:
            joined.begin(undo)
        except StepError as error:
            raise explain(error) from None
        if arguments.pid_file:
            streams.write_pid(arguments.pid_file, joined.pid)
        if arguments.detach:
            return 0
        return foreground.wait(joined.pid, joined.master)


# -- the request -------------------------------------------------------------------------------------------------------


def asked(arguments: VerbArguments, config: dict[str, Any]) -> Any:
    """`process` of the runtime-spec: of --process, or the container's own with the changes of the options."""
    if arguments.process:
        return _from_file(arguments.process)
    if not arguments.command:
        raise Invalid("there is no command to run", "give one after the ID, or use --process")
    own = config["process"]
    what = {name: own[name] for name in own if name not in ("args", "terminal", "consoleSize", "rlimits")}
    what["rlimits"] = own.get("rlimits") or []
    what["args"] = arguments.command
    what["terminal"] = arguments.tty
    what["env"] = [*(own.get("env") or ()), *arguments.env]
    what["user"] = _user(arguments, own.get("user") or {})
    if arguments.cwd:
        what["cwd"] = arguments.cwd
    if arguments.no_new_privs:
        what["noNewPrivileges"] = True
    if arguments.apparmor:
        what["apparmorProfile"] = arguments.apparmor
    if arguments.process_label:
        what["selinuxLabel"] = arguments.process_label
    if arguments.cap:
        from insula.kernel.capabilities import normalise

        more = [normalise(name) for name in arguments.cap]
        sets = own.get("capabilities") or {}
        what["capabilities"] = dict(sets)
        for name in ("bounding", "effective", "permitted"):  # inheritable ones would outlive setuid (CVE-2022-29162)
            what["capabilities"][name] = list(dict.fromkeys([*(sets.get(name) or ()), *more]))
        inherited = [name for name in more if name in (sets.get("inheritable") or ())]  # by the config already
        what["capabilities"]["ambient"] = list(dict.fromkeys([*(sets.get("ambient") or ()), *inherited]))
    return what


def _from_file(path: str) -> Any:
    try:
        with open(path, "rb") as file:
            return loads(file.read())
    except OSError as error:
        raise Invalid(f"--process {path}: {error.strerror}", "it is a file with `process` of a config") from None
    except ValueError as error:
        raise Invalid(f"--process {path}: it is not JSON: {error}", "it is `process` of a config") from None


def _user(arguments: VerbArguments, own: dict[str, Any]) -> dict[str, Any]:
    """UID[:GID] and more groups."""
    user = dict(own)
    if arguments.user:
        uid, colon, gid = arguments.user.partition(":")
        numbers = [uid, gid] if colon else [uid]
        if not all(number.isdecimal() and len(number) < 11 for number in numbers):
            raise Invalid(f"--user {arguments.user[:60]!r}: these are no IDs", "as in 1000 or 1000:1000")
        user["uid"] = int(uid)
        user["gid"] = int(gid) if colon else own.get("gid", 0)
    if arguments.additional_gids:
        if not all(gid.isdecimal() and len(gid) < 11 for gid in arguments.additional_gids):
            raise Invalid("--additional-gids: these are no IDs", "as in 100")
        user["additionalGids"] = [*own.get("additionalGids", ()), *map(int, arguments.additional_gids)]
    return user


def _below(text: str) -> dict[str, str]:
    """``[CONTROLLER,…:]PATH``: the path of a control group by the controllers of version 1; ``""`` is all others."""
    controllers, _, path = text.rpartition(":")
    if ".." in path.split("/"):
        complaint = "bad sub cgroup path: `..` components are not allowed"
        raise Invalid(f"--cgroup {path[:60]!r}: {complaint}", "as in /worker")
    return dict.fromkeys(controllers.split(","), path.strip("/"))


# -- joining -----------------------------------------------------------------------------------------------------------


class Joined:
    """A process that joins a container. `master` is the master of its terminal; -1 if it was sent away."""

    def __init__(
        self,
        container: Container,
        record: StateRecord,
        config: dict[str, Any],
        what: dict[str, Any],
        arguments: VerbArguments,
    ) -> None:
        self.container, self.record, self.config, self.what = container, record, config, what
        self.arguments = arguments
        self.pid = 0
        self.master = -1
        self.console: streams.Receiver | None = None

    def begin(self, undo: Rollback) -> None:
        """Start the process; returns when it executes the program. Raises StepError if it can't."""
        terminal = bool(self.what.get("terminal"))
        self.console = streams.open_console(self.arguments, terminal, bool(self.arguments.detach))
        if self.console:
            undo.callback(self.console.close)
        elif terminal and "consoleSize" not in self.what and (size := streams.size_of_terminal()):
            self.what["consoleSize"] = size
        keep = streams.preserved(self.arguments)
        pidfd_socket = streams.open_pidfd_socket(self.arguments, undo)
        program = seccomp_filter(self.config)
        if (self.config["linux"].get("seccomp") or {}).get("listenerPath"):
            from insula.container.create import notify  # noqa: F401  # the child can't import it any more
        if not terminal:
            streams.give_to(outside_uid(self.config, (self.what.get("user") or {}).get("uid", 0)))
        syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)
        scheduling.set_affinity(scheduling.ALL)
        sync, theirs = wire.pair()
        undo.callback(sync.close)
        pid = self.record["pid"]
        with Rollback() as child_fds:
            child_fds.callback(theirs.close)
            target = child_fds.hold(process.open_to_join(pid, self.record["start_time"]))
            group = Cgroup(self.record["cgroup"]) if self.record["cgroup"] else None
            given = join.ExecArgs(
                self.what,
                target,
                theirs,
                [child_fds.hold(fd) for fd in self._open(group)] if group else [],
                [] if terminal else [0, 1, 2],
                program,
                flags=namespaces.differing(pid),
                root=child_fds.hold(
                    os.open(f"{process.directory(pid)}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
                ),
                keep=keep,
                personality=self.config["linux"].get("personality"),
                memory_policy=self.config["linux"].get("memoryPolicy"),
                plain=self.console is None,
            )
            beside = group.open_beside() if group else None
            first, pidfd = syscalls.clone3(0, cgroup=None if beside is None else child_fds.hold(beside))
            if first == 0:
                join.main(given)
        os.close(pidfd)
        try:
            self._hear(sync)
            if pidfd_socket:
                pidfd_socket.send(undo.hold(os.pidfd_open(self.pid)), b"pidfd")
        except BaseException:
            if self.pid:  # both are our children, and as long as one is a zombie its PID namespace can't end
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
            raise
        finally:
            os.waitpid(first, 0)

    def _open(self, group: Cgroup) -> list[int]:
        """Descriptors by which the process joins its control groups; --cgroup names groups below the container's."""
        below = {name: path for text in self.arguments.cgroup for name, path in _below(text).items()}
        try:
            return group.open(below)
        except FileNotFoundError as error:
            if not below:
                raise
            what = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
            raise Invalid(f"--cgroup: error adding pid to cgroups: {what}", "name one that is there") from None

    def _hear(self, sync: Any) -> None:
        while (received := wire.receive(sync)) is not None:
            message, descriptors = received
            match message["event"]:
                case "error":
                    raise StepError.from_message(message)
                case "forked":
                    self.pid = message["pid"]
                    self._tell_steps()
                case "terminal":
                    self._take_terminal(descriptors[0])
                case "listener":
                    self._pass_listener_on(sync, message["fd"])
                case "warning":
                    log.warning(message["message"], self.arguments)
        log.debug("setns_init: about to exec: the process has become the program", self.arguments)
        if not self.pid:
            raise Failed("the process died before it was in the container", "see `insula-oci state`")

    def _tell_steps(self) -> None:
        """With --debug, what a process has done when it was forked into the container."""
        if not self.arguments.debug:
            return
        log.debug(f"nsexec container setup: process {self.pid} has joined the namespaces", self.arguments)
        if initial := (self.what.get("execCPUAffinity") or {}).get("initial"):
            mask = sum(1 << number for number in scheduling.parse_list(initial))
            log.debug(f"nsexec[{self.pid}]: affinity: {mask:#x}", self.arguments)
        log.debug("child process in init()", self.arguments)

    def _take_terminal(self, master: int) -> None:
        self.master = streams.hand_over(master, self.console)

    def _pass_listener_on(self, sync: Any, fd: int) -> None:
        from insula.container.create import notify

        pidfd = os.pidfd_open(self.pid)
        try:
            state = self.container.oci_state(self.record, "running")
            notify.pass_on(pidfd, fd, self.config["linux"]["seccomp"], state, self.pid)
        finally:
            os.close(pidfd)
        wire.send(sync, {"event": "listening"})
