"""`insula usage`: compared with the kernel's own counters, over kills of every process of Insula."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from insula.client import Client
from insula.kernel.cgroups import Cgroup
from insula.model.errors import Denied, NotFound
from tests.support.cli import Cli
from tests.support.daemon import PROCESSES, Daemon, start_time
from tests.support.machine import Run
from tests.support.wait import until
from tests.system.tenancy.conftest import Houses, People

TICK = 10_000_000  # nanoseconds
PING = 20 + 8 + 100  # bytes of an echo: IPv4, ICMP, data
INSTANCES, KILLS = 30, 20
SEED = int(os.environ.get("INSULA_TEST_SEED") or random.SystemRandom().randrange(1 << 30))
WORK = "i=0; while [ $i -lt {turns} ]; do i=$((i+1)); done; for n in 1 2 3; do ping -c1 -W20 -s100 {sink}; done"


def usage(cli: Cli, *words: str) -> dict[str, Any]:
    found: dict[str, Any] = cli.json("usage", *words)
    return found


def used(cli: Cli, name: str) -> dict[str, Any]:
    return next(each["used"] for each in usage(cli)["instances"] if each["name"] == name)


def without_time(found: dict[str, Any]) -> dict[str, Any]:
    """What doesn't grow by itself while instances sleep."""
    own = {key: value for key, value in found["used"].items() if not key.startswith("memory")}
    return {"tenant": found["tenant"], "since": found["since"], **own}


# -- over kills ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def town(run_: Run) -> Iterator[Daemon]:
    """A daemon of its own, with a tenant whose instances don't start from prepared containers, and one that answers."""
    daemon = Daemon(run_)
    try:
        daemon.configure("spares = 0")
        daemon.start()
        daemon.cli.ok("tenant", "create", "acme")
        daemon.cli.of("acme").ok("network", "create", "default", "--subnet", "10.0.0.0/24")
        daemon.cli.of("acme").ok("run", "-d", "--name", "sink", "busybox", "sleep", "6000")
        yield daemon
    finally:
        daemon.remove()


def kernels(daemon: Daemon) -> tuple[int, int]:
    """Processor time of the tenant's control group, and of its resolver's group in it, nanoseconds."""
    parent, own = (Cgroup(f"{daemon.prefix}/acme{part}").counters()[1] for part in ("", "/resolver"))
    return parent, own


@pytest.mark.parametrize("seed", [SEED])
def test_it_is_what_the_kernel_has_counted_after_twenty_kills(town: Daemon, seed: int) -> None:
    """Thirty short instances, in which every process of Insula is killed at random moments: nothing is lost, and
    nothing is counted twice, in processor time and in bytes."""
    dice, cli = random.Random(seed), town.cli.of("acme")
    sink = cli.json("inspect", "sink")[0]["instance"]["ports"][0]["address"]
    names = [f"i{number}" for number in range(INSTANCES)]
    kills = sorted(dice.sample(range(INSTANCES), KILLS))
    for number, name in enumerate(names):
        work = WORK.format(turns=dice.choice([1000, 50_000, 200_000]), sink=sink)
        with cli.start("run", "-d", "--name", name, "busybox", "sh", "-c", work) as client:
            if number in kills:
                time.sleep(dice.uniform(0, 0.4))
                crash(town, dice.choice(PROCESSES))
            client.communicate()
    town.wait_until_it_is_reconciled()
    active = {"starting", "running", "stopping"}  # a launch that was killed may have failed
    until(lambda: len([view for view in views(cli) if view["status"]["state"] in active]) == 1, "all have ended")
    pings = {view["instance"]["name"]: pings_of(cli, view["instance"]["name"]) for view in views(cli)}
    found, (parent, resolver) = usage(cli), kernels(town)
    each = {one["name"]: one["used"] for one in found["instances"]}
    for name in names:
        if name in each:
            assert each[name]["sent"] == PING * pings[name] == each[name]["received"], name
            assert each[name]["sent_packets"] == pings[name]
    total = sum(pings.values())
    assert total > 2 * INSTANCES, "most have run to their end"
    assert each["sink"]["received"] == each["sink"]["sent"] == PING * total
    assert found["used"]["sent"] == 2 * PING * total
    assert sum(one["cpu"] for one in each.values()) == found["used"]["cpu"] > 30 * 1_000_000
    assert found["used"]["cpu"] + found["other_cpu"] == parent, "all of the group's time is shown"
    assert 0 <= found["other_cpu"] - resolver <= TICK * KILLS, "and hardly any of it could not be attributed"

    before = without_time(found)
    for name in names[::2]:
        cli.run("rm", "-f", name)
    crash(town, "insulad")
    town.wait_until_it_is_reconciled()
    after = usage(cli)
    assert without_time(after) == before, "removal and a restart change nothing"
    assert {one["name"] for one in after["instances"]}.isdisjoint(names[::2])


def crash(daemon: Daemon, victim: str) -> None:
    until(lambda: daemon.pid(victim), f"the {victim} runs")
    daemon.kill(victim)
    if victim == "insulad":
        daemon.launch()
    daemon.wait_until_it_answers()
    daemon.wait_until_it_is_reconciled()  # two kills at once may lose output, from which the test counts


