"""Runs in domain 0: a guest's life by Insula's driver. Prints what it saw, JSON: python3 -m tests.xen.inside pv|pvh"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from insula.machine.hypervisor import (
    DiskConfig,
    GuestConfig,
    GuestEvent,
    GuestKeeper,
    Interface,
    Kernel,
    Virtualization,
)
from insula.machine.libvirt.keeper import XEN, LibvirtKeeper
from insula.machine.libvirt.xen import domain_of_this_host
from insula.model.errors import InsulaError

NAME, MAC, BRIDGE, ADDRESS = "guest", "00:16:3e:00:00:01", "xenbr0", "10.77.0.2"
DISK = Path("/var/guest.img")
MARK = f"{'the disk of the guest':<63}\n"
PATIENCE = 240.0


def config(how: Virtualization) -> GuestConfig:
    kernel = Kernel("/guest/vmlinux", "/guest/initramfs", f"console=hvc0 quiet panic=-1 address={ADDRESS}/24")
    return GuestConfig(
        name=NAME,
        uuid="6f1c1a52-5c8b-4a0e-9d39-6f1c2f0c6a11",
        memory=160,
        virtualization=how,
        kernel=kernel,
        disks=[DiskConfig(str(DISK))],
        interfaces=[Interface(MAC, BRIDGE, "guest0")],
    )


def answer(seconds: float = 5.0) -> str | None:
    """What the guest's web server says."""
    try:
        with urllib.request.urlopen(f"http://{ADDRESS}/", timeout=seconds) as found:
            return cast(str, found.read().decode())
    except (OSError, urllib.error.URLError):
        return None


def until(condition: Callable[[], Any], what: str) -> Any:
    end = time.monotonic() + PATIENCE
    while not (found := condition()):
        if time.monotonic() > end:
            raise TimeoutError(what)
        time.sleep(0.5)
    return found


def refused(call: Callable[[], object]) -> str:
    try:
        call()
    except InsulaError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def live(how: Virtualization) -> dict[str, Any]:
    keeper: GuestKeeper = LibvirtKeeper("xen:///system", XEN, seconds=PATIENCE)
    events: list[GuestEvent] = []
    seen: dict[str, Any] = {"check": keeper.check(), "domain": domain_of_this_host()}
    DISK.write_bytes(MARK.encode().ljust(1 << 20, b"\0"))
    end = keeper.watch(events.append)
    keeper.define(config(how))
    seen["again"] = refused(lambda: keeper.define(config(how)))
    keeper.start(NAME)
    seen["started"] = keeper.state(NAME)
    seen["answer"] = until(answer, "the guest answers")
    seen["xl"] = subprocess.run(["xl", "list", "-v"], capture_output=True, text=True, check=False).stdout
    seen["bridge"] = sorted(path.name for path in Path(f"/sys/class/net/{BRIDGE}/brif").iterdir())
    seen["console"] = str(keeper.console(NAME))
    keeper.pause(NAME)
    seen["paused"] = (keeper.state(NAME), answer())
    keeper.resume(NAME)
    seen["resumed"] = (keeper.state(NAME), until(answer, "the guest answers again") is not None)
    seen["undefine"] = refused(lambda: keeper.undefine(NAME))
    keeper.shut_down(NAME)
    until(lambda: keeper.state(NAME) == "off", "the guest turns itself off")
    seen["off"] = (keeper.state(NAME), answer())
    keeper.start(NAME)
    until(answer, "the guest answers after another start")
    keeper.kill(NAME)
    seen["killed"] = keeper.state(NAME)
    keeper.undefine(NAME)
    seen["gone"] = refused(lambda: keeper.state(NAME))
    end()
    seen["events"] = [each.what for each in events if each.name == NAME]
    keeper.close()
    return seen


if __name__ == "__main__":
    print(json.dumps(live(cast(Virtualization, sys.argv[1]))))
