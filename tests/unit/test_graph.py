"""Drawings of a tenant's networks: as text, and as SVG. Names are hostile input."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from insula.cli.graph import svg, text
from insula.cli.graph.topology import collect
from insula.model.errors import Denied

SVG = "{http://www.w3.org/2000/svg}"
EVIL = (
    "<script>alert(1)</script>",
    "\x1b]0;title\x07",
    "a\nb",
    "\u202eoriginal",
    '" onload="x',
    "&amp;",
    "\udcff",
    "\0",
)


def policy(name: str, *directions: str, audit: bool = False) -> dict[str, Any]:
    return {"name": name, "directions": [*directions], "audit": audit}


def port(instance: str, address: str, **other: Any) -> dict[str, Any]:
    base: dict[str, Any] = {"interface": "eth0", "address6": None, "state": "running", "policies": [], "published": []}
    return {"instance": instance, "address": address, **base, **other}


def network(name: str, subnet: str, *ports: dict[str, Any], **other: Any) -> dict[str, Any]:
    base: dict[str, Any] = {"subnet6": None, "outbound": "nat", "router": None, "endpoints": [], "peers": []}
    return {"name": name, "subnet": subnet, "ports": [*ports], **base, **other}


TOPOLOGY: dict[str, Any] = {
    "tenant": "acme",
    "routers": [
        {
            "name": "core",
            "networks": ["front", "back"],
            "routes": [{"destination": "172.16.0.0/12", "next_hop": "10.1.0.9"}],
        }
    ],
    "networks": [
        network(
            "back",
            "10.1.0.0/24",
            port("db", "10.1.0.2", policies=[policy("db", "in"), policy("all", "in", "out", audit=True)]),
            router="core",
            outbound="none",
            peers=[{"peer": "globex", "name": "peering", "state": "active", "networks": ["lab"]}],
        ),
        network(
            "front",
            "10.0.0.0/24",
            port("web", "10.0.0.2", address6="fd00::2", published=["*:8080/tcp → 80"]),
            port("worker-1", "10.0.0.12", state="exited"),
            router="core",
            subnet6="fd00::/64",
            endpoints=[{"name": "logs", "address": "10.0.0.40", "leads_to": "globex/logs tcp/514"}],
        ),
        network("alone", "10.2.0.0/24"),
    ],
    "policies": [],
}
DRAWN = """\
acme
├─ router core
│  ├─ route 172.16.0.0/12 → 10.1.0.9
│  ├─ network back  10.1.0.0/24  no way out
│  │  ├─ db  10.1.0.2    policies db (in), all (in,out, audit)
│  │  └─ peer globex (active): lab
│  └─ network front  10.0.0.0/24  fd00::/64  → outside
│     ├─ web       10.0.0.2   fd00::2
│     │  └─ published *:8080/tcp → 80
│     ├─ worker-1  10.0.0.12           [exited]
│     └─ endpoint logs  10.0.0.40 → globex/logs tcp/514
└─ network alone  10.2.0.0/24  → outside"""


def test_the_tree() -> None:
    assert "\n".join(text.draw(TOPOLOGY, 100)) == DRAWN
    assert text.draw({**TOPOLOGY, "routers": [], "networks": []}, 100) == ["acme", "└─ no networks"]


def test_in_ascii() -> None:
    lines = text.draw(TOPOLOGY, 100, unicode=False)
    assert all(line.isascii() for line in lines)
    assert lines[:3] == ["acme", "|- router core", "|  |- route 172.16.0.0/12 -> 10.1.0.9"]


@pytest.mark.parametrize("unicode", [True, False])
@given(width=st.integers(4, 90))
def test_no_line_is_wider_than_asked_for(unicode: bool, width: int) -> None:
    lines = text.draw(TOPOLOGY, width, unicode=unicode)
    assert max(map(len, lines)) <= width
    assert len(lines) == len(DRAWN.splitlines())
    assert width > 40 or any(line.endswith("…" if unicode else "...") for line in lines)


def everywhere(name: str) -> dict[str, Any]:
    """A topology with a name at all places where there is one."""
    return {
        "tenant": name,
        "routers": [{"name": name, "networks": [name], "routes": [{"destination": name, "next_hop": name}]}],
        "networks": [
            network(
                name,
                name,
                port(name, name, address6=name, state=name, policies=[policy(name, name)], published=[name]),
                subnet6=name,
                router=name,
                endpoints=[{"name": name, "address": name, "leads_to": name}],
                peers=[{"peer": name, "name": name, "state": name, "networks": [name]}],
            )
        ],
        "policies": [],
    }


@given(st.one_of(st.sampled_from(EVIL), st.text(max_size=60)))
def test_names_are_text_and_nothing_else(name: str) -> None:
    for unicode in (True, False):
        assert all(line.isprintable() for line in text.draw(everywhere(name), 200, unicode=unicode))
    root = ElementTree.fromstring(svg.draw(everywhere(name)))
    assert {element.tag for element in root.iter()} <= {
        f"{SVG}{tag}" for tag in ("svg", "title", "rect", "path", "text")
    }
    assert not [a for element in root.iter() for a in element.attrib if a.startswith("on") or "href" in a]


def test_the_file_is_whole_and_needs_nothing_else() -> None:
    drawn = svg.draw(TOPOLOGY)
    root = ElementTree.fromstring(drawn)
    assert not re.search(r"(?:href|url\(|@import|<style|<script|<image|<foreignObject)", drawn)
    shown = ["".join(each.itertext()) for each in root.iter(f"{SVG}text")]
    for wanted in ("the outside", "router core", "front", "back", "alone", "web", "db", "peer globex (active): lab"):
        assert wanted in shown, wanted
    assert "policy all (in,out, audit)" in shown and "endpoint logs  10.0.0.40" in shown
    width, height = (float(root.attrib[name]) for name in ("width", "height"))
    boxes = [
        tuple(float(each.attrib.get(name, 0)) for name in ("x", "y", "width", "height"))
        for each in root.iter(f"{SVG}rect")
    ]
    assert all(x >= 0 and y >= 0 and x + w <= width and y + h <= height for x, y, w, h in boxes)
    lines = [each.attrib["d"] for each in root.iter(f"{SVG}path")]
    assert len(lines) == 2 + 2 + 1, "two networks of the router, two with a way out, one peer"


def test_networks_do_not_overlap_and_long_names_are_cut() -> None:
    many = [network(f"n{number}", f"10.{number}.0.0/24", port("x" * 63, f"10.{number}.0.2")) for number in range(20)]
    root = ElementTree.fromstring(svg.draw({"tenant": "acme", "routers": [], "networks": many, "policies": []}))
    places = sorted(float(each.attrib["x"]) for each in root.iter(f"{SVG}rect") if each.attrib.get("stroke"))
    assert all(other - one >= svg.BOX for one, other in pairwise(places)) and len(places) == 20
    cut = [each for each in root.iter(f"{SVG}text") if each.find(f"{SVG}title") is not None]
    assert len(cut) == 20 and cut[0].text and len(cut[0].text) * svg.LETTER <= svg.BOX


class _Lists:
    def __init__(self, found: object) -> None:
        self._found = found

    def list(self, _: str) -> object:
        if isinstance(self._found, Exception):
            raise self._found
        return self._found


def test_what_may_not_be_read_is_left_out() -> None:
    class Reader:
        networks = _Lists(
            [{"network": {"name": "a", "subnet": "10.0.0.0/24", "gateway": "10.0.0.1", "outbound": "nat"}}]
        )
        routers = instances = policies = endpoints = peerings = _Lists(Denied("no", "ask"))

    found = collect(Reader(), "acme")  # type: ignore[arg-type]
    assert [each["name"] for each in found["networks"]] == ["a"] and found["networks"][0]["ports"] == []
    assert "network a" in "\n".join(text.draw(found, 80))
