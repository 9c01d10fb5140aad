"""insula down: nothing of Insula is left running or installed on the host; the state stays."""

from __future__ import annotations

from insula.cli.options import Arguments, Command
from insula.client import Client


def run(arguments: Arguments) -> int:
    Client(arguments.socket).host.down()
    print("everything is stopped; the state is kept, and `insula start` brings instances back")
    return 0


COMMANDS = {
    "down": Command(
        run,
        "Stop all instances of all tenants and remove every namespace, mount, cgroup, device and rule of Insula.",
        details="Tenants, networks, images and instances stay known.",
    )
}
