"""Options of `insula run` for virtual machines."""

from __future__ import annotations

from insula.cli.disk_image import DEVICES
from insula.cli.options import Arguments, Option, UsageError, choice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_OF_CONTAINERS = (
    *("init", "shm_size", "ulimit", "cap_add", "cap_drop", "sysctl", "pid", "nesting", "socket_family", "aio"),
    *("pids", "inodes"),
)
"""Options that a virtual machine can't have: it has a kernel of its own, and counts its own processes and files."""
_OF_MACHINES = ("cold", "privileged", "devices", "user_data", "ssh_key", "cdrom")
MACHINE_OPTIONS = [
    Option("--vm", "make it a virtual machine, with a kernel of its own (docs/machines.md)"),
    Option("--cold", "with --vm: boot it, instead of copying one that was booted"),
    Option("--privileged", "with --vm: root in it has all rights on its kernel, as systemd needs them"),
    Option(
        "--devices",
        "with --vm and a disk image: para (virtio) or full (e1000, IDE)",
        "KIND",
        parse=choice(*DEVICES),
        complete=DEVICES,
    ),
    Option("--user-data", "with --vm and a disk image: what cloud-init is told", "FILE", complete="file"),
    Option(
        "--ssh-key",
        "with --vm and a disk image: a public key for its user, or a file with some",
        "KEY|FILE",
        many=True,
        complete="file",
    ),
    Option(
        "--cdrom",
        "with --vm and a disk image: an image of a CD for its drive, as of drivers",
        "IMAGE",
        complete="image",
    ),
]
_MOST = 1 << 20  # bytes of a file, which insulad limits further


def machine_options(arguments: Arguments) -> dict[str, Any]:
    """Return the `MachineOptions` of the options."""
    if given := [name for name in _OF_CONTAINERS if getattr(arguments, name)]:
        option = f"--{given[0].replace('_', '-')}"
        raise UsageError(f"{option} is of containers, and --vm asks for a virtual machine", "leave out one of them")
    options: dict[str, Any] = {"kind": "machine", "group_add": arguments.group_add}
    options |= {name: getattr(arguments, name) for name in ("cold", "privileged")}
    if arguments.devices:
        options["devices"] = arguments.devices
    if arguments.cdrom:
        options["cdrom"] = arguments.cdrom
    if arguments.user_data:
        options["user_data"] = _text(arguments.user_data)
    if arguments.ssh_key:
        options["ssh_keys"] = [key for each in arguments.ssh_key for key in _keys(each)]
    return options


def refuse_machine_options(arguments: Arguments) -> None:
    """Raise UsageError for options of virtual machines without --vm."""
    for name in _OF_MACHINES:
        if getattr(arguments, name):
            raise UsageError(f"--{name.replace('_', '-')} is of virtual machines", "use it with --vm")


def _keys(text: str) -> list[str]:
    """The keys in a file, one a line, or the one that is given."""
    if " " in text:
        return [text]
    lines = [line.strip() for line in _text(text).splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def _text(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(_MOST + 1)
    except (OSError, UnicodeDecodeError) as problem:
        why = problem.strerror if isinstance(problem, OSError) else "it is not UTF-8"
        raise UsageError(f"{path[:200]} can't be read: {why}", "name a file of text") from None
    if len(text) > _MOST:
        raise UsageError(f"{path[:200]} is too long", "use at most 64k")
    return text
