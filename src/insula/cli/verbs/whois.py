"""insula whois: show the tenant and instance of a process on the host."""

from __future__ import annotations

from insula.cli.connection import connect
from insula.cli.options import Arguments, Command, UsageError
from insula.cli.output import clean, print_json

_PIDS = range(1, (1 << 22) + 1)  # proc(5), pid_max


def run(arguments: Arguments) -> int:
    if not (arguments.pid.isascii() and arguments.pid.isdigit()) or int(arguments.pid[:20]) not in _PIDS:
        raise UsageError(f"{arguments.pid[:60]!r} is not a PID", "write the PID on the host")
    found = connect(arguments).host.whois(int(arguments.pid))
    if arguments.json:
        print_json(found)
    elif found["tenant"] is None:
        print(f"{found['pid']} ({clean(found['command'])}) is the host's own")
    else:
        print(f"process   {found['pid']} ({clean(found['command'])})")
        print(f"tenant    {clean(found['tenant'])}")
        print(f"instance  {clean(found['instance'])} ({found['id']})")
        print(f"inside    PID {found['inside']}")
        if len(found["pids"]) > 2:
            print(f"nested    {' > '.join(map(str, found['pids']))}, from the host inward")
    return 0


COMMANDS = {"whois": Command(run, "Show the tenant and instance of the host's process PID, and its PID inside.", "PID")}
