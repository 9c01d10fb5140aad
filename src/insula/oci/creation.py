"""Creation of a container from a bundle, for `create` and `run`. Its process then waits to execute the user's program.

The order is that of the runtime-spec (runtime.md). The config is read once, checked whole, and kept before anything is
made. The container's directory is made first, and the control group's path is written there before the group exists,
so that `delete --force` finds whatever a killed `create` leaves. Everything else is held by descriptors: if this
process dies, its child reads the end of file from their channel, and exits.
"""

from __future__ import annotations

import os
import time

from insula.container import config as checks
from insula.container import wire
from insula.container.create import sources, spawn
from insula.container.create.exec_process import Filter
from insula.container.create.stdio import plain_lines
from insula.container.create.steps import StepError
from insula.kernel import cgroups, scheduling, syscalls
from insula.kernel.cgroups import devices
from insula.kernel.rollback import Rollback
from insula.model.cpython import loads, signal, socket
from insula.model.errors import Conflict, Failed, Invalid, NotFound
from insula.oci import log, streams
from insula.oci.state import Container

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from insula.kernel.cgroups import Cgroup
    from insula.kernel.cgroups.systemd import Scope
    from insula.oci.options import VerbArguments
    from insula.oci.state import StateRecord

SECCOMP_CACHE = "/run/insula-oci-seccomp"
_FAIL_UNKNOWN = "run.oci.seccomp_fail_unknown_syscall"
"""An annotation of crun: it can only make the config stricter."""


