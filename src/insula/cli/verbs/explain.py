"""insula explain: show the isolation of an instance, read from the kernel."""

from __future__ import annotations

from insula.cli.connection import connect
from insula.cli.elements import concerning
from insula.cli.options import Arguments, Command, Option
from insula.cli.output import age, clean, print_json, size, table
from insula.cli.verbs.ps import state
from insula.cli.verbs.top import HEADER, rows, tree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Page = dict[str, Any]


def run(arguments: Arguments) -> int:
    page = connect(arguments).instances.explain(arguments.tenant, arguments.name)
    if arguments.json:
        print_json(page)
        return 0
    identity(page)
    if page["namespaces"]:
        for part in (processes, namespaces, cgroups, security):
            part(page)
    else:
        print("\nIt is not running: it has no processes, namespaces or control groups now.")
    filesystem(page)
    network(page)
    rules(page, arguments.rules)
    return 0


def title(text: str) -> None:
    print(f"\n{text}\n{'─' * len(text)}")


def facts(pairs: dict[str, object], width: int = 22) -> None:
    for name, value in pairs.items():
        print(f"  {clean(name):{width}} {'-' if value in (None, '') else clean(value)}")


def identity(page: Page) -> None:
    instance, status = page["instance"], page["status"]
    print(f"{clean(instance['name'])} of tenant {clean(instance['tenant'])}: {clean(state(status))}")
    facts(
        {
            "id": instance["id"],
            "image": f"{instance['spec']['image']} ({instance['image_digest'][:19]}…)",
            "started": f"{age(status['started'])} ago" if status["started"] else None,
            "ended": f"{age(status['exit']['finished'])} ago" if status["exit"] else None,
            "restarts": status["restarts"],
        }
    )
    if health := page["health"]:
        last = health["log"][-1] if health["log"] else None
        found = f", exit status {last['exit_status']}, {age(last['finished'])} ago" if last else ""
        facts({"health": f"{health['status']}, {health['failures']} failures in a row{found}"})
    options = instance["spec"]["options"]
    if options["kind"] == "container":
        allowed(options)


def allowed(options: dict[str, Any]) -> None:
    """What a container has that others don't have."""
    if other := options["pid_of"]:
        facts({"processes": f"shared with {other}, by --pid: if that one ends, so does this"})
    if options["nesting"]:
        facts({"containers inside": "allowed, by --nesting"})
    if families := options["socket_families"]:
        facts({"more socket families": f"{', '.join(families)}, by --socket-family"})
    if options["aio"]:
        facts({"asynchronous I/O": "allowed, by --aio"})


def processes(page: Page) -> None:
    title("Processes: the same ones, seen from inside and from the host")
    table(HEADER, rows(page["processes"]), indent="  ")
    deepest = max((len(process["pids"]) for process in page["processes"]), default=0)
    if deepest > 2 and "cgroups" in page:
        levels(page["processes"], deepest)


def levels(found: list[dict[str, Any]], deepest: int) -> None:
    """Print the PIDs of each process by level: a PID namespace sees processes of those below it, and none above."""
    title("PID namespaces by level: a process sees those of its own level and to the right (pid_namespaces(7))")
    header = ["HOST", "INSTANCE", *(f"LEVEL {level}" for level in range(2, deepest)), "COMMAND"]
    table(
        header,
        (
            [*process["pids"], *[None] * (deepest - len(process["pids"])), "  " * depth + process["command"]]
            for process, depth in tree(found)
        ),
        indent="  ",
    )


def namespaces(page: Page) -> None:
    title("Namespaces: what it sees of the kernel's objects (namespaces(7))")
    table(
        ["KIND", "INODE", "WHOSE"],
        ([each["kind"], each.get("inode"), whose(each)] for each in page["namespaces"]),
        indent="  ",
    )
    if page.get("uid_map"):
        inside, outside, count = page["uid_map"].split()[:3]
        last = int(outside) + int(count) - 1
        print(f"  users {inside} to {int(inside) + int(count) - 1} inside are {outside} to {last} on the host")


def whose(namespace: dict[str, Any]) -> str:
    if namespace["shared"]:
        return "the host's"
    return f"shared with {', '.join(namespace['instances'])}" if namespace["instances"] else "its own"


