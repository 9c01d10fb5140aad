"""A container's directory below --root, through which commands find the container.

    ROOT/ID/state.json    the record of the container (`StateRecord`), replaced atomically
    ROOT/ID/config.json   the config as it was when the container was made; the bundle's may change
    ROOT/ID/start.sock    the socket at which PID 1 listens (unix(7)) until `start`

The status of the runtime-spec is read from the kernel and never stored, so that it is right after any crash:

    creating   no PID in state.json yet      running   the process (PID, start time) is alive
    created    PID 1 listens at start.sock   paused    it is alive, and its control group is frozen
    stopped    the process is gone, or a zombie

Commands on one container exclude each other by a lock (flock(2)) on its directory, which the kernel releases when its
holder ends.
"""

from __future__ import annotations

import fcntl
import os
import time

from insula.kernel import process
from insula.model.cpython import dumps, loads, socket
from insula.model.errors import Conflict, Failed, Invalid, NotFound

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Any, TypedDict

    class StateRecord(TypedDict):
        """The record of a container. `created` is in seconds of the Unix epoch; `owner` is the uid of its creator.

        `cgroup` is relative to the root of every hierarchy, None without one; `scope` is the systemd unit that holds
        it. `pid` and `start_time` are PID 1's on the host, 0 before it exists. The record is written before the rest
        is made, so that `delete --force` finds it if `create` is killed.
        """

        id: str
        bundle: str
        rootfs: str
        pid: int
        start_time: int
        created: float
        owner: int
        cgroup: str | None
        scope: str | None
        annotations: dict[str, str]


OCI_VERSION = "1.3.0"
_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_+-.")

_ID_HINT = "it can't name a container: use letters, digits, and _ + - . (255 at most)"


def check_id(container: str) -> str:
    """Return `container` if it is a valid container ID, which is also the name of a directory. Invalid."""
    if not container or container in (".", "..") or len(container) > 255 or not set(container) <= _LETTERS:
        raise Invalid(f"container ID {container[:60]!r}: invalid characters or length", _ID_HINT)
    return container


