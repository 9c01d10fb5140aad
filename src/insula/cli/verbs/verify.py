"""insula verify: compare wanted, installed and measured reachability, as a matrix."""

from __future__ import annotations

from insula.cli.connection import connect
from insula.cli.options import Arguments, Command, Option, UsageError
from insula.cli.output import clean, print_json, table
from insula.model.units import parse_duration

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    Cell = dict[str, Any]

LEGEND = """\
yes  reached, and should be         no   not reached, and should not be
yes* no* as installed, not probed   !    differs from what it should be"""


def run(arguments: Arguments) -> int:
    host = connect(arguments).host
    if arguments.watch and arguments.repair:
        raise UsageError("--watch and --repair exclude each other", "repair first, then watch")
    if arguments.watch and arguments.interval is not None:
        return repeat(host.verify, arguments.interval, as_json=arguments.json)
    if arguments.watch:
        return watch(host.events(verify=True), as_json=arguments.json)
    if arguments.interval is not None:
        raise UsageError("--interval is for --watch", "add --watch")
    report = host.repair() if arguments.repair else host.verify()
    if arguments.json:
        print_json(report)
    else:
        show(report, everything=arguments.all)
    return 0 if report["passed"] else 1


def show(report: dict[str, Any], *, everything: bool = False) -> None:
    matrix: list[Cell] = report["matrix"]
    if matrix:
        print_matrix(matrix)
    else:
        print("no instance with a network runs, so there is nothing to prove")
    if everything:
        print()
        header = ["SOURCE", "TARGET", "ADDRESS", "EXPECTED", "INSTALLED", "PROBED", "CONTROL", "DETAIL"]
        table(header, ([cell[name.lower()] for name in header] for cell in matrix))
    for line in report["repaired"]:
        print(f"repaired {clean(line)}")
    wrong = [cell for cell in matrix if not holds(cell)]
    unproven = [cell for cell in matrix if cell["probed"] is None and not cell["control"]]
    for line in said(report):
        print(line)
    if report["probed_ports"] < report["ports"]:
        print(f"packets between {report['probed_ports']} of {report['ports']:,} ports, chosen at random")
    probed = sum(cell["probed"] is not None for cell in matrix)
    negatives = [cell for cell in matrix if cell["probed"] is False]
    controlled = sum(cell["control"] for cell in negatives)
    print(
        f"{'passed' if report['passed'] else 'FAILED'}: {len(matrix)} paths, {probed} probed with real packets, "
        f"{len(wrong)} wrong, {len(unproven)} not proven, {len(report['drift'])} drifted; "
        f"{report['classes']:,} classes of packets compared, {len(report['findings'])} findings; "
        f"{controlled} of {len(negatives)} silent ones have a positive control ({report['seconds']:.1f} s)"
    )


def said(report: dict[str, Any]) -> Iterator[str]:
    """Yield a line for each thing that was found."""
    matrix: list[Cell] = report["matrix"]
    for cell in (each for each in matrix if not holds(each)):
        yield f"! {clean(cell['source'])} → {clean(cell['target'])} ({clean(cell['address'])}): {difference(cell)}"
    for cell in (each for each in matrix if each["probed"] is None and not each["control"]):
        why = clean(cell["detail"] or "no probe")
        yield f"? {clean(cell['source'])} → {clean(cell['target'])} ({clean(cell['address'])}): not proven: {why}"
    for finding in report["findings"]:
        sent = f"; sent: {finding['sent']}" if finding["sent"] else ""
        yield f"! {clean(finding['text'])}{clean(sent)}"
    for line in report["drift"]:
        yield f"! {clean(line)}"


def watch(events: Iterator[dict[str, Any]], *, as_json: bool) -> int:
    """Print what insulad tells of its proofs, until interrupted."""
    import json
    import time

    for event in events:
        if event["kind"] != "isolation":
            continue
        moment, text = time.strftime("%H:%M:%S", time.localtime(event["time"])), clean(event["text"])
        if as_json:
            print(json.dumps(event), flush=True)
        elif event["action"] == "proven":
            print(f"{moment}  {'FAILED' if event['findings'] else 'passed'}, watching", flush=True)
        else:
            print(f"{moment}  {'gone: ' if event['action'] == 'restored' else ''}! {text}", flush=True)
    return 0


def repeat(verify: Callable[[], dict[str, Any]], pause: float, *, as_json: bool) -> int:
    """Verify again and again, `pause` seconds after the last time, and print what is found and what is gone, until
    interrupted."""
    import json
    import time

    before: list[str] | None = None
    while True:
        report = verify()
        now, moment = list(said(report)), time.strftime("%H:%M:%S")
        if as_json:
            print(json.dumps(report), flush=True)
        else:
            if before is None:
                print(f"{moment}  {'passed' if report['passed'] else 'FAILED'}, watching", flush=True)
            for line in now:
                if line not in (before or ()):
                    print(f"{moment}  {line}", flush=True)
            for line in before or ():
                if line not in now:
                    print(f"{moment}  gone: {line}", flush=True)
        before = now
        time.sleep(pause)


def holds(cell: Cell) -> bool:
    """Whether installed and measured reachability are the wanted one."""
    return bool(cell["installed"] == cell["expected"] and cell["probed"] in (None, cell["expected"]))


def difference(cell: Cell) -> str:
    words = {True: "reachable", False: "not reachable", None: "not probed"}
    text = f"should be {words[cell['expected']]}, installed {words[cell['installed']]}, probe {words[cell['probed']]}"
    return f"{text}; {clean(cell['detail'])}" if cell["detail"] else text


def print_matrix(matrix: list[Cell]) -> None:
    """Print the matrix: rows are sources, columns targets; a pair with several addresses shows the worst of them.

    Columns have numbers instead of names if names would be too wide.
    """
    from shutil import get_terminal_size

    sources = list(dict.fromkeys(cell["source"] for cell in matrix))
    reached = dict.fromkeys(cell["target"] for cell in matrix)
    targets = [name for name in sources if name in reached] + [name for name in reached if name not in sources]
    pairs: dict[tuple[str, str], list[Cell]] = {}
    for cell in matrix:
        pairs.setdefault((cell["source"], cell["target"]), []).append(cell)
    rows = [[source, *(mark(pairs.get((source, target), [])) for target in targets)] for source in sources]
    names = [clean(name) for name in targets]
    if sum(len(name) + 2 for name in names) + max(map(len, sources)) <= get_terminal_size((120, 24)).columns:
        table(["FROM \\ TO", *names], rows)
    else:
        numbers = {name: number for number, name in enumerate(targets, 1)}
        table(["", "FROM \\ TO", *map(str, numbers.values())], ([numbers.get(row[0], ""), *row] for row in rows))
        table(["", ""], ([number, name] for name, number in numbers.items() if name not in sources))
    print(LEGEND)


def mark(cells: list[Cell]) -> str:
    if not cells:
        return "·"
    if not all(map(holds, cells)):
        return "!"
    word = "yes" if any(cell["expected"] for cell in cells) else "no"
    return word if all(cell["probed"] is not None for cell in cells) else word + "*"


COMMANDS = {
    "verify": Command(
        run,
        "Compare, for every pair of instances and for host and outside, what should be reachable with what the\n"
        "kernel has installed and with what real packets do. Exit status 1 on any difference.",
        options=[
            Option("-a --all", "list every path, too"),
            Option("--watch", "have changes proven as the kernel tells of them, and print what is found and gone"),
            Option("--interval", "with --watch: verify every so often, with packets", "TIME", parse=parse_duration),
            Option("--repair", "have installed again what differs, and verify once more"),
        ],
    )
}
