"""kill -9 of insulad at random moments of a change of policies: traffic flows by the old policy or by the new one.

Nobody whom neither allows gets through at any time, also while insulad is gone, and after its start the policy in the
store is in force. The seed of a failing run is in its message: INSULA_TEST_SEED=… plays it again.
"""

from __future__ import annotations

import os
import random

from tests.support.cli import Cli
from tests.support.daemon import Daemon
from tests.support.wait import until

POINTS = 8
LONGEST = 0.3  # seconds into the command
SEED = int(os.environ.get("INSULA_TEST_SEED") or random.SystemRandom().randrange(1 << 30))
SERVE = "echo hello > /tmp/index.html; exec httpd -f -h /tmp"
ASK = "while :; do timeout 2 wget -qO- http://{}/ || echo no; sleep 0.05; done"
FORMS = {"web": "from:app=web tcp/80", "cron": "from:app=cron,tier!=none tcp/80"}  # the one or the other is allowed


def run(cli: Cli, name: str, command: str) -> str:
    cli.ok("run", "-d", "--name", name, "--stop-timeout", "0", "-l", f"app={name}", "busybox", "sh", "-c", command)
    [view] = cli.json("inspect", name)
    return str(view["instance"]["ports"][0]["address"])


def heard(cli: Cli, name: str) -> int:
    return cli.ok("logs", name).count("hello")


def refused(cli: Cli, name: str) -> int:
    return cli.ok("logs", name).count("no\n")


def fetched(cli: Cli, name: str, address: str) -> bool:
    return cli.run("exec", name, "timeout", "5", "wget", "-qO-", f"http://{address}/").out == "hello\n"


def test_a_change_that_is_killed_is_there_or_not_and_nothing_is_open_meanwhile(daemon: Daemon, cli: Cli) -> None:
    dice = random.Random(SEED)
    db = run(cli, "db", SERVE)
    for name in FORMS:
        run(cli, name, "sleep 3600")
    run(cli, "stranger", ASK.format(db))
    until(lambda: heard(cli, "stranger") > 0, "it gets through without a policy")
    cli.ok("policy", "create", "db", "--select", "app=db", "--allow", FORMS["web"])
    until(lambda: refused(cli, "stranger") > 1, "it doesn't any more")
    before, tried, now = heard(cli, "stranger"), refused(cli, "stranger"), "web"
    for number in range(POINTS):
        other = "cron" if now == "web" else "web"
        delay, what = dice.uniform(0, LONGEST), f"seed {SEED}, point {number}"
        change = ("policy", "update", "db", "--allow", FORMS[other], "--remove", FORMS[now])
        status = daemon.killed_during(cli, *change, after=delay)
        [rule] = cli.json("policy", "show", "db")["policy"]["rules"]
        labels = rule["peers"][0]["select"]
        now = "cron" if "cron" in str(labels) else "web"
        if status == 0:
            assert now == other, f"{what}: the answer was that it is in force"
        former = "cron" if now == "web" else "web"
        until(lambda now=now: fetched(cli, now, db), f"{what}: {now} gets through")  # type: ignore[misc]
        until(lambda former=former: not fetched(cli, former, db), f"{what}: {former} does not")  # type: ignore[misc]
    until(lambda: refused(cli, "stranger") > tried, "the stranger has tried")
    assert heard(cli, "stranger") == before, f"seed {SEED}: it got through"
    cli.ok("policy", "rm", "db")
    until(lambda: heard(cli, "stranger") > before, "it gets through again")
