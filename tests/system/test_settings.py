"""Settings take effect in the kernel; a bad file is refused before anything is changed."""

from __future__ import annotations

import json
import re
import subprocess

import pytest

from tests.support.cli import ERROR
from tests.support.daemon import Daemon
from tests.support.machine import Namespaces
from tests.support.wait import patiently, until


def host_addresses(daemon: Daemon) -> list[str]:
    """The addresses of the host's ends of tenants' uplinks."""
    command = Namespaces.wrap(daemon.namespaces.host, "ip", "-json", "address", "show")
    links = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    uplinks = [link for link in links if re.fullmatch(r"[a-z0-9]+-u[0-9]+", link["ifname"])]
    assert uplinks
    return [info["local"] for link in uplinks for info in link["addr_info"] if info["scope"] == "global"]


def rules(daemon: Daemon) -> str:
    """The host's part of the packet filter."""
    command = Namespaces.wrap(daemon.namespaces.host, "nft", "list", "table", "inet", daemon.prefix)
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_ranges_and_resolvers_of_the_file_are_used(unstarted: Daemon) -> None:
    unstarted.configure(
        '[network]\nrange4 = "10.99.0.0/24"\nrange6 = "fd99:1::/64"\nresolvers = ["192.0.2.53"]\n',
    )
    unstarted.start()
    addresses = host_addresses(unstarted)
    assert addresses
    assert all(address.startswith(("10.99.0.", "fd99:1:")) for address in addresses)
    cli = unstarted.cli
    assert "is used for this host's uplinks" in cli.fails("network", "create", "n", "--subnet", "10.99.0.0/28")
    cli.ok("network", "create", "n", "--subnet", "100.64.0.0/24")  # the default range is no longer taken
    assert "192.0.2.53" in rules(unstarted)
    cli.ok("run", "--rm", "busybox", "true")


def test_a_bad_file_is_refused_before_anything_is_changed(unstarted: Daemon) -> None:
    before = unstarted.snapshot()
    unstarted.configure("[network]\nrange4 = '10.99.0.1/24'\n")
    unstarted.launch()
    assert unstarted._process
    assert unstarted._process.wait(patiently(30)) == 1
    match = ERROR.fullmatch(unstarted.log.read_text())
    assert match
    assert match["what"].startswith(f"{unstarted.settings}: network.range4 '10.99.0.1/24' is no network")
    assert unstarted.snapshot() == before
    assert not unstarted.root.exists()
    assert not unstarted.run.exists()
    unstarted.configure("[network]\nrange4 = '10.99.0.0/24'\n")  # the control
    unstarted.start()


def test_debug_logs_each_request_and_info_does_not(unstarted: Daemon) -> None:
    unstarted.start()
    unstarted.cli.ok("ps")
    assert "GET /v1/tenants/default/instances" not in unstarted.log.read_text()
    unstarted.stop()
    unstarted.configure('log_level = "debug"\n')
    unstarted.start()
    unstarted.cli.ok("ps")
    request = "GET /v1/tenants/default/instances"
    until(lambda: request in unstarted.log.read_text(), "it is logged")
    [line] = [line for line in unstarted.log.read_text().splitlines() if request in line]
    assert " DEBUG insula.access: GET /v1/tenants/default/instances user=operator uid=0 pid=" in line
    assert " status=200 " in line


@pytest.mark.parametrize("setting", ['range4 = "10.99.0.0/30"', 'range6 = "fd99::/126"'])
def test_a_tenant_for_whom_a_range_has_no_room_is_refused(unstarted: Daemon, setting: str) -> None:
    unstarted.configure(f"[network]\n{setting}\n")
    unstarted.start()
    refused = ""
    for number in range(4):
        result = unstarted.cli.run("tenant", "create", f"t{number}")
        if result.status:
            refused = result.err
            break
    key = setting.split()[0]
    assert f"has no uplink address in {setting.split()[2][1:-1]}; hint: set network.{key} in insulad.toml" in refused
    assert f"t{number}" not in unstarted.cli.ok("tenant", "ls")
    unstarted.cli.ok("run", "--rm", "busybox", "true")  # the others go on
    assert unstarted.cli.json("status")["problems"] == []


def test_doctor_says_when_the_budgets_of_the_kernel_are_off(unstarted: Daemon) -> None:
    def told() -> dict[str, str]:
        [check] = [check for check in unstarted.cli.json("doctor") if check["name"] == "sockets and locks"]
        return dict(check)

    unstarted.start()
    assert told()["detail"] != "off by the setting ebpf_budgets", "the control"
    unstarted.stop()
    unstarted.configure("ebpf_budgets = false\n")
    unstarted.start()
    assert (told()["state"], told()["detail"]) == ("degraded", "off by the setting ebpf_budgets")
