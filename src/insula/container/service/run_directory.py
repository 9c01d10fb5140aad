"""A container's run directory: records of its request, its processes and their ends, which outlive the service.

    RUN/containers/ID/launch.json    the request (`Launch`); its `config` is an OCI config.json
    RUN/containers/ID/state.json     the process that is PID 1 inside (`ProcessState`)
    RUN/containers/ID/exit.json      how it ended (`ExitRecord`)
    RUN/containers/ID/exec-N.json, exec-N.exit.json    the same of a process that joined

Files are replaced atomically (rename(2)), so a reader after any crash finds a whole one or none. RUN is on a tmpfs:
after a reboot nothing runs, and nothing here says so.

Builds of different versions read each other's records: fields that a reader doesn't know are ignored, and those added
since 0.1.0 have defaults.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from types import NoneType
from typing import Any, NamedTuple, TypeVar

from insula.container.create.steps import INTERRUPTED, text_of
from insula.kernel import records
from insula.kernel.cgroups import Cgroup
from insula.model.cpython import dumps

VERSION = 1
"""Of the records, as their field "version"; those of 0.1.0 have none. Raised when a field changes its meaning."""
ProcessKey = tuple[str, str | None]
"""A process of a container: the container's id, and the exec id or None for PID 1."""


class Launch(NamedTuple):
    """The request for a container. Paths are absolute; `lower` is topmost first (overlayfs).

    `config` is an OCI runtime-spec config.json. IDs 0…65535 inside are `id_base`… on the host. `cgroup` is relative
    to the root of every hierarchy. `seccomp` is the file of a compiled filter, loaded with `seccomp_flags`. `log` is a
    directory. `share` is PID and start time of another container's first process, whose user and PID namespaces are
    joined; it has the same `id_base`.
    """

    id: str
    config: dict[str, Any]
    lower: list[str]
    upper: str
    work: str
    id_base: int
    cgroup: str
    volatile: bool = False
    tty: bool = False
    stdin: bool = False
    log: str | None = None
    log_size: int = 10 << 20
    log_files: int = 3
    seccomp: str | None = None
    seccomp_flags: int = 0
    share: list[int] | None = None


class ProcessState(NamedTuple):
    """A process of a container. `started` is None until the start of the user's program was requested."""

    id: str
    pid: int
    start_time: int
    started: float | None = None
    executed: bool = False


class ExitRecord(NamedTuple):
    """The end of a process: `exit_status` as a shell has it; None if it never executed the user's program."""

    exit_status: int | None
    signal: int | None
    oom: bool
    finished: float
    error: str | None = None
    failure: dict[str, Any] | None = None
    """The error for which it never executed the program, as `StepError.message`."""


RecordT = TypeVar("RecordT", Launch, ProcessState, ExitRecord)
_TYPES: dict[str, tuple[type, ...]] = {
    "id": (str,),
    "config": (dict,),
    "lower": (list,),
    "upper": (str,),
    "work": (str,),
    "id_base": (int,),
    "cgroup": (str,),
    "log": (str, NoneType),
    "pid": (int,),
    "start_time": (int,),
    "started": (int, float, NoneType),
    "exit_status": (int, NoneType),
    "signal": (int, NoneType),
    "finished": (int, float),
    "error": (str, NoneType),
    "failure": (dict, NoneType),
}


def _decode(data: object, kind: type[RecordT]) -> RecordT | None:
    """The record that `data`, from JSON, holds; None if it holds none."""
    if not isinstance(data, dict):
        return None
    known = {name: value for name, value in data.items() if name in kind._fields}
    if any(not isinstance(value, _TYPES.get(name, (object,))) for name, value in known.items()):
        return None
    try:
        return kind(**known)
    except TypeError:  # a field is missing
        return None


