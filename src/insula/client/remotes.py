"""The remotes of a user: daemons on other machines, each a file below ~/.config/insula/remotes with mode 600.

A file has `addresses`, the certificate `authority` of the server, and a `token` or the name of a file with a
`certificate`; `checked` is when the authorities were asked for last. The file `current` beside them has the name of the
remote that is used by default.
"""

from __future__ import annotations

import os

from insula.model.cpython import dumps, loads
from insula.model.errors import Denied, Invalid, NotFound
from insula.model.units import check_label

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

LOCAL = "local"
"""The name of this machine."""


def directory() -> str:
    base = os.environ.get("XDG_CONFIG_HOME") or os.path.join(os.path.expanduser("~"), ".config")
    return os.path.join(base, "insula", "remotes")


def names() -> list[str]:
    try:
        return sorted(name[:-5] for name in os.listdir(directory()) if name.endswith(".json"))
    except FileNotFoundError:
        return []


def current() -> str:
    """Return the remote that is used by default: INSULA_REMOTE, else the one of `insula remote use`, else local."""
    if named := os.environ.get("INSULA_REMOTE"):
        return named
    try:
        with open(os.path.join(directory(), "current")) as file:
            return file.read().strip() or LOCAL
    except OSError:
        return LOCAL


def use(name: str) -> None:
    if name != LOCAL:
        load(name)
    _write("current", name + "\n")


def load(name: str) -> dict[str, Any]:
    """Return the remote of that name. NotFound; Denied if others can read its token."""
    path = os.path.join(directory(), f"{check_label('remote', name)}.json")
    try:
        with open(path) as file:
            if os.fstat(file.fileno()).st_mode & 0o077:
                raise Denied(f"{path} can be read by other users", f"chmod 600 {path}")
            found = loads(file.read())
    except FileNotFoundError:
        raise NotFound(f"there is no remote {name}", "`insula remote ls` lists them") from None
    except ValueError:
        raise Invalid(f"{path} is damaged", f"`insula remote rm {name}`, and add it again") from None
    return dict(found)


def save(name: str, remote: dict[str, Any]) -> None:
    _write(f"{check_label('remote', name)}.json", dumps(remote) + "\n")


class RemoteLock:
    """Hold the lock of a remote's file, for a change that depends on what it says (flock(2))."""

    def __init__(self, name: str) -> None:
        self._path = os.path.join(directory(), f"{check_label('remote', name)}.lock")

    def __enter__(self) -> None:
        import fcntl

        os.makedirs(directory(), mode=0o700, exist_ok=True)
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._fd, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def remove(name: str) -> None:
    load(name)
    os.unlink(os.path.join(directory(), f"{name}.json"))
    if current() == name:
        use(LOCAL)


def _write(name: str, text: str) -> None:
    """Write a file with mode 600, whole or not at all."""
    os.makedirs(directory(), mode=0o700, exist_ok=True)
    path = os.path.join(directory(), name)
    fd = os.open(f"{path}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)
    os.replace(f"{path}.new", path)
