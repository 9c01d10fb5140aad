"""Load balancers by the command line: shares, health, affinity, policies, hairpin, over kill -9 of insulad."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Callable
from typing import Any

from tests.support.cli import Cli
from tests.support.daemon import Daemon
from tests.support.wait import until
from tests.system.network_outside.test_commands import HOST, HOST6, dial, page
from tests.system.network_outside.test_floating_commands import allocate

SERVE = r"""mkdir -p /www/cgi-bin; touch /www/health
printf '#!/bin/sh\nprintf "Content-Type: text/plain\\r\\n\\r\\n$(hostname) $REMOTE_ADDR\\n"\n' > /www/cgi-bin/who
chmod +x /www/cgi-bin/who; exec httpd -f -p 80 -h /www"""
"""It serves its name with the client's address, and /health."""
FAST = ("--interval", "1s", "--timeout", "1s")


def serve(cli: Cli, name: str, *options: str) -> None:
    cli.ok("run", "-d", "--name", name, "-l", "app=shop", *options, "busybox", "sh", "-c", SERVE)


def states(cli: Cli, name: str = "shop") -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for each in cli.json("lb", "show", name)["backends"]:
        found.setdefault(each["instance"], set()).add(each["state"])
    return found


def becomes(cli: Cli, wanted: dict[str, str], name: str = "shop") -> None:
    expected = {instance: {state} for instance, state in wanted.items()}

    def same() -> bool:
        found = states(cli, name)
        assert found == expected, found
        return True

    until(same, f"the backends are {wanted}", 30.0)


def asked(namespace: str, address: str, port: int = 80) -> list[str]:
    """Who answers, and the client's address that it sees."""
    return plain(page(namespace, address, port, 2.0, "/cgi-bin/who")).split()


def refuses(namespace: str, address: str, port: int = 80) -> bool:
    """Whether a connection is refused. One that was begun before that may wait for a backend which has gone since."""
    try:
        dial(namespace, address, port).close()
    except (ConnectionRefusedError, TimeoutError) as error:
        return isinstance(error, ConnectionRefusedError)
    return False


def shares(namespace: str, address: str, count: int = 30, port: int = 80) -> Counter[str]:
    return Counter((asked(namespace, address, port) or ["nobody"])[0] for _ in range(count))


def inside(cli: Cli, instance: str, address: str) -> str:
    """Who answers an instance, and the address that it sees."""
    ask = f"printf 'GET /cgi-bin/who HTTP/1.0\\r\\n\\r\\n' | nc -w 3 {address} 80"
    return plain(cli.run("exec", instance, "sh", "-c", ask).out.rpartition("\n\r\n")[2].strip())


def sees(ask: Callable[[], list[str]], address: str) -> None:
    """The client's address is kept. An answer may take longer than `ask` waits, but none has another address."""
    _, seen = until(ask, "an answer")
    assert seen == address


def plain(text: str) -> str:
    """Without the brackets that busybox's httpd writes around IPv6 addresses, and IPv4 ones in them."""
    return text.replace("::ffff:", "").replace("[", "").replace("]", "")


