"""insula status: show the state of this host."""

from __future__ import annotations

from insula.cli.connection import connect
from insula.cli.options import Arguments, Command
from insula.cli.output import age, clean, print_json


def run(arguments: Arguments) -> int:
    status = connect(arguments).host.status()
    if arguments.json:
        print_json(status)
        return 0
    instances = ", ".join(f"{count} {state}" for state, count in sorted(status["instances"].items()))
    print(f"insula     {clean(status['version'])}, up for {age(status['started'])}")
    print(f"host       {clean(status['hostname'])}, Linux {clean(status['kernel'])}")
    print(f"tenants    {status['tenants']}")
    print(f"networks   {status['networks']}")
    print(f"instances  {instances or 'none'}")
    print(f"revision   {status['revision']}")
    if status["reconciling"]:
        print(f"starting   {status['reconciling']} instances have not been observed yet")
    for problem in status["problems"]:
        print(f"problem    {clean(problem)}")
    return 0


COMMANDS = {"status": Command(run, "Show the state of this host.")}