class Container:
    """The container `id` below `root`. As a context (``with container:``) it is locked against other commands."""

    def __init__(self, root: str, id: str) -> None:  # noqa: A002
        self.id = check_id(id)
        self.root = root
        self.path = f"{root}/{self.id}"
        self.start_socket = f"{self.path}/start.sock"
        self._lock = -1

    # -- the directory ---------------------------------------------------------------------------------------------

    def make(self) -> None:
        """Make the directory and lock it; Conflict if there is such a container.

        A directory without state.json and lock was left by a `create` that was killed: it is taken over.
        """
        os.makedirs(self.root, 0o700, exist_ok=True)
        try:
            os.mkdir(self.path, 0o700)
        except FileExistsError:
            pass
        except OSError as error:
            raise Failed(f"{self.path} can't be made: {error.strerror}", "see --root") from None
        if not self._acquire(fcntl.LOCK_EX | fcntl.LOCK_NB) or self.record() is not None:
            self.unlock()
            raise Conflict(f"container with given ID already exists: {self.id}", "delete it, or use another ID")

    def lock(self) -> None:
        """Wait for the lock. NotFound if there is no such container, or if it was removed meanwhile."""
        if not self._acquire(fcntl.LOCK_EX):
            raise self._missing()

    def unlock(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Container:
        if self._lock < 0:
            self.lock()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.unlock()

    def _acquire(self, operation: int) -> bool:
        """Take the lock. False if the directory does not exist, or if `operation` doesn't wait and it is locked."""
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            return False
        try:
            fcntl.flock(fd, operation)
            if os.path.samestat(os.fstat(fd), os.stat(self.path)):  # else it was deleted and made again meanwhile
                self._lock, fd = fd, -1
                return True
        except (BlockingIOError, FileNotFoundError):
            pass
        finally:
            if fd >= 0:
                os.close(fd)
        return False

    def remove(self) -> None:
        """Remove the container's directory: state.json first, so that a crash leaves no damaged container."""
        for name in ("state.json", *self._names()):
            _ignoring_absence(os.unlink, f"{self.path}/{name}")
        _ignoring_absence(os.rmdir, self.path)

    def _names(self) -> list[str]:
        try:
            return os.listdir(self.path)
        except FileNotFoundError:
            return []

    # -- record, config, status ------------------------------------------------------------------------------------

    def save(self, record: StateRecord) -> None:
        """Write state.json: from now on the container exists."""
        self._write("state.json", dumps(record).encode())

    def save_config(self, config: bytes | dict[str, Any]) -> None:
        """Keep the config that the container is made of."""
        self._write("config.json", config if isinstance(config, bytes) else dumps(config).encode())

    def record(self) -> StateRecord | None:
        """state.json, if the container was made."""
        record: StateRecord | None = self._read("state.json")
        return record

    def load(self) -> StateRecord:
        """state.json; NotFound if there is no such container."""
        record = self.record()
        if record is None:
            raise self._missing()
        return record

    def config(self) -> dict[str, Any]:
        """The config as it was when the container was made."""
        return self._read("config.json") or {}

    def status(self, record: StateRecord | None) -> str:
        """creating, created, running, paused or stopped, as of now."""
        if record is None or not record["pid"]:
            return "creating"
        if not process.is_alive(record["pid"], record["start_time"]):
            return "stopped"
        if self._listens():
            return "created"
        if record["cgroup"]:
            from insula.kernel.cgroups import Cgroup

            if Cgroup(record["cgroup"]).frozen():
                return "paused"
        return "running"

    def oci_state(self, record: StateRecord, status: str | None = None) -> dict[str, Any]:
        """The state as in runtime.md, which `state` prints and hooks are given; `status` is computed by default."""
        status = status or self.status(record)
        return {
            "ociVersion": OCI_VERSION,
            "id": self.id,
            "pid": record["pid"] if status != "stopped" else 0,
            "status": status,
            "bundle": record["bundle"],
            "rootfs": record["rootfs"],
            "created": rfc3339(record["created"]),
            "owner": user_name(record["owner"]),
            "annotations": record["annotations"],
        }

    def at_start_socket(self, action: Callable[[str], object]) -> None:
        """Call `action` with a path of the start socket that fits into sockaddr_un, which has 108 bytes."""
        fd = os.open(self.path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            action(f"/proc/self/fd/{fd}/{os.path.basename(self.start_socket)}")
        finally:
            os.close(fd)

    def _listens(self) -> bool:
        """Whether a process listens at the start socket; a `start` that was killed may have left its file."""
        if not os.path.exists(self.start_socket):
            return False
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        try:
            self.at_start_socket(sock.connect)
        except BlockingIOError:  # it is frozen, and its backlog is full
            return True
        except OSError:
            return False
        finally:
            sock.close()
        return True

    def _read(self, name: str) -> Any:
        try:
            with open(f"{self.path}/{name}", "rb") as file:
                return loads(file.read())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except ValueError as error:
            raise Failed(f"{self.path}/{name} is damaged: {error}", "delete --force the container") from None

    def _write(self, name: str, data: bytes) -> None:
        temporary = f"{self.path}/.{name}.{os.getpid()}"
        with open(temporary, "wb") as file:
            file.write(data)
        os.rename(temporary, f"{self.path}/{name}")

    def _missing(self) -> NotFound:
        return NotFound(f"container does not exist: {self.id}", f"insula-oci --root {self.root} list shows what does")


def _ignoring_absence(remove: Callable[[str], None], path: str) -> None:
    try:
        remove(path)
    except FileNotFoundError:
        return


def containers(root: str) -> list[Container]:
    """Every container below `root` that has a state.json."""
    try:
        names = sorted(os.listdir(root))
    except FileNotFoundError:
        return []
    found = [Container(root, name) for name in names if set(name) <= _LETTERS]
    return [container for container in found if container.record() is not None]


def rfc3339(seconds: float) -> str:
    """``2024-05-06T07:08:09.123456789Z``, as Go's programs parse times."""
    whole = int(seconds)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole)) + f".{int((seconds - whole) * 10**9):09}Z"


def user_name(uid: int) -> str:
    """The name of a user of the host, or the number of one without."""
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
