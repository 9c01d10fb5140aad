"""insula doctor: what this host has and lacks, and what follows."""

from __future__ import annotations

from insula.cli.options import Arguments, Command
from insula.cli.output import print_json, table
from insula.client import Client


def run(arguments: Arguments) -> int:
    checks = Client(arguments.socket).host.doctor()
    if arguments.json:
        print_json(checks)
    else:
        table(
            ["CHECK", "STATE", "FOUND", "WHAT FOLLOWS", "WHAT HELPS"],
            ([check[key] or "" for key in ("name", "state", "detail", "consequence", "hint")] for check in checks),
        )
    return 1 if any(check["state"] == "missing" for check in checks) else 0


COMMANDS = {
    "doctor": Command(
        run,
        "Show what this host has and lacks, and what follows from it.",
        details="Exit status 1 if something is missing.",
    )
}
