"""Two tenants with one address range on one host: no name, packet or address crosses.

Every negative has a positive control: the same probe, from elsewhere or to elsewhere, succeeds.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from tests.support.cli import Cli
from tests.support.daemon import Daemon
from tests.support.machine import Namespaces
from tests.support.wait import until
from tests.system.conftest import TenantFactory

SERVE = 'mkdir /www && echo "{text}" > /www/index.html && exec httpd -f -p 80 -h /www'
ECHO_PEER = """
import socketserver
class Echo(socketserver.StreamRequestHandler):
    def handle(self):
        self.rfile.readline()
        body = self.client_address[0].encode()
        self.wfile.write(b"HTTP/1.0 200 OK\\r\\nContent-Length: %d\\r\\n\\r\\n%s" % (len(body), body))
class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
with Server(("0.0.0.0", 8000), Echo) as server:
    print("ready", flush=True)
    server.serve_forever()
"""


class Houses(NamedTuple):
    acme: Cli
    globex: Cli


def serve(cli: Cli, name: str, address: str, text: str) -> None:
    cli.ok("run", "-d", "--name", name, "--ip", address, "busybox", "sh", "-c", SERVE.format(text=text))


@pytest.fixture(scope="module")
def houses(tenants: TenantFactory) -> Houses:
    """Both tenants: web at 10.0.0.2, db at 10.0.0.3; only globex has `vault` at 10.0.0.9."""
    houses = Houses(tenants(), tenants())
    for cli, name in zip(houses, Houses._fields, strict=True):
        serve(cli, "web", "10.0.0.2", f"web of {name}")
        serve(cli, "db", "10.0.0.3", f"db of {name}")
    serve(houses.globex, "vault", "10.0.0.9", "vault of globex")
    for cli, name in zip(houses, Houses._fields, strict=True):
        wait_for_page(cli, "web", "db", f"db of {name}")
        wait_for_page(cli, "db", "web", f"web of {name}")
    return houses


def fetch(cli: Cli, source: str, target: str, port: int = 80, seconds: int = 20) -> str | None:
    """The page of `target`, fetched from instance `source`; None if that fails within the time."""
    result = cli.run("exec", source, "timeout", str(seconds), "wget", "-q", "-O", "-", f"http://{target}:{port}/")
    return result.out.strip() if result.status == 0 else None


def is_silent(cli: Cli, source: str, target: str) -> bool:
    """Whether `source` gets nothing from it for a while."""
    return fetch(cli, source, target, seconds=2) is None and not ping(cli, source, target, seconds=2)


def wait_for_page(cli: Cli, source: str, target: str, text: str) -> None:
    """Until `source` gets it from `target`; what keeps it from that is in the error."""

    def gets_it() -> bool:
        result = cli.run("exec", source, "timeout", "5", "wget", "-O", "-", f"http://{target}/")
        assert (result.status, result.out.strip()) == (0, text), (result, cli.run("logs", target), cli.run("ps", "-a"))
        return True

    until(gets_it, f"{source} gets the page of {target}")


def ping(cli: Cli, source: str, target: str, *options: str, seconds: int = 20) -> bool:
    """Whether it answers to one within the time."""
    return cli.run("exec", source, "ping", "-c", "1", "-W", str(seconds), *options, target).status == 0


@pytest.mark.parametrize("house", Houses._fields)
def test_instances_reach_each_other_by_name_and_address(houses: Houses, house: str) -> None:
    cli: Cli = getattr(houses, house)
    for target in ("db", "10.0.0.3", f"db.{cli.tenant}.internal"):
        assert ping(cli, "web", target)
        assert fetch(cli, "web", target) == f"db of {house}"


def test_the_same_address_is_each_tenants_own(houses: Houses) -> None:
    assert fetch(houses.acme, "db", "10.0.0.2") == "web of acme"
    assert fetch(houses.globex, "db", "10.0.0.2") == "web of globex"


def test_an_address_of_the_other_tenant_alone_does_not_answer(houses: Houses) -> None:
    assert fetch(houses.globex, "web", "10.0.0.9") == "vault of globex"
    assert ping(houses.globex, "web", "10.0.0.9")
    assert is_silent(houses.acme, "web", "10.0.0.9")


def test_names_do_not_cross(houses: Houses) -> None:
    assert fetch(houses.globex, "web", "vault") == "vault of globex"
    assert is_silent(houses.acme, "web", "vault")
    foreign = f"vault.{houses.globex.tenant}.internal"
    assert houses.globex.run("exec", "web", "nslookup", "-type=a", foreign).status == 0
    assert houses.acme.run("exec", "web", "nslookup", "-type=a", foreign).status != 0


def test_another_subnet_of_another_tenant_is_out_of_reach(houses: Houses, tenants: TenantFactory) -> None:
    other = tenants(subnet="10.77.0.0/24")
    serve(other, "far", "10.77.0.2", "far")
    other.ok("run", "-d", "--name", "near", "busybox", "sleep", "600")
    wait_for_page(other, "near", "far", "far")
    assert is_silent(houses.acme, "web", "10.77.0.2")


def test_networks_of_one_tenant_are_apart(houses: Houses) -> None:
    """Until a router joins them."""
    acme = houses.acme
    acme.ok("network", "create", "back", "--subnet", "10.0.1.0/24")
    acme.ok("run", "-d", "--name", "behind", "--network", "back", "busybox", "sleep", "600")
    assert ping(acme, "behind", "10.0.1.1")
    assert fetch(acme, "web", "10.0.0.3") == "db of acme"
    assert is_silent(acme, "behind", "10.0.0.3")
    acme.ok("rm", "-f", "behind")


@pytest.fixture(scope="module")
def outside(daemon: Daemon) -> Iterator[str]:
    """A server outside of the host that says from which address it was asked."""
    command = Namespaces.wrap(daemon.namespaces.outside, sys.executable, "-c", ECHO_PEER)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        yield Namespaces.OUTSIDE
        server.kill()


def test_the_outside_sees_the_host_only(houses: Houses, outside: str) -> None:
    for cli in houses:
        assert fetch(cli, "web", outside, 8000) == "198.18.0.2"


def test_the_outside_cannot_come_in(houses: Houses, daemon: Daemon, outside: str) -> None:
    """Although everybody on the way knows the route; without the rules of host and tenant it would."""
    namespaces, web = daemon.namespaces, "10.0.0.2"
    tenant = f"/run/netns/{daemon.prefix}-{houses.acme.tenant}"
    device, gateway = uplink(daemon, tenant)
    namespaces.ip(namespaces.outside, "route replace 10.0.0.0/24 via 198.18.0.2")
    namespaces.ip(namespaces.host, f"route replace 10.0.0.0/24 via {gateway} dev {device}")
    ping_web = namespaces.wrap(namespaces.outside, "busybox", "ping", "-c1", "-W1", web)
    barriers = [(namespaces.host, "to_tenant"), (tenant, "forward")]
    try:
        assert subprocess.run(ping_web, capture_output=True).returncode != 0
        handles = [open_chain(daemon, where, chain) for where, chain in barriers]
        try:
            until(lambda: subprocess.run(ping_web, capture_output=True).returncode == 0, "the control: the path exists")
        finally:
            for (where, chain), handle in zip(barriers, handles, strict=True):
                nft(daemon, where, "delete", "rule", "inet", daemon.prefix, chain, "handle", handle)
        assert subprocess.run(ping_web, capture_output=True).returncode != 0
    finally:
        namespaces.ip(namespaces.outside, "route delete 10.0.0.0/24")
        namespaces.ip(namespaces.host, "route delete 10.0.0.0/24")


def nft(daemon: Daemon, where: str, *words: str) -> str:
    command = daemon.namespaces.wrap(where, "nft", *words)
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def open_chain(daemon: Daemon, where: str, chain: str) -> str:
    """Let everything pass a chain; the handle of the rule that does."""
    said = nft(daemon, where, "--echo", "--handle", "insert", "rule", "inet", daemon.prefix, chain, "accept")
    return said.rpartition("# handle ")[2].strip()


def uplink(daemon: Daemon, tenant: str) -> tuple[str, str]:
    """(the host's device, the tenant's address) of a tenant's uplink."""
    shown = subprocess.run(
        daemon.namespaces.wrap(tenant, "ip", "-4", "-o", "address", "show", "uplink"), capture_output=True, text=True
    ).stdout
    address = shown.split("inet ")[1].split("/")[0]
    host = ".".join([*address.split(".")[:3], str(int(address.split(".")[3]) - 1)])
    listed = subprocess.run(
        daemon.namespaces.wrap(daemon.namespaces.host, "ip", "-4", "-o", "address"), capture_output=True, text=True
    ).stdout
    return next(line.split()[1] for line in listed.splitlines() if f"inet {host}/" in line), address


