"""What pulls cost: their traffic and processor time are their tenant's, and so are the limits."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

from insula.kernel.cgroups import Cgroup
from insula.model.errors import Invalid, QuotaExceeded
from tests.support import machine, outside
from tests.support.machine import Namespaces
from tests.support.outside import PORT
from tests.support.wait import patiently, until
from tests.system.tenancy.registries import OWN, World, hanging, member_of_new, open_world, pids, pull, refusal


@pytest.fixture(scope="module")
def world(run_: machine.Run, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with open_world(run_, tmp_path_factory.mktemp("outside")) as world:
        yield world


class Counted(NamedTuple):
    """Bytes and packets, as `insula usage` shows them of pulls and pushes."""

    received: int
    received_packets: int
    sent: int
    sent_packets: int

    def since(self, other: Counted) -> Counted:
        return Counted(*(mine - its for mine, its in zip(self, other, strict=True)))


def accounted(world: World, tenant: str = "acme") -> Counted:
    return Counted(**world.daemon.cli.json("-T", tenant, "usage")["images"])


@pytest.fixture(scope="module")
def seen(world: World) -> Callable[[], Counted]:
    """What has come and gone outside, at the registry's port."""
    rules = f"""table ip seen {{
        chain came {{ type filter hook prerouting priority -300; tcp dport {PORT} counter; }}
        chain gone {{ type filter hook postrouting priority 300; tcp sport {PORT} counter; }}
    }}"""
    nft = Namespaces.wrap(world.daemon.namespaces.outside, "nft")
    subprocess.run([*nft, "-f", "-"], input=rules, text=True, check=True)

    def count() -> Counted:
        found = json.loads(subprocess.check_output([*nft, "-j", "list", "table", "ip", "seen"]))["nftables"]
        rules = {each["rule"]["chain"]: each["rule"]["expr"] for each in found if "rule" in each}
        came, gone = (rules[name][-1]["counter"] for name in ("came", "gone"))
        return Counted(gone["bytes"], gone["packets"], came["bytes"], came["packets"])

    return count


def test_its_traffic_is_accounted_to_the_byte(world: World, seen: Callable[[], Counted]) -> None:
    """While it goes on, over a kill of insulad, and after its end. By address: the resolver is not asked."""
    before, outside_before, other = accounted(world), seen(), accounted(world, "globex")

    def both() -> tuple[Counted, Counted]:
        return accounted(world).since(before), seen().since(outside_before)

    def equal() -> bool:
        ours, theirs = both()
        assert ours == theirs, (ours, theirs)
        return ours.sent_packets > 0

    with hanging(world, world.ann, f"{OWN}:{PORT}/hang/app:1") as process:
        until(equal, "what has come is accounted")
        now, shown = accounted(world), world.people.operator.host.metrics()
        for name, value in (("receive_bytes", now.received), ("transmit_packets", now.sent_packets)):
            assert f'insula_tenant_image_{name}_total{{tenant="acme"}} {float(value)}\n' in shown
        world.daemon.kill("insulad")
        process.communicate(timeout=patiently(30))
        until(lambda: not pids(world.daemon), "skopeo ends with insulad")
        world.daemon.start()
        until(lambda: both()[0].sent == both()[1].sent, "nothing is lost or counted twice")
    pull(world.ann, f"{OWN}:{PORT}/app:1")
    until(lambda: both()[0].sent == both()[1].sent, "all that was sent is accounted")
    ours, theirs = both()
    lost = theirs.received_packets - ours.received_packets
    assert 0 <= theirs.received - ours.received <= 60 * lost, "but acknowledgements that came after the end"
    assert lost <= 12 and ours.received > sum(len(blob) for blob in outside.LAYOUT.blobs.values())
    assert accounted(world, "globex") == other, "nothing is another tenant's"

    total, table = accounted(world), world.daemon.prefix
    world.daemon.stop()
    nft = Namespaces.wrap(str(machine.NETNS / f"{table}-acme"), "nft")
    subprocess.run([*nft, "delete", "table", "inet", table], check=True)
    world.daemon.start()
    assert accounted(world) == total, "what was stored stays when the counters are lost"
    pull(world.ann, f"{OWN}:{PORT}/app:1")
    until(
        lambda: accounted(world).received - total.received > sum(map(len, outside.LAYOUT.blobs.values())), "it goes on"
    )


def test_it_runs_in_a_control_group_of_its_tenant(world: World) -> None:
    """So that the tenant's limits hold for it, and its processor time is the tenant's."""
    group = Cgroup(f"{world.daemon.prefix}/acme/images")
    with hanging(world, world.ann):
        skopeo = pids(world.daemon)[-1]
        assert skopeo in group.processes()
        until(lambda: group.counters()[1] > 0, "it has used time")
    assert group.processes() == []
    assert world.daemon.cli.json("-T", "acme", "usage")["other_cpu"] >= group.counters()[1]


def test_it_has_no_more_memory_than_its_tenant(world: World) -> None:
    person = member_of_new(world, "tiny")
    world.daemon.cli.ok("tenant", "update", "tiny", "--memory", "6m")
    error = refusal(person, f"plain.test:{PORT}/app:1")
    assert "was killed" in error.message and "limit of memory" in str(error.hint), error
    world.daemon.cli.ok("tenant", "update", "tiny", "--memory", "256m")
    assert pull(person, f"plain.test:{PORT}/app:1")


def test_it_takes_no_more_of_the_disk_than_its_tenant_may_have(world: World) -> None:
    """What is larger when it is unpacked than all images of the tenant may be is ended, and what doesn't fit is not
    kept."""
    person, reference = member_of_new(world, "poor"), f"{OWN}:{PORT}/app:1"
    pull(person, reference)
    content = person.client.images.get("poor", reference)["content"]
    person.cli.ok("image", "rm", reference)
    store = world.daemon.root / "images"
    before = sorted(store.glob("[bl]*/**/*"))
    for most, expected in ((max(content.values()) - 1, Invalid), (sum(content.values()) - 1, QuotaExceeded)):
        world.daemon.cli.ok("tenant", "update", "poor", "--image-bytes", str(most))
        error = refusal(person, reference)
        assert isinstance(error, expected) and error.hint, error
        until(lambda: not [*(store / "tmp").iterdir()], "nothing is left of it")
        assert sorted(store.glob("[bl]*/**/*")) == before
    world.daemon.cli.ok("tenant", "update", "poor", "--image-bytes", str(sum(content.values())))
    assert pull(person, reference)


def test_pulls_that_never_end_keep_nobody_else_from_pulling(world: World) -> None:
    """Four tenants have as many as they may, of a registry that stops to send."""
    people = [world.ann, *(member_of_new(world, f"slow{number}") for number in range(3))]
    world.registry.lines()
    reference = f"{OWN}:{PORT}/hang/app:1"
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: until(lambda: not pids(world.daemon), "they end with their clients"))
        for person in people * 4:
            process = stack.enter_context(person.cli.start("image", "pull", "--insecure", reference))
            stack.callback(process.kill)
        asked = 0
        while asked < 16:
            asked += f"/blobs/{outside.LAYERS[0]}" in world.registry.next()
        waiting = stack.enter_context(world.ann.cli.start("image", "pull", "--insecure", f"{OWN}:{PORT}/app:1"))
        assert pull(world.bob, f"{OWN}:{PORT}/app:1")
        assert waiting.poll() is None, "the fifth of a tenant waits for its own"
        process.kill()  # of another tenant
        assert pull(world.bob, f"{OWN}:{PORT}/app:1")
        assert waiting.poll() is None
        waiting.kill()
