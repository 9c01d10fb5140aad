"""A topology as one SVG file (SVG 1.1) without scripts, links or anything from elsewhere.

There are layers: the outside, the peers above the networks that they reach, the routers, and the networks with their
instances as rows. Networks of one router stand side by side below it.
"""

from __future__ import annotations

from html import escape

from insula.cli.graph.topology import peer_text, policy_text
from insula.cli.output import clean

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Object = dict[str, Any]

BOX, GAP, ROW, PAD = 300, 28, 18, 12
LETTER = 7.25  # the width of a letter of the monospaced font at 12 pixels, rounded up
TOP, LAYER, PILL = 28, 78, 42  # the first layer, the height of one, and that of a peer in it
HEAD = 46  # the height of a network's heading
COLOURS = {"outside": "#475569", "peer": "#7c3aed", "router": "#0369a1", "network": "#0f766e"}


def draw(topology: Object) -> str:
    """Return the file's text."""
    ordered = sorted(topology["networks"], key=lambda each: (each["router"] is None, each["router"] or ""))
    places = {network["name"]: GAP + number * (BOX + GAP) for number, network in enumerate(ordered)}
    peers = TOP + LAYER  # where the layers begin
    routers = peers + PILL * max((len(network["peers"]) for network in ordered), default=0)
    top = routers + (LAYER if topology["routers"] else 0)
    width = GAP + max(len(ordered), 1) * (BOX + GAP)
    height = top + max([HEAD + ROW * len(_rows(each)) + PAD for each in ordered], default=ROW) + GAP
    lines, boxes = list[str](), list[str]()
    if any(network["outbound"] == "nat" for network in ordered):
        boxes += _pill(GAP, TOP, "outside", "the outside", 120)
    for router in topology["routers"]:
        centres = [places[name] + BOX / 2 for name in router["networks"] if name in places]
        at = sum(centres) / len(centres) if centres else width / 2
        boxes += _pill(at - 80, routers, "router", f"router {router['name']}", 160)
        lines += [_line(at, routers + 34, centre, top, "router") for centre in centres]
    for network in ordered:
        left = places[network["name"]]
        boxes += _network(network, left, top)
        if network["outbound"] == "nat":
            lines.append(_line(GAP + 60, TOP + 34, left + 12, top, "outside"))
        for number, peer in enumerate(network["peers"]):
            at = peers + PILL * number
            boxes += _pill(left + 30, at, "peer", f"peer {peer_text(peer)}", BOX - 30)
            lines.append(_line(left + BOX - 20, at + 17, left + BOX - 20, top, "peer"))
    if not ordered:
        boxes.append(_text(GAP, top + ROW, "no networks", 40))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    body = [
        f'{head} font-family="ui-monospace, Menlo, Consolas, monospace" font-size="12">',
        f"<title>{_escaped('networks of ' + topology['tenant'])}</title>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        *lines,
        *boxes,
        "</svg>",
    ]
    return "\n".join(body) + "\n"


def _network(network: Object, left: float, top: float) -> list[str]:
    rows = _rows(network)
    height = HEAD + ROW * len(rows) + PAD
    subnets = "  ".join(each for each in (network["subnet"], network["subnet6"]) if each)
    colour, room = COLOURS["network"], int((BOX - 2 * PAD) / LETTER)
    return [
        f'<rect x="{left}" y="{top}" width="{BOX}" height="{height}" rx="8" fill="#f8fafc" stroke="{colour}"/>',
        f'<rect x="{left}" y="{top}" width="{BOX}" height="{HEAD - 6}" rx="8" fill="{colour}"/>',
        _text(left + PAD, top + 17, network["name"], room, "#ffffff", "bold"),
        _text(left + PAD, top + 33, subnets, room, "#ccfbf1"),
        *(
            _text(left + PAD + indent, top + HEAD + ROW * number + 13, text, room - int(indent / LETTER), colour)
            for number, (text, indent, colour) in enumerate(rows)
        ),
    ]


def _rows(network: Object) -> list[tuple[str, int, str]]:
    """Return the lines inside of a network: text, indentation, colour."""
    found = []
    for port in network["ports"]:
        state = "" if port["state"] == "running" else f"  [{port['state']}]"
        addresses = "  ".join(each for each in (port["address"], port["address6"]) if each)
        found.append((f"{port['instance']}{state}", 0, "#0f172a"))
        found.append((addresses, 14, "#475569"))
        found += [(f"policy {policy_text(each)}", 14, "#b45309") for each in port["policies"]]
        found += [(f"published {each}", 14, COLOURS["outside"]) for each in port["published"]]
    for each in network["endpoints"]:
        found.append((f"endpoint {each['name']}  {each['address']}", 0, COLOURS["peer"]))
        found.append((f"→ {each['leads_to']}", 14, COLOURS["peer"]))
    return found


def _pill(left: float, top: float, kind: str, text: str, width: float) -> list[str]:
    colour = COLOURS[kind]
    return [
        f'<rect x="{left:g}" y="{top}" width="{width:g}" height="34" rx="17" fill="{colour}"/>',
        _text(left + 14, top + 21, text, int((width - 28) / LETTER), "#ffffff"),
    ]


def _line(x: float, y: float, to_x: float, to_y: float, kind: str) -> str:
    middle = (y + to_y) / 2
    path = f"M{x:g} {y:g} C{x:g} {middle:g} {to_x:g} {middle:g} {to_x:g} {to_y:g}"
    return f'<path d="{path}" fill="none" stroke="{COLOURS[kind]}" stroke-width="1.5"/>'


def _text(left: float, top: float, text: str, room: int, colour: str = "#0f172a", weight: str = "normal") -> str:
    """Return text of at most `room` letters; the whole of it is shown when the pointer is over it."""
    whole = clean(text)
    shown = whole if len(whole) <= room else whole[: max(room - 1, 0)] + "…"
    title = f"<title>{_escaped(whole)}</title>" if shown != whole else ""
    start = f'<text x="{left:g}" y="{top:g}" fill="{colour}" font-weight="{weight}">'
    return f"{start}{_escaped(shown)}{title}</text>"


def _escaped(text: str) -> str:
    return escape(clean(text))