def test_connections_are_spread_over_healthy_backends(host: Daemon, acme: Cli) -> None:
    for name in ("b1", "b2", "b3"):
        serve(acme, name)
    acme.ok("run", "-d", "--name", "client", "busybox", "sleep", "1000")
    _, four = allocate(acme, "four")
    _, six = allocate(acme, "six", "--family", "ipv6")
    said = acme.ok(
        *("lb", "create", "shop", "--listen", "tcp/80", "--on", "four", "--on", "six", "--on", "network:default"),
        *("--backend", "app=shop", "--health", "http", "--health-path", "/health", *FAST),
    )
    vip, vip6 = said.split()[3:]
    becomes(acme, dict.fromkeys(("b1", "b2", "b3"), "healthy"))
    outside, client = host.namespaces.outside, acme.json("inspect", "client")[0]["instance"]["ports"][0]
    for address, own in ((four, "198.18.0.1"), (six, "2001:2:0:ffff::1")):
        until(lambda address=address: set(shares(outside, address)) == {"b1", "b2", "b3"}, address)  # type: ignore[misc]
        sees(lambda address=address: asked(outside, address), own)  # type: ignore[misc]
    for address, own in ((vip, client["address"]), (vip6, client["address6"])):
        sees(lambda address=address: inside(acme, "client", address).split(), own)  # type: ignore[misc]
        until(lambda address=address: inside(acme, "b1", address), "a backend reaches itself, too")  # type: ignore[misc]
    acme.ok("exec", "b2", "rm", "/www/health")
    becomes(acme, {"b1": "healthy", "b2": "unhealthy", "b3": "healthy"})
    until(lambda: set(shares(outside, four)) == {"b1", "b3"}, "the sick one gets no more")
    reasons = {each["reason"] for each in acme.json("lb", "show", "shop")["backends"] if each["instance"] == "b2"}
    assert reasons == {"it answers with status 404"}
    acme.ok("exec", "b2", "touch", "/www/health")
    becomes(acme, dict.fromkeys(("b1", "b2", "b3"), "healthy"))
    until(lambda: set(shares(outside, four)) == {"b1", "b2", "b3"}, "it is back")
    acme.ok("stop", "-t", "0", "b3")
    becomes(acme, {"b1": "healthy", "b2": "healthy", "b3": "stopped"})
    until(lambda: set(shares(outside, four)) == {"b1", "b2"}, "the stopped one gets none")
    acme.ok("update", "b1", "--unlabel", "app")
    until(lambda: set(shares(outside, four)) == {"b2"}, "it is no backend any more")
    assert "refuses" not in acme.ok("lb", "show", "shop")
    acme.ok("stop", "-t", "0", "b2")
    becomes(acme, {"b2": "stopped", "b3": "stopped"})
    for address in (four, six):
        until(lambda address=address: refuses(outside, address), "refused at once")  # type: ignore[misc]
    shown = acme.ok("lb", "show", "shop")
    assert "refuses    connections over IPv4 and IPv6: no backend of it is healthy" in shown
    row = next(line for line in acme.ok("lb", "ls").splitlines() if line.startswith("shop"))
    assert f"{four}, {six}, {vip}, {vip6}" in row
    acme.ok("lb", "rm", "shop")
    assert shares(outside, four, 3) == {"nobody": 3}
    acme.ok("floating-ip", "release", "four", "six")


def test_a_port_is_of_one_user(host: Daemon, acme: Cli) -> None:
    serve(acme, "web", "-p", "8080:80")
    name, address = allocate(acme, "front")
    lb = ("lb", "create", "shop", "--backend", "web", "--listen")
    assert "is in use by instance web" in acme.fails(*lb, "tcp/8080", "--on", "host:")
    acme.ok(*lb, "tcp/80", "--listen", "tcp/81", "--on", name, "--on", "host:", "--port", "80")
    assert "is in use by load-balancer shop" in acme.fails("update", "web", "--publish", "81:80")
    assert "is in use by load-balancer shop" in acme.fails("update", "web", "--publish", f"{address}:81:80")
    assert "is in use by load-balancer shop" in acme.fails("floating-ip", "attach", name, "web")
    assert "is used by load-balancer shop" in acme.fails("floating-ip", "release", name)
    becomes(acme, {"web": "healthy"})
    for each in (HOST, HOST6, address):
        until(lambda each=each: shares(host.namespaces.outside, each, 2, 81) == {"web": 2}, f"by {each}")  # type: ignore[misc]
    acme.ok("lb", "update", "shop", "--listen", "tcp/80")
    acme.ok("update", "web", "--publish", "81:80", "--publish", f"{address}:81:80")
    acme.ok("lb", "rm", "shop")
    acme.ok("network", "create", "back", "--subnet", "10.1.0.0/24")
    acme.ok("lb", "create", "inner", "--listen", "tcp/80", "--on", "network:back,ip=10.1.0.200", "--backend", "web")
    assert "has the load balancer inner" in acme.fails("network", "rm", "back")
    assert "is taken" in acme.fails("run", "-d", "--network", "back,ip=10.1.0.200", "busybox", status=125)


