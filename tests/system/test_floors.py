"""Floors of CPU and memory at work: what a tenant's group gets while another one takes all it can."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from insula.control.instances.drivers.groups import TenantGroups
from insula.kernel.cgroups import Cgroup, hierarchy
from insula.model.guarantees import Floors
from insula.model.objects import Tenant
from tests.support.groups import inside, running, spin
from tests.support.machine import Run
from tests.support.wait import until

MIB = 1 << 20
CPUS = len(os.sched_getaffinity(0))


@pytest.fixture
def tenants(run_: Run) -> Iterator[TenantGroups]:
    """The groups of acme and globex."""
    groups = TenantGroups(f"{run_.name}-floors")
    for index, name in enumerate(("acme", "globex"), 1):
        groups.ensure(Tenant(name=name, index=index, id_base=index << 16, created=0.0))
    try:
        yield groups
    finally:
        Cgroup(groups.prefix).kill()
        groups.take_down()


def test_a_busy_tenant_leaves_the_promised_processors_to_another(tenants: TenantGroups) -> None:
    """Both have a process that is always busy, on the same processor."""
    one = min(os.sched_getaffinity(0))

    def work() -> None:
        os.sched_setaffinity(0, {one})
        spin()

    def share() -> float:
        """How many times acme has what globex has."""
        groups = [tenants.group(name) for name in ("acme", "globex")]
        before = [group.counters()[1] for group in groups]
        time.sleep(1)
        acme, globex = (group.counters()[1] - each for group, each in zip(groups, before, strict=True))
        return acme / max(globex, 1e-6)

    with ExitStack() as busy:
        for name in ("acme", "globex"):
            busy.enter_context(running(tenants.group(name), work))
        until(lambda: 0.3 < share() < 3, "both have as much")
        tenants.promise("acme", Floors(cpus=min(0.5, CPUS * 0.9), shared=True))
        tenants.promise("globex", Floors(shared=True))
        until(lambda: share() > 10, "the one with a floor has it")
        tenants.promise("globex", Floors(cpus=min(0.5, CPUS * 0.9), shared=True))
        until(lambda: 0.3 < share() < 3, "both have a floor")


@pytest.mark.skipif(hierarchy().version == 1, reason="with version 1 memory has no protection (docs/networking.md)")
def test_memory_below_the_floor_is_not_reclaimed_for_another(tenants: TenantGroups, tmp_path: Path) -> None:
    """All tenants together have 64 MiB. globex reads files through its part of the page cache, 256 MiB in all."""
    Cgroup(tenants.prefix).limit({"memory": {"limit": 64 * MIB}})
    files = {"acme": tmp_path / "acme", "globex": tmp_path / "globex"}
    for name, size in (("acme", 24), ("globex", 256)):
        files[name].write_bytes(bytes(size * MIB))

    def read(name: str) -> None:
        with files[name].open("rb", buffering=0) as file:
            while file.read(MIB):
                pass

    def left() -> int:
        """What acme has in the page cache, after globex has read its file."""
        for file in files.values():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        for name in files:
            inside(tenants.group(name), lambda name=name: read(name))  # type: ignore[misc]
        stat = Path(tenants.group("acme").directory("memory") or "", "memory.stat").read_text()
        return int(dict(line.split() for line in stat.splitlines())["file"])

    assert left() < 12 * MIB, "the control"
    tenants.promise("acme", Floors(memory=32 * MIB, all_memory=32 * MIB))
    assert left() > 20 * MIB
    tenants.promise("acme", Floors())
    assert left() < 12 * MIB