def views(cli: Cli) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = cli.json("ps", "-a")
    return found


def pings_of(cli: Cli, name: str) -> int:
    """How many echo requests its output says to have sent and seen answered."""
    return cli.run("logs", name).out.count("1 packets transmitted, 1 packets received")


def test_counters_of_an_instance_that_ends_without_insulad_are_read_later(town: Daemon) -> None:
    cli = town.cli.of("acme")
    sink = cli.json("inspect", "sink")[0]["instance"]["ports"][0]["address"]
    begin = f"while [ ! -e /go ]; do sleep 0.02; done; {WORK.format(turns=100_000, sink=sink)}"
    cli.ok("run", "-d", "--name", "late", "busybox", "sh", "-c", begin)
    pid = cli.json("inspect", "late")[0]["status"]["pid"]
    town.kill("insulad")
    with open(f"/proc/{pid}/root/go", "w"):
        pass
    until(lambda: start_time(pid) is None, "it has ended")
    town.start()
    until(lambda: cli.json("inspect", "late")[0]["status"]["state"] == "exited", "its end is seen")
    assert used(cli, "late")["sent"] == 3 * PING
    assert used(cli, "late")["cpu"] > TICK
    before = without_time(usage(cli))
    cli.ok("rm", "late")
    assert without_time(usage(cli)) == before


def test_restarts_add_up(town: Daemon) -> None:
    """A restart makes a new control group and a new device; the totals go on."""
    cli = town.cli.of("acme")
    sink = cli.json("inspect", "sink")[0]["instance"]["ports"][0]["address"]
    work = WORK.format(turns=50_000, sink=sink)
    cli.ok("run", "-d", "--name", "again", "busybox", "sh", "-c", work)
    seen = []
    for number in (1, 2, 3):
        cli.ok("wait", "again")
        until(lambda number=number: used(cli, "again")["sent"] == number * 3 * PING, "it is settled")  # type: ignore[misc]
        seen.append(used(cli, "again")["cpu"])
        if number < 3:
            cli.ok("start", "again")
    assert 0 < seen[0] < seen[1] < seen[2]
    cli.ok("rm", "again")


# -- tenants ---------------------------------------------------------------------------------------------------------


def test_a_prepared_container_is_not_billed_for_its_preparation(daemon: Daemon, cli: Cli) -> None:
    """Its control group has used time before the instance was asked for."""
    for _ in range(3):  # from now on there are prepared ones
        cli.ok("run", "--rm", "busybox", "true")
    top = Path(Cgroup(f"{daemon.prefix}/{cli.tenant}").directory("pids") or "")

    def prepared() -> bool:
        return any(path.is_dir() and len(path.name) == 32 for path in top.iterdir())

    until(prepared, "there is a prepared one")
    time.sleep(0.1)
    cli.ok("run", "-d", "--name", "web", "busybox", "sleep", "600")
    instance = cli.json("inspect", "web")[0]["instance"]["id"]
    group = Cgroup(f"{daemon.prefix}/{cli.tenant}/{instance}")

    def at_rest() -> tuple[int, int] | None:
        billed, whole = used(cli, "web")["cpu"], group.counters()[1]
        return (billed, whole) if used(cli, "web")["cpu"] == billed else None

    billed, whole = until(at_rest, "it sleeps") or (0, 0)
    assert 0 < billed < whole, "what it had used before is not in it"
    assert usage(cli)["other_cpu"] >= whole - billed, "that is the host's"


def test_reservations_over_time(cli: Cli) -> None:
    cli.ok("run", "-d", "--name", "web", "--cpus", "0.5", "--memory", "64m", "busybox", "sleep", "600")
    asked = time.monotonic()
    first = usage(cli)
    answered = time.monotonic()
    time.sleep(1)
    least = time.monotonic() - answered
    second = usage(cli)
    most = time.monotonic() - asked
    assert least <= second["until"] - first["until"] <= most
    grown = {name: second["reserved"][name] - first["reserved"][name] for name in second["reserved"]}
    assert grown["cpus"] == pytest.approx(0.5 * grown["instances"])
    assert grown["memory"] == pytest.approx((64 << 20) * grown["instances"])
    assert least <= grown["instances"] <= most
    cli.ok("update", "--cpus", "0.25", "web")
    cli.ok("rm", "-f", "web")
    third = usage(cli)
    time.sleep(0.2)
    assert usage(cli)["reserved"] == third["reserved"], "nothing is reserved any more"


def test_memory_is_sampled_and_tells_what_was_not(cli: Cli) -> None:
    cli.ok("run", "-d", "--name", "web", "busybox", "sleep", "600")
    first = used(cli, "web")
    time.sleep(0.5)
    second = used(cli, "web")
    sampled = second["memory_sampled"] - first["memory_sampled"]
    assert sampled >= 0.5
    assert 0 < (second["memory"] - first["memory"]) / sampled < 64 << 20
    assert second["memory_unsampled"] < 20