def test_policies_judge_the_clients_address(host: Daemon, acme: Cli) -> None:
    serve(acme, "web")
    for name in ("friend", "foe"):
        acme.ok("run", "-d", "--name", name, "-l", f"is={name}", "busybox", "sleep", "1000")
    places = ("--on", "host:", "--on", "network:default")
    acme.ok("lb", "create", "shop", "--listen", "tcp/80", *places, "--backend", "web", *FAST)
    becomes(acme, {"web": "healthy"})
    vip = acme.json("lb", "show", "shop")["addresses"][1]
    until(lambda: asked(host.namespaces.outside, HOST)[:1] == ["web"], "it is installed")
    acme.ok("policy", "create", "web", "--select", "app=shop", "--allow", "from:is=friend tcp/80")
    assert asked(host.namespaces.outside, HOST) == [], "not from outside"
    assert inside(acme, "friend", vip).startswith("web")
    assert inside(acme, "foe", vip) == ""
    acme.ok("policy", "update", "web", "--allow", "from:198.18.0.1/32 tcp/80")
    until(lambda: asked(host.namespaces.outside, HOST)[:1] == ["web"], "the range has the client")
    becomes(acme, {"web": "healthy"})  # its checks are no instance's traffic


def test_it_goes_on_while_insulad_is_killed_and_starts_again(host: Daemon, acme: Cli) -> None:
    for name in ("b1", "b2"):
        serve(acme, name)
    acme.ok("lb", "create", "shop", "--listen", "tcp/80", "--on", "host:", "--backend", "app=shop", *FAST)
    becomes(acme, {"b1": "healthy", "b2": "healthy"})
    outside = host.namespaces.outside
    until(lambda: set(shares(outside, HOST)) == {"b1", "b2"}, "both get connections")
    host.kill("insulad")
    assert set(shares(outside, HOST)) == {"b1", "b2"}
    host.start()
    for _ in range(5):
        assert set(shares(outside, HOST, 20)) == {"b1", "b2"}, "none is out because nobody has checked it yet"
    becomes(acme, {"b1": "healthy", "b2": "healthy"})


def test_a_hanging_backend_delays_no_other(host: Daemon, acme: Cli) -> None:
    hang = "while :; do nc -l -p 80 -e sleep 1000; done"
    for number in range(3):
        acme.ok("run", "-d", "--name", f"hang{number}", "-l", "app=shop", "busybox", "sh", "-c", hang)
    endless = "while :; do yes | nc -l -p 80 >/dev/null; done"
    acme.ok("run", "-d", "--name", "loud", "-l", "app=shop", "busybox", "sh", "-c", endless)
    before = host.descriptors("insulad")
    http = ("--health", "http", "--health-path", "/health", *FAST)
    acme.ok("lb", "create", "shop", "--listen", "tcp/80", "--on", "network:default", "--backend", "app=shop", *http)
    serve(acme, "web")
    sick = {"hang0": "unhealthy", "hang1": "unhealthy", "hang2": "unhealthy", "loud": "unhealthy"}
    becomes(acme, {**sick, "web": "healthy"})
    assert host.descriptors("insulad") < before + 60


