"""The part of `insula demo` about networks: a router, policies, a published port, floors.

Every claim is checked by what instances see, and each refusal has a positive control.
"""

from __future__ import annotations

import socket
import time
import urllib.error
import urllib.request
from contextlib import closing
from typing import TYPE_CHECKING

from insula.cli.tour import Tour
from insula.model.rules import MAX_CPUS

if TYPE_CHECKING:
    from collections.abc import Callable

    from insula.client import Client

TENANT = "acme"
STORE = "10.1.0.2"
SERVE = "mkdir /www; echo {text} > /www/index.html; exec httpd -f -h /www"
_SOON = 20.0
_ENDS = 5.0


def router(tour: Tour, _: Client) -> None:
    tour.step("Two networks of one tenant", "They are apart, until a router joins them.")
    tour.run("-T", TENANT, "network", "create", "back", "--subnet", "10.1.0.0/24")
    words = ("--network", "back", "--ip", STORE, "--label", "app=store", "busybox", "sh", "-c")
    tour.run("-T", TENANT, "run", "-d", "--name", "store", *words, SERVE.format(text="the store"))
    apart = tour.run("-T", TENANT, "exec", "web", "ping", "-c", "1", "-W", "1", STORE)
    tour.check(not apart.ok, "web does not reach the store")
    tour.run("-T", TENANT, "router", "create", "between", "--network", "default", "--network", "back")
    joined = tour.run("-T", TENANT, "exec", "web", "ping", "-c", "1", "-W", "5", STORE)
    tour.check(joined.ok, "through the router it does")


def policy(tour: Tour, _: Client) -> None:
    tour.step("A policy", "From now on the store answers web only, on port 80. Open connections obey as well.")
    _until(lambda: _fetches(tour, "db", quiet=True))
    tour.check(_fetches(tour, "db"), "before it, db fetches the store's page (the positive control)")
    rule = ("--in", "--allow", "from:10.0.0.2/32 tcp/80")
    tour.run("-T", TENANT, "policy", "create", "store", "--select", "app=store", *rule)
    _until(lambda: _fetches(tour, "web", quiet=True))
    tour.check(_fetches(tour, "web"), "web fetches the store's page")
    tour.check(not _fetches(tour, "db"), "db does not")
    pinged = tour.run("-T", TENANT, "exec", "web", "ping", "-c", "1", "-W", "1", STORE)
    tour.check(not pinged.ok, "and web has no other port: its ping is refused")
    traced = tour.run("-T", TENANT, "trace", "db", "store", "tcp/80")
    tour.check(traced.status == 1 and "policy" in traced.text, "trace tells which policy that is")


def names(tour: Tour, _: Client) -> None:
    tour.step("A policy with a name", "db may speak to api.example.com, and asks for no other name outside.")
    rule = ("--out", "--allow", "to:api.example.com tcp/443")
    tour.run("-T", TENANT, "update", "db", "--label", "role=job")
    tour.run("-T", TENANT, "policy", "create", "jobs", "--select", "role=job", *rule)
    _until(lambda: _resolves(tour, "web", quiet=True))
    tour.check(_resolves(tour, "web"), "names of its own tenant are answered (the positive control)")
    other = tour.run("-T", TENANT, "exec", "db", "nslookup", "evil.example.net")
    tour.check("NXDOMAIN" in other.text, "other names are not: the query never leaves the host")
    traced = tour.run("-T", TENANT, "trace", "db", "outside", "tcp/443")
    tour.check(traced.status == 1 and "jobs" in traced.text, "and addresses that no allowed name has are closed")
    tour.run("-T", TENANT, "policy", "rm", "jobs")


def published(tour: Tour, _: Client) -> None:
    port = _free_port()
    tour.step("A published port", f"Port {port} of this host, on 127.0.0.1, leads to port 80 of an instance.")
    words = ("-p", f"127.0.0.1:{port}:80", "busybox", "sh", "-c", SERVE.format(text="the shop"))
    tour.run("-T", TENANT, "run", "-d", "--name", "shop", *words)
    _until(lambda: _page(port) == "the shop")
    tour.check(_page(port) == "the shop", f"http://127.0.0.1:{port}/ is the shop's page")
    tour.run("-T", TENANT, "rm", "-f", "shop")
    tour.check(_page(port) is None, "when the instance is gone, nothing answers there")


def floor(tour: Tour, client: Client) -> None:
    tour.step("Floors and ceilings", "What a tenant has however busy its neighbours are, and what it has at most.")
    tour.run("-T", TENANT, "guarantee", "set", "--cpu", "0.1", "--ceil-out", "50mbit")
    shown = tour.run("-T", TENANT, "guarantee", "show")
    held = client.guarantees.get(TENANT)
    right = shown.ok and (held["cpus"], held["ceiling_out"]) == (0.1, 50_000_000)
    tour.check(right, f"{TENANT} always gets a tenth of a CPU, and sends 50 Mbit/s at most")
    refused = tour.run("-T", TENANT, "guarantee", "set", "--cpu", str(MAX_CPUS))
    tour.check("is left" in refused.text, "a floor that the host does not have is refused, with what is left")


def _fetches(tour: Tour, source: str, *, quiet: bool = False) -> bool:
    """Whether an instance gets the store's page."""
    words = ("exec", source, "timeout", "3", "wget", "-q", "-O", "-", f"http://{STORE}/")
    return tour.run("-T", TENANT, *words, quiet=quiet).text == "the store"


def _resolves(tour: Tour, name: str, *, quiet: bool = False) -> bool:
    """Whether db resolves a name."""
    asked = tour.run("-T", TENANT, "exec", "db", "timeout", "3", "nslookup", name, quiet=quiet)
    return "10.0.0.2" in asked.text


def _page(port: int) -> str | None:
    """The page that the host serves at this port; None if nothing answers."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=_ENDS) as answer:
            return str(answer.read(100).decode().strip())
    except (OSError, urllib.error.URLError):
        return None


def _free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        return int(server.getsockname()[1])


def _until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _SOON
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.1)