class Created:
    """A container that is created and not started. `master` is the master of its terminal; -1 if it was sent away."""

    def __init__(self, container: Container, config: dict[str, Any], arguments: VerbArguments) -> None:
        self.container = container
        self.config = config
        self.arguments = arguments
        self.record: StateRecord
        self.child: spawn.SpawnedProcess
        self.pid = 0  # of the child, once there is one
        self.console: streams.Receiver | None = None
        self.master = -1
        self.notifications = -1  # the container's end of sd_notify(3), once it starts
        self.scope: Scope | None = None
        self.hooked = False  # hooks have run, so that those of poststop must
        self.started = False

    def state(self, status: str) -> dict[str, Any]:
        """The state of the runtime-spec, for hooks."""
        state = self.container.oci_state(self.record, status)
        return {**state, "pid": self.pid} if status != "stopped" else state

    def warn(self, message: str) -> None:
        log.warning(message, self.arguments)

    def debug(self, message: str) -> None:
        log.debug(message, self.arguments)

    # -- messages of the child -----------------------------------------------------------------------------------------

    def hear(self) -> wire.Message | None:
        """Receive from the child until an event that this method does not handle; None at the end of the channel.

        Raises StepError if the child reports that it failed.
        """
        while (received := wire.receive(self.child.sync)) is not None:
            message, descriptors = received
            match message["event"]:
                case "error":
                    raise StepError.from_message(message)
                case "terminal":
                    self._take_terminal(descriptors)
                case "open":
                    assert self.child.plan
                    sources.answer(self.config, self.child.plan, message["sources"], self.child.sync)
                case "map":
                    assert self.child.plan
                    sources.answer_map(self.config, self.child.plan, message["source"], descriptors[0], self.child.sync)
                case "listener":
                    self._pass_listener_on(message["fd"])
                case "notifications":
                    [self.notifications] = descriptors
                case "warning":
                    self.warn(message["message"])
                case _:
                    return message
        return None

    def _take_terminal(self, descriptors: list[int]) -> None:
        [master] = descriptors
        if self.console is None:
            plain_lines(master)
        self.master = streams.hand_over(master, self.console)

    def _pass_listener_on(self, fd: int) -> None:
        from insula.container.create import notify

        notify.pass_on(self.child.pidfd, fd, self.config["linux"]["seccomp"], self.state("created"), self.child.pid)
        wire.send(self.child.sync, {"event": "listening"})

    def prepare(self) -> None:
        """Wait until the child is ready to start; run the prestart and createRuntime hooks when it asks for them."""
        self.debug(f"nsexec container setup: process {self.child.pid} is in its namespaces")
        wire.send(self.child.sync, {"event": "mapped"})
        message = self.hear()
        if message:
            self.debug(f"child process in init(): {message['event']}")
        if message and message["event"] == "mounted":
            from insula.container.create import hooks

            self.hooked = True
            for kind in ("prestart", "createRuntime"):
                hooks.run(self.config, kind, self.state("creating"))
            wire.send(self.child.sync, {"event": "go on"})
            message = self.hear()
        if message is None:
            raise Failed(
                "the container's process died while it was prepared", "look for out-of-memory kills in the kernel log"
            )

    def kill(self) -> None:
        """Kill the process and reap it (for Rollback)."""
        try:
            signal.pidfd_send_signal(self.child.pidfd, signal.SIGKILL)
            os.waitpid(self.child.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            return

    def forget(self) -> None:
        """Remove the container's directory, unless another container has it by now (for Rollback)."""
        try:
            with self.container as container:
                if container.record() in (self.record, None):
                    container.remove()
        except NotFound:
            return

    def poststop(self) -> None:
        if self.hooked and self.config.get("hooks"):
            from insula.container.create import hooks

            hooks.run_all(self.config, "poststop", self.state("stopped"), self.warn)


def make(arguments: VerbArguments, undo: Rollback, *, detached: bool, later: bool = False) -> Created:
    """Make a container from its bundle; `undo` removes it again. Raises InsulaError, OSError or StepError.

    `detached`: the caller exits before the container's process does, so its terminal must go to --console-socket.
    `later`: the caller exits before the start, so the process waits at a socket in the container's directory.
    """
    streams.fill_standard_streams()
    bundle = os.path.abspath(arguments.bundle or ".")
    config = read_config(arguments, bundle)
    notify_at = ""
    if os.environ.get("NOTIFY_SOCKET", "").startswith(("/", "@")):  # sd_notify(3)
        from insula.oci import notifications

        notify_at = notifications.prepare(config)
    keep = streams.preserved(arguments)
    terminal = bool(config["process"].get("terminal"))
    made = Created(Container(arguments.root, arguments.id), config, arguments)
    made.console = streams.open_console(arguments, terminal, detached)
    if made.console:
        undo.callback(made.console.close)
    elif terminal and "consoleSize" not in config["process"] and (size := streams.size_of_terminal()):
        config["process"]["consoleSize"] = size
    pidfd_socket = streams.open_pidfd_socket(arguments, undo)
    pid_file = os.path.abspath(arguments.pid_file) if arguments.pid_file else None
    os.chdir(bundle)  # relative sources of mounts are relative to it
    program = seccomp_filter(config)
    if program:
        made.debug(f"seccomp filter flags: {program.flags}")
    with Rollback() as child_fds:
        root = child_fds.hold(sources.open_root(config["root"]["path"], config))
        group = announce(made, bundle, undo)
        waits_at = None
        if later:  # bound to its name later
            waits_at = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            undo.callback(waits_at.close)
        user = (config["process"].get("user") or {}).get("uid", 0)
        outside = spawn.SpawnOptions(
            root=root,
            stdio=[] if terminal else streams.standard(config),
            program=program,
            keep=keep,
            pivot=not arguments.no_pivot,
            keyring=not arguments.no_new_keyring,
            in_order=True,
            waits_at=waits_at,
            notify_at=notify_at,
            state=made.state("creating"),
        )
        if not terminal:
            streams.give_to(outside_uid(config, user))
        syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)
        scheduling.set_affinity(scheduling.ALL)  # the container's processors are its group's, not its caller's
        scope = made.scope
        # a scope lives as long as a process is in it: so it is held until the container's own is
        with scope.held(config["linux"].get("resources") or {}) if scope else Rollback():
            made.child = spawn.spawn(config, group, outside)
            made.pid = made.child.pid
            if scope:
                undo.callback(scope.stop)
            if group:
                undo.callback(group.remove)
            undo.callback(made.kill)
            with Rollback() as lent:
                if config["linux"].get("netDevices"):
                    from insula.container.create import net_devices

                    net_devices.give(config["linux"]["netDevices"], made.pid, lent, child_fds)
                made.prepare()
                lent.keep()
    if waits_at:
        made.container.at_start_socket(waits_at.bind)
        waits_at.listen(8)
    made.record["pid"], made.record["start_time"] = made.child.pid, made.child.start_time
    made.container.save(made.record)
    if pidfd_socket:
        pidfd_socket.send(made.child.pidfd, b"pidfd")
    if pid_file:
        streams.write_pid(pid_file, made.child.pid)
    return made


