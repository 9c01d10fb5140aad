"""Disk images on the command line: `insula image import --vm`."""

from __future__ import annotations

from insula.cli.options import Arguments, Option, UsageError, choice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

FORMATS = ("raw", "qcow2", "iso")
FIRMWARE = ("bios", "uefi")
DEVICES = ("full", "para")
_ENDS = {".raw": "raw", ".qcow2": "qcow2", ".qcow": "qcow2", ".iso": "iso"}
_OTHERS = (".vmdk", ".vdi", ".vhd", ".vhdx", ".ova", ".gz", ".xz", ".zst", ".bz2", ".zip")
OPTIONS = [
    Option("--vm", "FILE is the disk of a virtual machine, of any operating system (docs/machines.md)"),
    Option(
        "--format",
        "with --vm: raw, qcow2, or iso (a CD or DVD); by default as FILE is named",
        "FORMAT",
        parse=choice(*FORMATS),
        complete=FORMATS,
    ),
    Option(
        "--firmware",
        "with --vm: what starts it, bios or uefi; by default as its first sector is made",
        "KIND",
        parse=choice(*FIRMWARE),
        complete=FIRMWARE,
    ),
    Option(
        "--devices",
        "with --vm: para (virtio, the default), or full, which systems without virtio need",
        "KIND",
        parse=choice(*DEVICES),
        complete=DEVICES,
    ),
]


def disk_options(arguments: Arguments) -> dict[str, Any]:
    """Return the options of `client.images.import_disk`."""
    options = {"firmware": arguments.firmware, "devices": arguments.devices or "para"}
    return {"format": arguments.format or format_of(arguments.file), **options}


def refuse_disk_options(arguments: Arguments) -> None:
    """Raise UsageError for options of disks without --vm."""
    for name in ("format", "firmware", "devices"):
        if getattr(arguments, name):
            raise UsageError(f"--{name} is of the disks of virtual machines", "use it with --vm")


def format_of(path: str) -> str:
    """Return the format that a file's name tells; what is in the file doesn't count, since a guest may have written it.
    UsageError."""
    name = path.rpartition("/")[2].lower()
    for end, kind in _ENDS.items():
        if name.endswith(end):
            return kind
    for end in _OTHERS:
        if name.endswith(end):
            what = f"disk images that end in {end} are not imported"
            raise UsageError(what, "unpack it, or convert it with: qemu-img convert -O qcow2 FILE NEW.qcow2")
    raise UsageError(
        f"the name {name[:60]!r} does not tell the format of the disk image", "add --format raw, qcow2 or iso"
    )
