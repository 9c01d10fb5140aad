"""A topology as a tree of lines for a terminal, none of which is wider than asked for."""

from __future__ import annotations

from insula.cli.graph.topology import peer_text, policy_text
from insula.cli.output import clean

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Any

    Object = dict[str, Any]
    Node = tuple[str, list["Node"]]  # a line, and what is below it

BRANCHES = {True: ("├─ ", "└─ ", "│  ", "   "), False: ("|- ", "`- ", "|  ", "   ")}
"""What is in front of a child, of the last child, and of their children; with Unicode, and in ASCII."""


def draw(topology: Object, width: int, *, unicode: bool = True) -> list[str]:
    """Return the lines. What doesn't fit into `width` columns ends with an ellipsis."""
    lines = [clean(topology["tenant"])]
    for line in _drawn(_nodes(topology), "", BRANCHES[unicode]):
        lines.append(line)
    return [_fitted(line if unicode else _ascii(line), width, "…" if unicode else "...") for line in lines]


def _nodes(topology: Object) -> list[Node]:
    by_router: dict[str | None, list[Object]] = {}
    for network in topology["networks"]:
        by_router.setdefault(network["router"], []).append(network)
    found: list[Node] = []
    for router in topology["routers"]:
        routes: list[Node] = [(f"route {r['destination']} → {r['next_hop']}", []) for r in router["routes"]]
        below = [_network(each) for each in by_router.get(router["name"], ())]
        found.append((f"router {router['name']}", [*routes, *below]))
    found += [_network(network) for network in by_router.get(None, ())]
    return found or [("no networks", [])]


def _network(network: Object) -> Node:
    subnets = "  ".join(each for each in (network["subnet"], network["subnet6"]) if each)
    way = "→ outside" if network["outbound"] == "nat" else "no way out"
    widths = [max((len(clean(row[at])) for row in _rows(network)), default=0) for at in range(3)]
    below: list[Node] = []
    for row, port in zip(_rows(network), network["ports"], strict=True):
        columns = "  ".join(f"{clean(cell):{size}}" for cell, size in zip(row, widths, strict=True))
        below.append((f"{columns}  {_notes(port)}".rstrip(), [(f"published {each}", []) for each in port["published"]]))
    below += [(f"endpoint {e['name']}  {e['address']} → {e['leads_to']}", []) for e in network["endpoints"]]
    below += [(f"peer {peer_text(each)}", []) for each in network["peers"]]
    return f"network {network['name']}  {subnets}  {way}", below


def _rows(network: Object) -> list[tuple[str, str, str]]:
    return [(port["instance"], port["address"], port["address6"] or "") for port in network["ports"]]


def _notes(port: Object) -> str:
    state = "" if port["state"] == "running" else f"[{port['state']}]  "
    policies = ", ".join(map(policy_text, port["policies"]))
    return state + (f"policies {policies}" if policies else "")


def _drawn(nodes: Sequence[Node], indent: str, branches: tuple[str, str, str, str]) -> Iterator[str]:
    for number, (line, below) in enumerate(nodes):
        last = number == len(nodes) - 1
        yield indent + branches[1 if last else 0] + clean(line)
        yield from _drawn(below, indent + branches[3 if last else 2], branches)


def _ascii(line: str) -> str:
    return line.replace("→", "->").encode("ascii", "replace").decode()


def _fitted(line: str, width: int, ellipsis: str) -> str:
    return line if len(line) <= width else line[: max(width - len(ellipsis), 0)] + ellipsis
