"""insula doctor: check the requirements of this host."""

from __future__ import annotations

from insula.cli.connection import connect
from insula.cli.options import Arguments, Command
from insula.cli.output import clean, print_json, table


def run(arguments: Arguments) -> int:
    checks = connect(arguments).host.doctor()
    if arguments.json:
        print_json(checks)
    else:
        table(["CHECK", "STATE", "FOUND"], ([check["name"], check["state"], check["detail"]] for check in checks))
        lacking = [check for check in checks if check["state"] != "ok"]
        if lacking:
            print()
        for check in lacking:
            says = "; hint: ".join(filter(None, (check["consequence"], check["hint"])))
            print(f"{clean(check['name'])}: {clean(says)}")
    return 1 if any(check["state"] == "missing" for check in checks) else 0


COMMANDS = {
    "doctor": Command(
        run,
        "Check this host's requirements, and show the consequences of missing ones.",
        details="Exit status 1 if something is missing.",
    )
}
