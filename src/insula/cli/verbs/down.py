"""insula down: stop everything of Insula on this host, and remove it from the kernel; the state is kept."""

from __future__ import annotations

from insula.cli.connection import connect
from insula.cli.options import Arguments, Command


def run(arguments: Arguments) -> int:
    connect(arguments).host.down()
    print("everything is stopped, insulad too; the state is kept")
    return 0


COMMANDS = {
    "down": Command(
        run,
        "Stop all instances of all tenants, remove every namespace, mount, cgroup, device and rule, and end insulad.",
        details="""\
Tenants, networks, images and instances are kept. When insulad starts again (scripts/up, systemctl), instances start
as their restart policies say. scripts/down does the same, and ends insulad's helpers too.""",
    )
}