def cgroups(page: Page) -> None:
    title("Control groups: what it may use (cgroups(7))")
    paths: dict[str, list[str]] = {}
    for controller, path in page.get("cgroups", {}).items():
        paths.setdefault(path, []).append(controller)
    facts({", ".join(controllers) or "unified": path for path, controllers in paths.items()})
    facts({name: amount(name, text) for name, text in page["limits"].items()})
    facts(page["pressure"])
    if together := page.get("tenant_limits"):
        print("  and all instances of the tenant together:")
        facts({name: amount(name, text) for name, text in together.items()})


def amount(name: str, text: str) -> str:
    """Format a value of a control group's file for people."""
    if text == "-1" or (name.endswith("_in_bytes") and text.isdigit() and int(text) > 1 << 62):
        return f"{text} (no limit)"
    if name.startswith("memory.") and text.isdigit():
        return f"{text} ({size(int(text))})"
    return text


def security(page: Page) -> None:
    title("Rights: what it may ask of the kernel (capabilities(7), seccomp(2))")
    rights = dict(page["security"])
    if rights.get("bounding capabilities") == rights.get("capabilities"):
        rights["bounding capabilities"] = "the same"
    facts(rights)


def filesystem(page: Page) -> None:
    kind = (page["instance"]["spec"].get("options") or {}).get("kind")
    joined = "joined by overlayfs in the guest" if kind == "machine" else "overlayfs"
    title(f"File system: shared layers below, its own on top ({joined})")
    if disk := page.get("disk"):
        facts(disk_facts(disk))
    if "upper" in page:
        print(f"  {'writable':22} {clean(page['upper'])}")
    for number, layer in enumerate(page["layers"]):
        path = clean(layer.get("path", ""))
        print(f"  {'read-only layer ' + str(number + 1):22} {clean(layer['digest'][:19])}…  {path}".rstrip())


def disk_facts(disk: Page) -> dict[str, object]:
    """What it has written, with its limits: as the file system counts it for its quota."""
    how = "" if disk["enforced"] else ", which the kernel does not enforce here"
    limit = None if disk["limit"] is None else size(disk["limit"])
    written = of("not counted" if disk["used"] is None else size(disk["used"]), limit)
    files = of("not counted" if disk["inodes"] is None else str(disk["inodes"]), disk["inodes_limit"])
    return {"on disk": f"{written}{how if limit else ''}", "files and directories": files}


def of(used: str, limit: object) -> str:
    return f"{used}, no limit" if limit is None else f"{used} of at most {limit}"


def network(page: Page) -> None:
    title("Network: its place on the tenant's own segments")
    if not page["instance"]["ports"]:
        print("  loopback only")
    installed = {each["index"]: each for each in page.get("installed") or ()}
    for port in page["instance"]["ports"]:
        here = installed.get(port.get("index"), {})
        facts(
            {
                "interface": port["interface"],
                "network": port["network"],
                "address": ", ".join(filter(None, (port["address"], port["address6"]))),
                "MAC address": port["mac"],
                **({"device on the bridge": here["device"]} if here else {}),
            }
        )
        for name, value in here.items():
            shown = ", ".join(map(str, value)) if isinstance(value, list) else value
            facts({f"installed: {name}": shown})
    for entrance in page.get("entrances") or ():
        facts({"reached by": entrance})


def rules(page: Page, whole: bool) -> None:
    """Print the rules of the tenant, or only the elements of their sets that name a port of the instance."""
    listing = page.get("rules")
    if not listing:
        return
    if whole:
        title("Rules of the tenant (nft(8))")
        for line in listing.splitlines():
            print(f"  {clean(line.expandtabs(4))}")
        return
    title("Elements that name it, of sets and maps in the tenant's rules (--rules prints all)")
    ports = page["installed"]
    names = {
        name for port in ports for name in (port["device"], *port["macs"], *port["addresses"], *port["addresses6"])
    }
    for line in concerning(listing, sorted(names)):
        print(f"  {clean(line)}")


COMMANDS = {
    "explain": Command(
        run,
        "Show the isolation of the instance NAME: its processes inside and on the host, namespaces, control\n"
        "groups, rights, layers, ports and what its tenant's rules have of it, as the kernel has them now.",
        "NAME",
        [Option("--rules", "print all rules of the tenant")],
        complete={"NAME": "instance"},
    )
}