def test_a_stolen_address_is_dropped(houses: Houses) -> None:
    """An instance with CAP_NET_ADMIN over its own namespace takes another address, and then another MAC."""
    acme = houses.acme
    rights = "--cap-add", "NET_ADMIN", "--socket-family", "packet"  # busybox changes a MAC address by such a socket
    acme.ok("run", "-d", "--name", "thief", *rights, "busybox", "sleep", "600")
    assert ping(acme, "thief", "10.0.0.2")
    acme.ok("exec", "thief", "ip", "address", "add", "10.0.0.66/24", "dev", "eth0")
    assert not ping(acme, "thief", "10.0.0.2", "-I", "10.0.0.66", seconds=2)
    acme.ok("exec", "thief", "ip", "link", "set", "eth0", "address", "02:00:00:00:66:66")
    assert not ping(acme, "thief", "10.0.0.2", seconds=2)
    assert ping(acme, "db", "10.0.0.2")
    acme.ok("rm", "-f", "thief")


def test_verify_proves_it(houses: Houses, daemon: Daemon) -> None:
    report = daemon.cli.json("verify")
    assert report["passed"], report
    assert report["drift"] == []
    cells = {(cell["source"], cell["target"]): cell for cell in report["matrix"]}
    acme, globex = houses.acme.tenant, houses.globex.tenant
    inside = cells[f"{acme}/web", f"{acme}/db"]
    across = cells[f"{acme}/web", f"{globex}/vault"]
    assert (inside["expected"], inside["installed"], inside["probed"]) == (True, True, True)
    assert (across["expected"], across["installed"], across["probed"]) == (False, False, False)
    assert across["control"]


def test_verify_includes_instances_that_are_paused(houses: Houses, daemon: Daemon) -> None:
    houses.globex.ok("pause", "vault")
    report = daemon.cli.json("verify")
    houses.globex.ok("unpause", "vault")
    assert report["passed"], report
    cells = {(cell["source"], cell["target"]): cell for cell in report["matrix"]}
    globex = houses.globex.tenant
    assert cells[f"{globex}/web", f"{globex}/vault"]["probed"] is True
    assert cells[f"{houses.acme.tenant}/web", f"{globex}/vault"]["probed"] is False


def test_verify_sees_a_broken_network(houses: Houses, daemon: Daemon) -> None:
    """Somebody takes the device of an instance down behind Insula's back."""
    cli = houses.globex
    device = cli.json("explain", "vault")["installed"][0]["device"]
    namespace = f"/run/netns/{daemon.prefix}-{cli.tenant}"
    daemon.namespaces.ip(namespace, f"link set {device} down")
    result = daemon.cli.run("--json", "verify")
    daemon.namespaces.ip(namespace, f"link set {device} up")
    assert result.status == 1, result
    assert until(lambda: daemon.cli.run("verify").status == 0, "verify passes again")