def test_an_instance_of_the_same_name_inherits_nothing(cli: Cli) -> None:
    cli.ok("run", "-d", "--name", "web", "busybox", "sh", "-c", "i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done")
    cli.ok("wait", "web")
    until(lambda: used(cli, "web")["cpu"] > 5 * TICK, "it is settled")
    before = usage(cli)["used"]["cpu"]
    cli.ok("rm", "web")
    cli.ok("run", "-d", "--name", "web", "busybox", "sleep", "600")
    assert used(cli, "web")["cpu"] < 5 * TICK
    assert usage(cli)["used"]["cpu"] >= before, "the tenant has used it all the same"


def test_a_tenant_of_the_same_name_inherits_nothing(daemon: Daemon) -> None:
    cli = daemon.cli.of("mayfly")

    def live() -> dict[str, Any]:
        daemon.cli.ok("tenant", "create", "mayfly")
        return usage(cli)

    assert live()["used"]["cpu"] == 0
    cli.ok("run", "--rm", "--network", "none", "busybox", "true")
    until(lambda: usage(cli)["used"]["cpu"], "it has used something")
    assert usage(cli)["reserved"]["instances"] > 0
    daemon.cli.ok("tenant", "rm", "--force", "mayfly")
    [kept] = [each for each in daemon.cli.json("usage", "--removed") if each["tenant"] == "mayfly"]
    assert kept["used"]["cpu"] > 0 and kept["reserved"]["instances"] > 0, "for the bill"
    assert daemon.cli.json("usage", "--removed", "--since", "0s") == []
    again = live()
    assert again["used"]["cpu"] == again["reserved"]["instances"] == 0 and again["instances"] == []
    daemon.cli.ok("tenant", "rm", "mayfly")


def test_since_a_time(cli: Cli) -> None:
    """There is no hour in the history yet: it is all of it. A time that has not come is as now."""
    whole = usage(cli)
    for words in (("--since", "24h"), ("--since", "1s")):
        found = usage(cli, *words)
        assert found["since"] <= found["until"] and found["used"]["sent"] <= whole["used"]["sent"]
    assert "not a" in cli.fails("usage", "--since", "yesterday", status=2)


def test_the_table(cli: Cli, daemon: Daemon) -> None:
    cli.ok("run", "-d", "--name", "web", "busybox", "sleep", "600")
    lines = cli.ok("usage").splitlines()
    assert lines[0].split() == [
        "TENANT", "SINCE", "CPU", "OTHER", "RESERVED", "MEMORY", "RESERVED", "RECEIVED", "SENT", "IMAGES"
    ]  # fmt: skip
    assert lines[1].startswith(str(cli.tenant))
    assert lines[4].startswith("web ")
    everybody = daemon.cli.ok("usage").splitlines()
    assert {"default", str(cli.tenant)} <= {line.split()[0] for line in everybody[1:]}


# -- permissions -----------------------------------------------------------------------------------------------------


def test_a_member_sees_ones_own_and_nothing_of_others(people: People, houses: Houses, daemon: Daemon) -> None:
    acme, globex = str(houses.acme.tenant), str(houses.globex.tenant)
    ann = people.person("viewer", acme)
    assert [each["tenant"] for each in ann.client.tenants.usage_of_all()] == [acme]
    assert [each["name"] for each in ann.client.tenants.usage(acme)["instances"]] == ["web"]
    with pytest.raises(NotFound) as foreign:
        ann.client.tenants.usage(globex)
    with pytest.raises(NotFound) as absent:
        ann.client.tenants.usage("nobodys")
    assert str(foreign.value).replace(globex, "nobodys") == str(absent.value)
    assert {acme, globex} <= {each["tenant"] for each in people.operator.tenants.usage_of_all()}
    with pytest.raises(Denied, match=r"host\.read"):
        ann.client.tenants.usage_of_all(removed=True)
    auditor = people.person("auditor")
    assert {acme, globex} <= {each["tenant"] for each in auditor.client.tenants.usage_of_all()}
    job = people.person("member", acme, labels={"job": "7"})
    assert job.client.tenants.usage_of_all() == []
    with pytest.raises((Denied, NotFound)):
        job.client.tenants.usage(acme)


def test_it_does_not_change_while_another_tenant_works(people: People, houses: Houses) -> None:
    """Byte for byte, but for the time, what it multiplies, and what its own resolver uses."""
    acme, globex = str(houses.acme.tenant), str(houses.globex.tenant)
    ann = people.person("member", acme)

    def answer(client: Client) -> str:
        found = client.tenants.usage(acme)
        rest = [[each["name"], each["used"]["sent"], each["used"]["cpu"]] for each in found["instances"]]
        return json.dumps([without_time(found), rest, sorted(found)])

    answer(ann.client)
    before = answer(ann.client)
    for number in range(5):
        people.operator.instances.run(globex, "busybox", ["sh", "-c", "sleep 0.1"], name=f"w{number}")
    assert answer(ann.client) == before
    for number in range(5):
        people.operator.instances.remove(globex, f"w{number}", force=True)
    assert answer(ann.client) == before
