"""What cloud-init is told at the first start of a machine: a disk with the label cidata (its data source NoCloud).

The network is set by MAC address: names of devices differ between systems, and nothing is renamed. IPv4 is asked for by
DHCP, whose answer is the same, so a guest without cloud-init has the same network.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from insula.machine.disk import fat

LABEL: Final = "CIDATA"
SIZE: Final = 16 << 20
"""Bytes of the disk, nearly all of which are a hole."""


class SeedInterface(NamedTuple):
    """A network device: its MAC address and MTU, an IPv6 address with the length of its prefix, and the gateway of
    that, or None."""

    mac: str
    mtu: int
    address6: str | None = None
    gateway6: str | None = None


def write(path: Path, files: dict[str, bytes]) -> None:
    """Write the disk anew, complete or not at all. OSError."""
    draft = path.with_name(f"{path.name}.new")
    with draft.open("wb") as file:
        file.truncate(SIZE)
        for offset, data in fat.build(files, LABEL, SIZE):
            file.seek(offset)
            file.write(data)
    draft.chmod(0o600)
    draft.rename(path)


def files(
    instance_id: str, hostname: str, interfaces: Sequence[SeedInterface], keys: Sequence[str], user_data: str | None
) -> dict[str, bytes]:
    """The files of the disk, in JSON, which is YAML as well. cloud-init runs once for each `instance_id`."""
    about: dict[str, Any] = {"instance-id": instance_id, "local-hostname": hostname}
    if keys:
        about["public-keys"] = [*keys]
    network = {"version": 2, "ethernets": {f"eth{n}": _ethernet(n, each) for n, each in enumerate(interfaces)}}
    return {
        "meta-data": json.dumps(about).encode(),
        "network-config": json.dumps(network).encode(),
        "user-data": (user_data or "#cloud-config\n{}\n").encode(),
    }


def _ethernet(number: int, interface: SeedInterface) -> dict[str, Any]:
    found: dict[str, Any] = {"match": {"macaddress": interface.mac}, "mtu": interface.mtu, "dhcp4": True}
    if number:  # the first one has the default routes
        found["dhcp4-overrides"] = {"use-routes": False}
    if interface.address6:
        found["addresses"] = [interface.address6]
        if interface.gateway6 and not number:
            found["routes"] = [{"to": "::/0", "via": interface.gateway6}]
    return found