def announce(made: Created, bundle: str, undo: Rollback) -> Cgroup | None:
    """Make the container's directory, locked, with its config and its record; returns its control group, not yet made.

    Raises Conflict if the group has processes or is frozen.
    """
    group = _group(made)
    made.record = _record(made, bundle, group)
    made.container.make()
    undo.callback(made.poststop)
    undo.callback(made.forget)
    if group and group.exists() and group.processes():  # its limits, `kill --all` and `delete` would hit them
        raise Conflict(f"linux.cgroupsPath: container's cgroup is not empty: {group.path}", "use another")
    if group and (frozen := group.frozen_at()):
        hint = f"thaw {frozen}, or use another: a process that joins would stand still"
        raise Conflict("linux.cgroupsPath: container's cgroup unexpectedly frozen", hint)
    made.container.save_config(made.config)
    made.container.save(made.record)
    return group


def read_config(arguments: VerbArguments, bundle: str) -> dict[str, Any]:
    """The checked config of the bundle, with LISTEN_FDS if our environment has it."""
    path = arguments.config or f"{bundle}/config.json"
    try:
        with open(path, "rb") as file:
            raw = loads(file.read())
    except OSError as error:
        raise Invalid(f"{path}: {error.strerror}", "a bundle has a config.json; see --bundle") from None
    except ValueError as error:
        raise Invalid(f"{path}: it is not JSON: {error}", "see `insula-oci spec` for one to start from") from None
    config = checks.check(raw, bundle=bundle, warn=lambda message: log.warning(message, arguments))
    if map_to_themselves(config["linux"]):
        log.warning("linux.uidMappings: is missing: each ID of the user namespace is that of the host", arguments)
    bind_sysfs_of_the_host(config)
    if checks.since(config, 3):
        checks.no_more_processes(config["linux"].get("resources") or {})
    if rules := (config["linux"].get("resources") or {}).get("devices"):
        rules += devices.DEFAULT  # as runc does: engines deny all, and list only devices in addition to these
    if count := streams.listening():
        config["process"]["env"] = [*config["process"].get("env", ()), f"LISTEN_FDS={count}", "LISTEN_PID=1"]
    return config


def map_to_themselves(config: dict[str, Any]) -> bool:
    """Map every ID to itself in a new user namespace without mappings, as crun does. Return whether they were missing.

    In the spec mappings are optional, but it does not say what their absence means.
    """
    is_new = any(each["type"] == "user" and not each.get("path") for each in config.get("namespaces") or ())
    if not is_new or config.get("uidMappings"):
        return False
    for name, file in ("uidMappings", "uid_map"), ("gidMappings", "gid_map"):
        with open(f"/proc/self/{file}", encoding="ascii") as lines:
            ours = [(int(first), int(size)) for first, _, size in map(str.split, lines)]
        config[name] = [{"containerID": first, "hostID": first, "size": size} for first, size in ours]
    return True


