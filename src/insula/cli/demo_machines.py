"""The part of `insula demo` about virtual machines: the image of a container as a machine, on the same network."""

from __future__ import annotations

from typing import TYPE_CHECKING

from insula.cli.tour import Tour

if TYPE_CHECKING:
    from insula.client import Client

TENANT = "acme"
TITLE = "One image, two kinds of room"
SERVE = "mkdir /www; echo machine of acme > /www/index.html; exec httpd -f -h /www"
BOOT = "/proc/sys/kernel/random/boot_id"


def machine(tour: Tour, client: Client) -> None:
    """Show a machine beside a container, or say in a line what this host lacks for that."""
    if lacking := [each for each in client.host.doctor() if _is_of_machines(each["name"]) and each["state"] != "ok"]:
        tour.step(TITLE, f"Virtual machines are not shown: {lacking[0]['detail']}.")
        print(f"How to get them: {lacking[0]['hint'].partition(';')[0]}.")
        return
    tour.step(TITLE, "web is a container of busybox. The same image is run as a virtual machine beside it.")
    tour.run("-T", TENANT, "run", "-d", "--vm", "--name", "machine", "busybox", "sh", "-c", SERVE)
    for name in ("web", "machine"):
        tour.run("-T", TENANT, "exec", name, "uname", "-r")
        processes = tour.run("-T", TENANT, "exec", name, "ps", "-o", "pid,args")
        first = [line.split()[1] for line in processes.text.splitlines() if line.split()[0] == "1"]
        tour.check(first == ["httpd"], f"process 1 of {name} is httpd")
    boots = {tour.run("-T", TENANT, "exec", name, "cat", BOOT).text for name in ("web", "machine")}
    tour.check(len(boots) == 2, "they are on two kernels, which were booted at different times")
    for source, target in (("web", "machine"), ("machine", "web")):
        pinged = tour.run("-T", TENANT, "exec", source, "ping", "-c", "1", "-W", "5", target)
        tour.check(pinged.ok, f"{source} pings {target} by its name")
    page = tour.run("-T", TENANT, "exec", "web", "timeout", "5", "wget", "-q", "-O", "-", "http://machine/")
    tour.check(page.text == "machine of acme", "and web fetches the page of machine")
    tour.run("-T", TENANT, "rm", "-f", "machine")


def _is_of_machines(check: str) -> bool:
    return check in ("virtual machines", "hypervisor")