def test_explain_names_all_that_leads_to_an_instance_and_usage_has_its_bytes(
    host: Daemon, acme: Cli, globex: Cli
) -> None:
    size = 1 << 20
    page_ = f"mkdir /www && dd if=/dev/zero of=/www/big bs=1024 count={size >> 10} && exec httpd -f -p 80 -h /www"
    acme.ok("run", "-d", "--name", "web", "-p", "8080:80", "busybox", "sh", "-c", page_)
    _, front = allocate(acme, "front", "--attach", "web")
    acme.ok("lb", "create", "shop", "--listen", "tcp/81", "--on", "host:", "--backend", "web", "--port", "80", *FAST)
    becomes(acme, {"web": "healthy"})
    target = acme.json("inspect", "web")[0]["instance"]["ports"][0]["address"]
    entrances = [
        "published port 8080:80/tcp",
        f"floating address front: {front} to {target}",
        "load balancer shop: tcp/81 of the host to port 80",
    ]
    assert acme.json("explain", "web")["entrances"] == entrances
    shown = acme.ok("explain", "web")
    assert all(f"reached by             {each}" in shown for each in entrances)

    def sent(cli: Cli) -> int:
        return int(cli.json("usage")["used"]["sent"])

    def read(address: str, port: int) -> bool:
        return len(raw(host.namespaces.outside, address, port, "/big")) >= size

    for address, port in ((HOST, 8080), (front, 80), (HOST, 81), (HOST6, 81)):
        until(lambda address=address, port=port: read(address, port), f"{address}:{port} serves it")  # type: ignore[misc]
        before, others = sent(acme), sent(globex)
        assert read(address, port)
        until(lambda before=before: sent(acme) >= before + size, f"bytes by {address}:{port} are the tenant's")  # type: ignore[misc]
        assert sent(acme) < before + 2 * size, "once"
        assert sent(globex) == others


def raw(namespace: str, address: str, port: int, path: str) -> bytes:
    answer = b""
    with contextlib.suppress(OSError), dial(namespace, address, port) as sock:
        sock.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
        while more := sock.recv(1 << 16):
            answer += more
    return answer


def test_bad_input_changes_nothing(host: Daemon, acme: Cli) -> None:
    lb = ("lb", "create", "shop", "--backend", "x")
    good = ("--listen", "tcp/80", "--on", "network:default")
    for words, text in (
        (("--listen", "tcp/80"), "needs --listen and --on"),
        (("--listen", "80", "--on", "host:"), "is no port to listen on"),
        (("--listen", "tcp/0", "--on", "host:"), "is no port"),
        (("--listen", "tcp/70000", "--on", "host:"), "is no port"),
        (("--listen", "tcp/80", "--on", "nowhere"), "has no floating address nowhere"),
        (("--listen", "tcp/80", "--on", "network:nowhere"), "has no network nowhere"),
        (("--listen", "tcp/80", "--on", "network:default,ip=10.9.9.9"), "is outside subnet"),
        (("--listen", "tcp/80", "--on", "network:default,x=1"), "is no option of an address"),
        (("--listen", "tcp/80", "--on", "host:192.0.2.9"), "no address of this host"),
        (("--listen", "tcp/80", "--listen", "tcp/80", "--on", "host:"), "is given twice"),
        (("--listen", "tcp/80", "--on", "host:", "--on", f"host:{HOST}"), "is given twice"),
        ((*good, "--health-path", "a b"), "is no path of a check"),
        ((*good, "--health-path", "/\r\nX: y"), "is no path of a check"),
        ((*good, "--interval", "1ms"), "interval"),
        ((*good, "--threshold", "99"), "threshold"),
        ((*good, "--affinity", "cookie"), "cookie"),
    ):
        result = acme.run(*lb, *words)
        assert result.status != 0 and text in result.err, (words, result)
    assert acme.json("lb", "ls") == []
    assert "has no load balancer" in acme.fails("lb", "rm", "shop")


def test_files_declare_it(host: Daemon, acme: Cli) -> None:
    serve(acme, "web")
    shop: dict[str, Any] = {
        "apiVersion": "insula/v1",
        "kind": "LoadBalancer",
        "metadata": {"name": "shop"},
        "spec": {"listen": [{"port": 80}], "on": [{"network": "default"}], "select": {"labels": {"app": "shop"}}},
    }
    acme.ok("apply", "-f", "-", stdin=json.dumps(shop))
    vip = acme.json("lb", "show", "shop")["addresses"][0]
    assert "unchanged" in acme.ok("apply", "-f", "-", stdin=json.dumps(shop))
    shop["spec"]["affinity"] = "source"
    acme.ok("apply", "-f", "-", stdin=json.dumps(shop))
    now = acme.json("lb", "show", "shop")
    assert now["affinity"] == "source" and now["addresses"][0] == vip
    assert "kind: LoadBalancer" in acme.ok("dump")
