"""insula trace: whether one end reaches another, and why or why not."""

from __future__ import annotations

from insula.cli.connection import connect
from insula.cli.options import Arguments, Command, Option
from insula.cli.output import clean, print_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def run(arguments: Arguments) -> int:
    service = arguments.service or "icmp"
    query = {"rules": arguments.verbose, "live": arguments.live}
    view = connect(arguments).networks.trace(arguments.tenant, arguments.src, arguments.dst, service, **query)
    print_json(view) if arguments.json else show(view)
    return 0 if view["allowed"] else 1


def show(view: dict[str, Any]) -> None:
    ends = " → ".join(_end(view[end], view[f"{end}_address"]) for end in ("source", "target"))
    print(f"{'allowed' if view['allowed'] else 'denied'}: {ends} {clean(view['service'])}")
    for step in view["steps"]:
        print(f"  {clean(step)}")
    if view["seen"]:
        print(f"  sent: {clean(view['seen'])}")
    for rule in view["rules"]:
        print(f"    {clean(rule['where'])}: {clean(rule['text'] or rule['verdict'])}")


def _end(name: str, address: str) -> str:
    return clean(name) if name == address else f"{clean(name)} ({clean(address)})"


COMMANDS = {
    "trace": Command(
        run,
        "Tell whether one end reaches another by the rules that are installed, and why: by which network, router,\n"
        "peering or policy. An end is an instance, INSTANCE:INTERFACE, INSTANCE.TENANT.peer, an IP address, or\n"
        "`outside`; a service is tcp/PORT, udp/PORT or icmp, which is the default. Exit status 1 if it is denied.",
        "SRC DST [SERVICE]",
        [
            Option("-v --verbose", "show the installed rules that decided, too (operators only)"),
            Option("--live", "send the packet, and tell where it was seen last"),
        ],
        complete={"SRC": "instance", "DST": "instance"},
    )
}
