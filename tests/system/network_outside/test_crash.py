"""kill -9 of insulad in the middle of each verb of floating addresses and load balancers.

The verb has happened or has not, can be given again, and packets follow. What belonged to one tenant leads to no other
meanwhile, and is free for others in the end. The seed of a failing run is in its message: INSULA_TEST_SEED=… plays it
again.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import NamedTuple

from tests.support.cli import Cli
from tests.support.daemon import Daemon
from tests.support.wait import until
from tests.system.network_outside.test_commands import HOST, page, serve
from tests.system.network_outside.test_lb_commands import FAST

ADDRESS = "198.18.0.70"
LONGEST = 0.3  # seconds into the command
SEED = int(os.environ.get("INSULA_TEST_SEED") or random.SystemRandom().randrange(1 << 30))


class Step(NamedTuple):
    """A command, whether it has happened, and which instance `ADDRESS` leads to then, and with `balanced` port 81."""

    words: tuple[str, ...]
    done: Callable[[Cli], bool]
    reached: str = ""
    balanced: bool = False


def attached(cli: Cli) -> str | None:
    found = [each["instance"] for each in cli.json("floating-ip", "ls") if each["floating_ip"]["name"] == "front"]
    return (found[0] or "nothing") if found else None


def backend(cli: Cli) -> str | None:
    return next((each["instances"][0] for each in cli.json("lb", "ls") if each["name"] == "shop"), None)


PLACES = ("--on", "front", "--on", "host:", "--on", "network:default,ip=10.0.0.200")
LISTEN = ("--listen", "tcp/80", "--listen", "tcp/81", "--port", "80")
STEPS = (
    Step(("floating-ip", "allocate", "front", "--address", ADDRESS), lambda cli: attached(cli) is not None),
    Step(("floating-ip", "attach", "front", "web"), lambda cli: attached(cli) == "web", "web"),
    Step(("floating-ip", "attach", "front", "other"), lambda cli: attached(cli) == "other", "other"),
    Step(("floating-ip", "detach", "front"), lambda cli: attached(cli) == "nothing"),
    Step(
        ("lb", "create", "shop", *LISTEN, *PLACES, "--backend", "web", *FAST),
        lambda cli: backend(cli) == "web",
        "web",
        balanced=True,
    ),
    Step(("lb", "update", "shop", "--backend", "other"), lambda cli: backend(cli) == "other", "other", balanced=True),
    Step(("lb", "rm", "shop"), lambda cli: backend(cli) is None),
    Step(("floating-ip", "release", "front"), lambda cli: attached(cli) is None),
)


def test_every_verb_that_is_killed_has_happened_or_not(host: Daemon, acme: Cli, globex: Cli) -> None:
    dice = random.Random(SEED)
    for cli in (acme, globex):
        serve(cli, "web")
    serve(acme, "other")
    outside = host.namespaces.outside
    for step in STEPS:
        delay = dice.uniform(0, LONGEST)
        what = f"seed {SEED}, {' '.join(step.words)} killed after {delay:.3f} s"
        status = host.killed_during(acme, *step.words, after=delay)
        if not step.done(acme):
            assert status, f"{what}: it said that it was done"
            acme.ok(*step.words)
        text = f"{step.reached}-acme" if step.reached else ""
        until(lambda text=text: page(outside, ADDRESS, 80, 2.0) == text, f"{what}: leads to {text!r}")  # type: ignore[misc]
        if step.balanced:
            until(lambda text=text: page(outside, HOST, 81, 2.0) == text, what)  # type: ignore[misc]
            assert "is in use" in globex.fails("update", "web", "--publish", "81:80"), what
    used = acme.json("tenant", "show", "acme")["usage"]
    assert (used["floating_ips"], used["load_balancers"]) == (0, 0)
    globex.ok("floating-ip", "allocate", "mine", "--address", ADDRESS, "--attach", "web")
    globex.ok("update", "web", "--publish", "81:80")
    for address, port in ((ADDRESS, 80), (HOST, 81)):
        until(lambda address=address, port=port: page(outside, address, port, 2.0) == "web-globex", "it is free")  # type: ignore[misc]
    acme.ok("run", "-d", "--network", "default,ip=10.0.0.200", "busybox", "sleep", "1000")
