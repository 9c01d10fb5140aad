"""kill -9 of insulad in the middle of an apply that replaces an instance with floating addresses behind a balancer.

The same apply again makes everything as it is declared, and addresses that were attached by hand lead to the new
instance as well, however far the first one came. The seed of a failing run is in its message: INSULA_TEST_SEED=… plays
it again.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

from tests.support.cli import Cli
from tests.support.daemon import Daemon
from tests.support.wait import until
from tests.system.network_outside.test_commands import HOST, HOST6, page
from tests.system.network_outside.test_floating_commands import allocate, files

POINTS = 10
LONGEST = 1.5  # seconds into the command
SEED = int(os.environ.get("INSULA_TEST_SEED") or random.SystemRandom().randrange(1 << 30))


def test_what_was_killed_is_applied_again_and_nothing_is_lost(host: Daemon, acme: Cli, tmp_path: Path) -> None:
    dice, file = random.Random(SEED), tmp_path / "declared.yaml"
    acme.ok("apply", "-f", "-", stdin=files("start"))
    _, six = allocate(acme, "six", "--family", "ipv6", "--attach", "web")
    front = acme.json("floating-ip", "show", "front")["floating_ip"]["address"]
    places = [(front, 80), (six, 80), (HOST, 81), (HOST6, 81)]
    outside, cut = host.namespaces.outside, 0
    for number in range(POINTS):
        text, delay = f"n{number}", dice.uniform(0, LONGEST)
        what = f"seed {SEED}, point {number}, killed after {delay:.3f} s"
        file.write_text(files(text))
        status = host.killed_during(acme, "apply", "--replace", "-f", file, after=delay)
        cut += bool(status)
        if status:
            acme.ok("apply", "--replace", "-f", file)
        for name in ("front", "six"):
            assert acme.json("floating-ip", "show", name)["instance"] == "web", f"{what}: {name}"
        for address, port in places:
            until(lambda a=address, p=port, t=text: page(outside, a, p, 2.0) == t, f"{what}: {address}:{port}")  # type: ignore[misc]
        assert "unchanged" in acme.ok("apply", "-f", file), what
        assert [each["instance"]["name"] for each in acme.json("ps", "-a")] == ["web"], what
    assert cut, "some were in the middle"
    used = acme.json("tenant", "show", "acme")["usage"]
    assert (used["floating_ips"], used["load_balancers"], used["instances"]) == (2, 1, 1)
