"""`insula verify` beside policies with DNS names: nothing is found on a correct host, and a corruption is."""

from __future__ import annotations

import json
import os

from insula.kernel import netlink
from insula.kernel.netlink import Rtnl
from insula.kernel.netns import call_in
from insula.network.linux import naming
from tests.support.cli import Cli
from tests.support.daemon import Daemon


def launched(cli: Cli, name: str, *options: str) -> int:
    """Run an instance, and return the index of its port."""
    cli.ok("run", "-d", "--name", name, "-l", f"app={name}", "--stop-timeout", "0", *options, "busybox", "sleep", "600")
    [view] = cli.json("inspect", name)
    return int(view["instance"]["ports"][0]["index"])


def test_a_policy_with_names_is_proven_and_a_corruption_beside_it_is_found(fresh: Daemon) -> None:
    cli = fresh.cli
    launched(cli, "web")
    api = launched(cli, "api", "-p", "8080:80")
    allow = ("--in", "--allow", "from:any tcp/80", "--out", "--allow", "to:*.example.com tcp/443")
    cli.ok("policy", "create", "api", "--select", "app=api", *allow)
    passed = cli.run("verify")
    assert passed.status == 0, passed.out
    netns = os.open(f"/run/netns/{fresh.prefix}-default", os.O_RDONLY)
    with call_in(netns, Rtnl) as rtnl:
        rtnl.execute(netlink.set_link(naming.port_index(api), up=False))
    os.close(netns)
    failed = cli.run("verify", "--json")
    found = json.loads(failed.out)
    assert failed.status == 1 and not found["passed"]
    assert ("blocked", "default/web", "default/api") in {
        (f["kind"], f["source"], f["target"]) for f in found["findings"]
    }
