"""insula demo: the guided tour on live instances. Every claim is checked, every negative has a positive control."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

from insula.cli import demo_machines, demo_networks
from insula.cli.connection import connect
from insula.cli.options import Arguments, Command, Option
from insula.cli.tour import Tour, fields
from insula.client import Client
from insula.model.errors import Conflict, NotFound

if TYPE_CHECKING:
    from typing import Any

HOUSES = ("acme", "globex")
LABEL = {"insula-demo": "tour"}
SUBNET = "10.0.0.0/24"
SERVE = "mkdir /www; echo {text} > /www/index.html; exec httpd -f -h /www"
BOMB = "bomb() { bomb & bomb & exec sleep 600; }; bomb & exec sleep 600"  # a shell that can't fork ends: not PID 1
HOG = "x=0123456789abcdef; while :; do x=$x$x; done"
PIDS, MEMORY = 64, "48m"
NETWORKS = (
    demo_networks.router,
    demo_networks.policy,
    demo_networks.names,
    demo_networks.published,
    demo_networks.floor,
)


def run(arguments: Arguments) -> int:
    client = connect(arguments)
    tour = Tour(client.remote.path)
    clean_up(client)
    try:
        with interruptible():
            for part in (
                tenants,
                instances,
                pids,
                inside,
                same_address,
                nothing_crosses,
                demo_machines.machine,
                *NETWORKS,
                bomb,
                hog,
                files,
                proof,
            ):
                part(tour, client)
            status = tour.summary()
    finally:
        if arguments.keep:
            for house in HOUSES:
                remove_instances(client, house, ("bomb", "hog"))
        else:
            clean_up(client)
    if arguments.keep:
        print("The tenants are still there: `insula -T acme ps`, `insula -T acme exec -it web sh`.")
        print("`insula demo` takes them away again.")
    return status


# -- the tour ------------------------------------------------------------------------------------------------------


def tenants(tour: Tour, _: Client) -> None:
    tour.step("Two tenants who don't trust each other", "Both want the same addresses, and both get them.")
    for house in HOUSES:
        made = tour.run("tenant", "create", house, "--label", "insula-demo=tour")
        made_network = tour.run("-T", house, "network", "create", "default", "--subnet", SUBNET)
        tour.check(made.ok and made_network.ok, f"{house} has a network with {SUBNET}")


def instances(tour: Tour, client: Client) -> None:
    tour.step("The same two instances in each", "They serve a page that says whose they are.")
    for house in HOUSES:
        for name, address in (("web", "10.0.0.2"), ("db", "10.0.0.3")):
            script = SERVE.format(text=f"{name} of {house}")
            tour.run("-T", house, "run", "-d", "--name", name, "--ip", address, "busybox", "sh", "-c", script)
    tour.run("-T", HOUSES[1], "run", "-d", "--name", "vault", "--ip", "10.0.0.9", "busybox", "sleep", "3600")
    for house in HOUSES:
        shown = tour.run("-T", house, "ps")
        addresses = {view["instance"]["name"]: view["instance"]["ports"][0]["address"] for view in views(client, house)}
        right = addresses.get("web") == "10.0.0.2" and addresses.get("db") == "10.0.0.3"
        tour.check(shown.ok and right, f"{house}: web is 10.0.0.2 and db is 10.0.0.3")


def pids(tour: Tour, client: Client) -> None:
    tour.step("Everybody is process 1", "The numbers inside say nothing of the host, nor of the neighbours.")
    for house in HOUSES:
        seen = tour.run("-T", house, "top", "web")
        processes = client.instances.top(house, "web")
        tour.check(seen.ok and processes[0]["inside"] == 1, f"web of {house} has a process 1 of its own")
    running = [view for house in HOUSES for view in views(client, house)]
    numbers = {view["status"]["pid"] for view in running}
    tour.check(len(numbers) == len(running), f"on the host they are {fields(sorted(numbers))}")
    mine = client.instances.get(HOUSES[0], "web")["status"]["pid"]
    tour.run("whois", str(mine))
    found = client.host.whois(mine)
    tour.check(
        (found["tenant"], found["instance"], found["inside"]) == (HOUSES[0], "web", 1),
        f"the host's process {mine} is process 1 of web of {HOUSES[0]}",
    )


def inside(tour: Tour, _: Client) -> None:
    tour.step("Inside a tenant, names work", "By ICMP and by TCP.")
    for house in HOUSES:
        until(lambda house=house: fetch(tour, house, "web", "db", quiet=True) is not None)
        pinged = tour.run("-T", house, "exec", "web", "ping", "-c", "1", "-W", "5", "db")
        tour.check(pinged.ok, f"web of {house} pings db by its name")
        answer = fetch(tour, house, "web", "db")
        tour.check(answer == f"db of {house}", f"and fetches the page of db of {house}")


def same_address(tour: Tour, _: Client) -> None:
    tour.step("The same address is two different machines", "10.0.0.2 is asked in both tenants.")
    for house in HOUSES:
        until(lambda house=house: fetch(tour, house, "db", "10.0.0.2", quiet=True) is not None)
        answer = fetch(tour, house, "db", "10.0.0.2")
        tour.check(answer == f"web of {house}", f"in {house} it is web of {house}")


def nothing_crosses(tour: Tour, _: Client) -> None:
    acme, globex = HOUSES
    tour.step("Nothing crosses", f"Only {globex} has a vault, at 10.0.0.9. {acme} is asked for it, too.")
    for target in ("10.0.0.9", "vault"):
        control = tour.run("-T", globex, "exec", "web", "ping", "-c", "1", "-W", "5", target)
        tour.check(control.ok, f"{globex} reaches {target} (the positive control)")
        crossed = tour.run("-T", acme, "exec", "web", "ping", "-c", "1", "-W", "1", target)
        tour.check(crossed.status == 1, f"{acme} does not reach {target}")


def bomb(tour: Tour, client: Client) -> None:
    acme, globex = HOUSES
    tour.step("A fork bomb", f"It may have {PIDS} processes. The neighbours are timed meanwhile.")
    words = ("--pids", str(PIDS), "--cpus", "0.5", "--log-size", "1m", "--log-files", "1")
    tour.run("-T", acme, "run", "-d", "--name", "bomb", *words, "busybox", "sh", "-c", BOMB)

    def refused() -> bool:
        return "can't fork" in tour.run("-T", acme, "logs", "--tail", "20", "bomb", quiet=True).text

    until(refused, 90)
    tour.run("-T", acme, "logs", "--tail", "3", "bomb")
    tour.check(refused(), "the kernel refuses it more processes")
    count = len(client.instances.top(acme, "bomb"))
    tour.check(1 < count <= PIDS, f"it has {count} processes, not more than {PIDS}")
    for house in (acme, globex):
        start = time.monotonic()
        answered = tour.run("-T", house, "exec", "web", "wget", "-q", "-O", "-", "http://db/")
        took = time.monotonic() - start
        tour.check(answered.ok and took < 20, f"web of {house} still answers, in {took * 1000:.0f} ms")
    tour.run("-T", acme, "rm", "-f", "bomb")
    left = [view["instance"]["name"] for view in views(client, acme)]
    tour.check("bomb" not in left, "and it is gone, with all of its processes")


def hog(tour: Tour, client: Client) -> None:
    acme = HOUSES[0]
    before = {view["instance"]["name"]: view["status"]["pid"] for view in views(client, acme)}
    tour.step("A memory hog", f"It may have {MEMORY}, and takes more and more.")
    tour.run("-T", acme, "run", "-d", "--name", "hog", "--memory", MEMORY, "busybox", "sh", "-c", HOG)
    ended = tour.run("-T", acme, "wait", "hog")
    tour.run("-T", acme, "ps", "-a")
    exit_ = client.instances.get(acme, "hog")["status"]["exit"] or {}
    tour.check(ended.text == "137" and bool(exit_.get("oom")), "the kernel killed it when its memory was used up")
    now = {view["instance"]["name"]: view["status"]["pid"] for view in views(client, acme)}
    tour.check(before == now and bool(now), f"and it alone: {fields(sorted(now))} run as before")
    tour.run("-T", acme, "rm", "hog")


def files(tour: Tour, client: Client) -> None:
    acme, globex = HOUSES
    tour.step("Shared layers, private files", "All instances share the layers of one image. web writes a file.")
    tour.run("-T", acme, "exec", "web", "sh", "-c", f"echo written by web of {acme} > /note")
    control = tour.run("-T", acme, "exec", "web", "cat", "/note")
    tour.check(control.text == f"written by web of {acme}", "web can read it (the positive control)")
    for house, name in ((acme, "db"), (globex, "web")):
        seen = tour.run("-T", house, "exec", name, "cat", "/note")
        tour.check(seen.status == 1, f"{name} of {house} does not have it")
    layers = {tuple(layer["path"] for layer in client.instances.explain(h, "web")["layers"]) for h in HOUSES}
    tour.check(len(layers) == 1 and layers != {()}, f"though both run on {fields(next(iter(layers)))}")


def proof(tour: Tour, _: Client) -> None:
    tour.step("The proof", "What the kernel has installed, and real packets, against what the tenants asked for.")
    verified = tour.run("verify")
    tour.check(verified.ok, "nothing differs")


# -- its parts -----------------------------------------------------------------------------------------------------


def views(client: Client, house: str) -> list[dict[str, Any]]:
    """The running instances of a tenant."""
    return [view for view in client.instances.list(house) if view["status"]["state"] == "running"]


def fetch(tour: Tour, house: str, source: str, target: str, *, quiet: bool = False) -> str | None:
    """The page that `target` serves, seen from `source`; None if there is none."""
    words = ("-T", house, "exec", source, "timeout", "3", "wget", "-q", "-O", "-", f"http://{target}/")
    result = tour.run(*words, quiet=quiet)
    return result.text if result.ok else None


def until(holds: Any, seconds: float = 20.0) -> None:
    """Waits until `holds()`, but not for ever: what is claimed afterwards is checked in any case."""
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.05)


class Interrupted(Exception):
    """SIGTERM or SIGHUP; SIGINT is KeyboardInterrupt by itself."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Signals that would end us become exceptions, so that the tour cleans up."""

    def interrupt(*_: object) -> NoReturn:
        raise Interrupted

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    except Interrupted:
        raise KeyboardInterrupt from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def clean_up(client: Client) -> None:
    """Takes away the tour's tenants with all they have. Conflict, and nothing is touched, if one is not the tour's."""
    mine = []
    for house in HOUSES:
        try:
            tenant = client.tenants.get(house)["tenant"]
        except NotFound:
            continue
        if tenant["labels"] != LABEL:
            raise Conflict(
                f"there is a tenant {house} that is not the demo's",
                "remove it first: the demo needs that name for a while",
            )
        mine.append(house)
    for house in mine:
        for attempts_left in reversed(range(5)):
            try:
                client.tenants.remove(house, force=True)
                break
            except Conflict:  # an instance has come meanwhile: we were interrupted while it was started
                if not attempts_left:
                    raise


def remove_instances(client: Client, house: str, names: tuple[str, ...] | None = None) -> None:
    try:
        found = [view["instance"]["name"] for view in client.instances.list(house)]
    except NotFound:
        return
    for name in found:
        if names is None or name in names:
            try:
                client.instances.remove(house, name, force=True)
            except NotFound:
                continue


COMMANDS = {
    "demo": Command(
        run,
        "The guided tour: two tenants with the same addresses, live, with every claim checked.",
        options=[Option("--keep", "leave its tenants running afterwards")],
        details="It makes the tenants acme and globex and takes them away again. Exit status 1 if a claim fails.",
    )
}