class RunDirectory:
    """The directory of container `id` below the run directory."""

    def __init__(self, run: str, container: str) -> None:
        self.id = container
        self.path = f"{run}/containers/{container}"

    def create(self, launch: Launch) -> None:
        os.mkdir(self.path, 0o700)
        self._write("launch.json", launch._asdict())

    def remove(self) -> None:
        """Remove the directory with all that is in it. What can't be removed stays."""
        try:
            for name in os.listdir(self.path):
                os.unlink(f"{self.path}/{name}")
            os.rmdir(self.path)
        except FileNotFoundError:
            return
        except OSError:  # a directory, which is none of ours
            from insula.kernel import trees

            with contextlib.suppress(OSError):
                trees.remove(self.path)

    def launch(self) -> Launch | None:
        return self._read("launch.json", Launch)

    def state(self, exec_id: str | None = None) -> ProcessState | None:
        return self._read(f"exec-{exec_id}.json" if exec_id else "state.json", ProcessState)

    def write_state(self, state: ProcessState, exec_id: str | None = None) -> None:
        self._write(f"exec-{exec_id}.json" if exec_id else "state.json", state._asdict())

    def exit(self, exec_id: str | None = None) -> ExitRecord | None:
        return self._read(f"exec-{exec_id}.exit.json" if exec_id else "exit.json", ExitRecord)

    def damaged(self) -> list[str]:
        """The container's own files that exist and can't be read."""
        found = {"launch.json": self.launch(), "state.json": self.state(), "exit.json": self.exit()}
        return [name for name, record in found.items() if record is None and os.path.lexists(f"{self.path}/{name}")]

    def write_exit(self, record: ExitRecord, exec_id: str | None = None) -> None:
        self._write(f"exec-{exec_id}.exit.json" if exec_id else "exit.json", record._asdict())

    def forget(self, exec_id: str) -> None:
        """Remove the records of a process that joined and has ended."""
        for name in (f"exec-{exec_id}.json", f"exec-{exec_id}.exit.json"):
            try:
                os.unlink(f"{self.path}/{name}")
            except FileNotFoundError:
                continue

    def execs(self) -> list[str]:
        """The ids of processes that joined."""
        try:
            names = os.listdir(self.path)
        except FileNotFoundError:
            return []
        return [name[5:-5] for name in names if name.startswith("exec-") and name.count(".") == 1]

    def processes(self) -> list[tuple[str | None, ProcessState]]:
        """(exec id, state) of PID 1, whose exec id is None, and of every process that joined."""
        return [(exec_id, state) for exec_id in (None, *self.execs()) if (state := self.state(exec_id))]

    def record_exit(
        self,
        status: int,
        exec_id: str | None = None,
        failure: dict[str, Any] | None = None,
        *,
        state: ProcessState | None = None,
        cgroup: str | None = None,
    ) -> ExitRecord:
        """Write how the process ended, from the status of waitpid(2); a record that exists stays. `state` and `cgroup`
        are read again unless the caller gives them."""
        if known := self.exit(exec_id):
            return known
        code = os.waitstatus_to_exitcode(status)
        state = state or self.state(exec_id)
        error = f"{text_of(failure)}: {failure['error']}" if failure else None
        if code == INTERRUPTED and not (state and state.executed):
            error = error or "interrupted before it started"
        oom = False
        if exec_id is None and code < 0:
            launch = None if cgroup else self.launch()
            if path := launch.cgroup if launch else cgroup:
                oom = Cgroup(path).oom_kills() > 0
        record = ExitRecord(
            exit_status=None if error else (code if code >= 0 else 128 - code),
            signal=-code if code < 0 else None,
            oom=oom and code < 0,
            finished=time.time(),
            error=error,
            failure=failure,
        )
        if os.path.isdir(self.path):
            self.write_exit(record, exec_id)
        return record

    def _read(self, name: str, kind: type[RecordT]) -> RecordT | None:
        """None if it isn't there, or is damaged. Fields of a later version are left out."""
        try:
            data = json.loads(records.read(f"{self.path}/{name}"))
        except (OSError, ValueError, RecursionError):
            return None
        return _decode(data, kind)

    def _write(self, name: str, data: dict[str, Any]) -> None:
        data = {"version": VERSION, **data}
        temporary = f"{self.path}/.{name}.{os.getpid()}"
        records.write(temporary, dumps(data).encode())
        try:
            os.rename(temporary, f"{self.path}/{name}")
        except IsADirectoryError:  # not one of ours
            from insula.kernel import trees

            trees.remove(f"{self.path}/{name}")
            os.rename(temporary, f"{self.path}/{name}")


def all_run_directories(run: str) -> list[RunDirectory]:
    """Every container that has a directory."""
    try:
        return [RunDirectory(run, name) for name in sorted(os.listdir(f"{run}/containers"))]
    except FileNotFoundError:
        return []


class PidIndex:
    """Containers and exec ids by PID, of processes without a record of their end.

    All records are read once, and again for a PID that is not known then: so for a thousand processes that end one
    after the other each record is read once, not a thousand times.
    """

    def __init__(self, run: str) -> None:
        self._run = run
        self._known: dict[int, tuple[RunDirectory, str | None]] = {}

    def find(self, pid: int) -> tuple[RunDirectory, str | None] | None:
        """Container and exec id; None if `pid` was no container's."""
        if found := self._take(pid):
            return found
        self._known = {
            state.pid: (directory, exec_id)
            for directory in all_run_directories(self._run)
            for exec_id, state in directory.processes()
        }
        return self._take(pid)

    def _take(self, pid: int) -> tuple[RunDirectory, str | None] | None:
        """The entry of a PID, unless it is outdated: the record of another process that had the number."""
        directory, exec_id = self._known.pop(pid, (None, None))
        if directory is None or directory.exit(exec_id) is not None:
            return None
        state = directory.state(exec_id)
        return (directory, exec_id) if state and state.pid == pid else None
