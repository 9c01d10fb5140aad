"""Floating addresses by the command line: seen from outside, moved, released, by two tenants, over kill -9."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

from tests.support.cli import Cli
from tests.support.daemon import Daemon
from tests.support.wait import until
from tests.system.network_outside.test_commands import HOST, SERVE, gets, page, serve

FIRST, FIRST6 = "198.18.0.65", "2001:2:0:ffff::101"


def allocate(cli: Cli, *words: str) -> tuple[str, str]:
    """Allocates one; returns its name and address."""
    name, address = cli.ok("floating-ip", "allocate", *words).split()
    return name, address


def test_it_leads_to_an_instance_with_all_ports_and_moves(host: Daemon, acme: Cli) -> None:
    serve(acme, "web")
    serve(acme, "other")
    outside = host.namespaces.outside
    assert allocate(acme) == ("ip1", FIRST)
    assert allocate(acme, "six", "--family", "ipv6", "--attach", "web") == ("six", FIRST6)
    assert page(outside, FIRST, 80, 0.5) == ""
    acme.ok("floating-ip", "attach", "ip1", "web")
    gets(outside, FIRST, 80, "web-acme")
    gets(outside, FIRST6, 80, "web-acme")
    web = acme.json("inspect", "web")[0]["instance"]["ports"][0]
    rows = {each["floating_ip"]["name"]: each for each in acme.json("floating-ip", "ls")}
    assert [rows["ip1"][each] for each in ("instance", "target", "reason")] == ["web", web["address"], None]
    assert rows["six"]["target"] == web["address6"]
    assert f"target     {web['address']}" in acme.ok("floating-ip", "show", "ip1")
    assert "has the floating address ip1 already" in acme.fails("floating-ip", "allocate", "--attach", "web")
    acme.ok("floating-ip", "attach", "ip1", "other:default")
    gets(outside, FIRST, 80, "other-acme")
    acme.ok("floating-ip", "detach", "ip1")
    assert page(outside, FIRST, 80, 0.5) == ""
    acme.ok("floating-ip", "release", "ip1", "six")
    assert page(outside, FIRST6, 80, 0.5) == ""
    assert acme.json("floating-ip", "ls") == []


def test_an_instance_that_is_removed_is_detached(host: Daemon, acme: Cli) -> None:
    serve(acme, "web")
    _, address = allocate(acme, "front", "--attach", "web")
    gets(host.namespaces.outside, address, 80, "web-acme")
    acme.ok("rename", "web", "shop")
    assert acme.json("floating-ip", "show", "front")["instance"] == "shop"
    acme.ok("rm", "-f", "shop")
    view = acme.json("floating-ip", "show", "front")
    assert view["floating_ip"]["instance"] is None and view["target"] is None
    serve(acme, "web", "-p", f"{address}:8080:80")  # its ports are free again
    gets(host.namespaces.outside, address, 8080, "web-acme")
    assert page(host.namespaces.outside, address, 80, 0.5) == ""
    said = acme.fails("floating-ip", "release", "front")
    assert "is used by instance web" in said
    assert "is in use by instance web" in acme.fails("floating-ip", "attach", "front", "web")
    acme.ok("update", "web", "--unpublish", f"{address}:8080:80")
    acme.ok("floating-ip", "attach", "front", "web")
    assert "is in use by floating-ip front" in acme.fails("update", "web", "--publish", f"{address}:8080:80")


def test_an_address_belongs_to_one_tenant(host: Daemon, acme: Cli, globex: Cli) -> None:
    serve(acme, "web")
    serve(globex, "web")
    _, address = allocate(acme, "front", "--attach", "web")
    assert f"address {address} is taken" in globex.fails("floating-ip", "allocate", "--address", address)
    said = globex.fails("update", "web", "--publish", f"{address}:8080:80")
    assert "no floating one of tenant globex" in said and "acme" not in said
    globex.ok("update", "web", "--publish", "8080:80")  # every address of the host: no floating one
    gets(host.namespaces.outside, HOST, 8080, "web-globex")
    gets(host.namespaces.outside, address, 80, "web-acme")
    assert page(host.namespaces.outside, address, 8080, 0.5) == ""
    assert "tenant acme still has instances" in host.cli.fails("tenant", "rm", "acme")
    acme.ok("rm", "-f", "web")
    acme.ok("network", "rm", "default")
    assert "still has floating addresses: front" in host.cli.fails("tenant", "rm", "acme")


def test_many_at_once_get_different_addresses(host: Daemon, acme: Cli, globex: Cli) -> None:
    with ThreadPoolExecutor(6) as pool:
        made = [*pool.map(lambda number: allocate((acme, globex)[number % 2]), range(12))]
    assert len({address for _, address in made}) == 12
    assert sorted(name for name, _ in made) == sorted([f"ip{n}" for n in range(1, 7)] * 2)
    allocate(acme)
    allocate(acme)  # of the 14 usable addresses
    assert "all IPv4 addresses of the pool are in use" in globex.fails("floating-ip", "allocate")
    acme.ok("floating-ip", "release", "ip8")
    allocate(globex)


def test_bad_input_changes_nothing(host: Daemon, acme: Cli) -> None:
    acme.ok("run", "-d", "--name", "alone", "--network", "none", "busybox", "sleep", "1000")
    for words, text in (
        (("allocate", "--address", "198.18.0.2"), "is not in the pool"),
        (("allocate", "--address", "x"), "is no IP address"),
        (("allocate", "--family", "ipv5"), "ipv5"),
        (("allocate", "Bad"), "Bad"),
        (("allocate", "--attach", "nobody"), "has no instance nobody"),
        (("allocate", "--attach", "alone"), "is not on any network"),
        (("allocate", "--attach", "alone:back"), "is not on network back"),
        (("attach", "none", "alone"), "has no floating address none"),
        (("release", "none"), "has no floating address none"),
    ):
        assert text in acme.run("floating-ip", *words).err, words
    assert acme.json("floating-ip", "ls") == []


def test_quotas_of_floating_addresses_and_of_published_ports(host: Daemon, acme: Cli) -> None:
    host.cli.ok("tenant", "update", "acme", "--floating-ips", "1", "--published-ports", "10")
    allocate(acme)
    assert "may have 1 floating addresses and has 1: 0 left" in acme.fails("floating-ip", "allocate")
    serve(acme, "web", "-p", "9000-9007:9000-9007")
    assert "may have 10 published ports and has 8: 2 left" in acme.fails(
        "update", "web", "--publish", "9100-9102:9100-9102"
    )
    acme.ok("update", "web", "--publish", "9100-9101:9100-9101")
    acme.ok("update", "web", "--unpublish", "9000-9007:9000-9007", "--publish", "9102:9102")


def test_files_declare_it(host: Daemon, acme: Cli) -> None:
    serve(acme, "web")
    front = {
        "apiVersion": "insula/v1",
        "kind": "FloatingIp",
        "metadata": {"name": "front"},
        "spec": {"instance": "web"},
    }
    acme.ok("apply", "-f", "-", stdin=json.dumps(front))
    address = acme.json("floating-ip", "show", "front")["floating_ip"]["address"]
    gets(host.namespaces.outside, address, 80, "web-acme")
    assert "unchanged" in acme.ok("apply", "-f", "-", stdin=json.dumps(front))
    acme.ok("apply", "-f", "-", stdin=json.dumps({**front, "spec": {}}))
    assert acme.json("floating-ip", "show", "front")["instance"] is None
    assert "kind: FloatingIp" in acme.ok("dump")


def test_it_outlives_kills_of_insulad(host: Daemon, acme: Cli) -> None:
    serve(acme, "web")
    _, address = allocate(acme, "front", "--attach", "web")
    gets(host.namespaces.outside, address, 80, "web-acme")
    host.kill("insulad")
    gets(host.namespaces.outside, address, 80, "web-acme")
    host.start()
    gets(host.namespaces.outside, address, 80, "web-acme")
    acme.ok("floating-ip", "detach", "front")
    until(lambda: page(host.namespaces.outside, address, 80, 0.5) == "", "it leads nowhere")


def document(kind: str, name: str, labels: dict[str, str] | None = None, **spec: object) -> dict[str, object]:
    metadata = {"name": name, "labels": labels or {}}
    return {"apiVersion": "insula/v1", "kind": kind, "metadata": metadata, "spec": spec}


def files(text: str) -> str:
    """An instance that serves a text, with a floating address, and behind a balancer at port 81 of the host."""
    found = [
        document("Instance", "web", {"app": "shop"}, image="busybox", command=["sh", "-c", SERVE.format(text=text)]),
        document("FloatingIp", "front", instance="web"),
        document(
            *("LoadBalancer", "shop"),
            listen=[{"port": 81}],
            port=80,
            on=[{"address": None}],
            select={"labels": {"app": "shop"}},
            health={"interval": 1, "timeout": 1},
        ),
    ]
    return "\n---\n".join(map(json.dumps, found))


def test_an_apply_that_replaces_an_instance_keeps_its_address_and_its_place_behind_a_balancer(
    host: Daemon, acme: Cli
) -> None:
    """Whether the address was attached by the file or by hand."""

    acme.ok("apply", "-f", "-", stdin=files("one"))
    _, six = allocate(acme, "six", "--family", "ipv6", "--attach", "web")
    front = acme.json("floating-ip", "show", "front")["floating_ip"]["address"]
    before = acme.json("inspect", "web")[0]["instance"]["id"]
    places = [(front, 80), (six, 80), (HOST, 81)]
    for address, port in places:
        gets(host.namespaces.outside, address, port, "one")
    said = acme.ok("apply", "--replace", "-f", "-", stdin=files("two"))
    assert acme.json("inspect", "web")[0]["instance"]["id"] != before, said
    for name in ("front", "six"):
        assert acme.json("floating-ip", "show", name)["instance"] == "web"
    for address, port in places:
        gets(host.namespaces.outside, address, port, "two")
    assert "unchanged" in acme.ok("apply", "-f", "-", stdin=files("two"))