def bind_sysfs_of_the_host(config: dict[str, Any]) -> None:
    """Turn entries of `mounts` of the type sysfs into bind mounts of /sys where the kernel refuses a new sysfs.

    A sysfs shows a network namespace, and only the owner of that namespace may mount it (user_namespaces(7)). A
    container with a user namespace on the host's network is not its owner. /sys shows the same. Mounts below /sys are
    left out.
    """
    kinds = {each["type"] for each in config["linux"].get("namespaces") or ()}
    if "user" not in kinds or "network" in kinds:
        return
    for entry in config.get("mounts") or ():
        if entry.get("type") == "sysfs":  # it keeps its type, by which no link is followed to its destination
            entry["source"] = "/sys"
            entry["options"] = ["bind", *(entry.get("options") or ())]


def seccomp_filter(config: dict[str, Any]) -> Filter | None:
    """The compiled filter of `linux.seccomp`, from the cache if it is there."""
    profile = config["linux"].get("seccomp")
    if not profile:
        return None
    from insula.kernel.seccomp import cache as seccomp_cache

    if (config.get("annotations") or {}).get(_FAIL_UNKNOWN, "0") != "0":
        from insula.kernel.seccomp import compiler

        compiler.parse(profile)  # so that all names are text
        compiler.refuse_unknown(profile)
    return Filter(*seccomp_cache.program(profile, SECCOMP_CACHE))


def _group(made: Created) -> Cgroup | None:
    path = made.config["linux"].get("cgroupsPath")
    if made.arguments.cgroup_manager == "disabled":
        return None
    if made.arguments.systemd_cgroup:
        from insula.kernel.cgroups.systemd import Scope

        made.scope = Scope.parse(path, made.container.id)
        return cgroups.Cgroup(made.scope.path)
    try:
        return cgroups.Cgroup(cgroups.locate(path, made.container.id))
    except ValueError as error:
        raise Invalid(str(error), "as in /my/group") from None


def _record(made: Created, bundle: str, group: Cgroup | None) -> StateRecord:
    return {
        "id": made.container.id,
        "bundle": bundle,
        "rootfs": os.path.abspath(made.config["root"]["path"]),
        "pid": 0,
        "start_time": 0,
        "created": time.time(),
        "owner": os.geteuid(),
        "cgroup": group.path if group else None,
        "scope": made.scope.unit if made.scope else None,
        "annotations": made.config.get("annotations") or {},
    }


def outside_uid(config: dict[str, Any], uid: int) -> int:
    """The user of the host that `uid` of the container is mapped to; `uid` itself where no mapping covers it."""
    for entry in config["linux"].get("uidMappings") or ():
        if entry["containerID"] <= uid < entry["containerID"] + entry["size"]:
            return int(entry["hostID"] + uid - entry["containerID"])
    return uid


def start(made: Created) -> None:
    """Have the waiting child execute the program, and run the poststart hooks. Raises StepError if either fails."""
    wire.send(made.child.sync, {"event": "start"})
    while made.hear() is not None:
        continue
    made.debug("init: closing the pipe to signal completion: the process has become the program")
    made.hooked = made.started = True
    if made.config.get("hooks"):
        run_poststart(made)


def await_ready(made: Created) -> None:
    """Wait until a container says that it is ready, if a supervisor wants to know (`insula.oci.notifications`)."""
    if made.notifications < 0:
        return
    if os.environ.get("NOTIFY_SOCKET"):
        from insula.oci import notifications

        made.container.unlock()
        notifications.forward(made.notifications, made.child.pidfd, made.pid, made.warn)
    else:
        os.close(made.notifications)


def run_poststart(made: Created) -> None:
    """Run the poststart hooks. If one fails the container is killed (runtime-spec 1.3), and StepError raised."""
    from insula.container.create import hooks

    try:
        hooks.run(made.config, "poststart", made.state("running"))
    except StepError:
        made.kill()
        raise
