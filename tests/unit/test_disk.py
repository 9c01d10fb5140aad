"""Disk quotas: default limits, project IDs, the reserve, and what a pool's file is."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from insula.cli.verbs.explain import disk_facts
from insula.control import disk
from insula.control.allocation.reservations import Allocators
from insula.control.disk import (
    DEFAULT_INODES,
    choose_project,
    disk_view,
    release_project,
    reserved_projects,
    resize_disk,
    shortage,
    with_disk_defaults,
)
from insula.kernel import capabilities, loop, quota
from insula.model.errors import Failed, Unavailable
from insula.model.objects import InstanceSpec, Limits, Resources
from insula.settings import Settings, StorageSettings
from insula.store.protocol import TransactionConflict
from insula.store.sqlite import SqliteStore
from insula.volume import pool
from insula.volume.drivers import open_quota
from insula.volume.measure import measured
from insula.volume.project import FIRST_PROJECT, PROJECTS
from insula.volume.quota import DiskLimit, DiskSpace, DiskUsage, ReservationOnly
from tests.support import objects

STORAGE = StorageSettings()
sizes = st.none() | st.integers(1 << 20, 1 << 50)
numbers = st.none() | st.integers(16, 1 << 40)


class CountingQuota(ReservationOnly):
    """Records limits, and says that each project has used 5 MiB and 50 inodes."""

    enforced = True

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, "")
        self.limits: dict[int, DiskLimit] = {}

    def limit(self, project: int, limit: DiskLimit) -> None:
        self.limits[project] = limit

    def usage(self, project: int) -> DiskUsage | None:
        return DiskUsage(5 << 20, 50)

    def release(self, project: int) -> None:
        self.limits.pop(project, None)


@given(sizes, numbers, sizes, numbers)
def test_an_instance_of_a_tenant_with_limits_always_has_limits(
    limit: int | None, inode_limit: int | None, disk: int | None, inodes: int | None
) -> None:
    given_ = Resources(disk=disk, inodes=inodes)
    found = with_disk_defaults(Limits(disk=limit, inodes=inode_limit), given_, STORAGE)
    assert (disk is None or found.disk == disk) and (inodes is None or found.inodes == inodes)
    assert (found.disk is None) == (disk is None and limit is None)
    assert (found.inodes is None) == (inodes is None and found.disk is None and inode_limit is None)
    if disk is None and limit is not None and found.disk is not None:
        assert found.disk <= min(limit, STORAGE.disk_bytes)
    if inodes is None and found.inodes is not None:
        assert found.inodes >= DEFAULT_INODES
    assert with_disk_defaults(Limits(disk=limit, inodes=inode_limit), found, STORAGE) == found


def test_project_ids_are_unique_random_and_released(tmp_path: Path) -> None:
    async def main() -> None:
        store = SqliteStore(tmp_path / "state.db")
        driver, settings = CountingQuota(tmp_path), Settings(root=tmp_path)
        rest: Any = {"disk": driver, "settings": settings, "store": store}
        context: Any = SimpleNamespace(host="here", allocators=Allocators(store), **rest)
        other: Any = SimpleNamespace(host="there", allocators=Allocators(store), **rest)
        chosen = {}

        async def reserve(host: Any, owner: str) -> disk.ChosenProject:
            while True:
                found = await choose_project(host, owner)
                assert found
                try:
                    await store.transact([found.reservation.absent()], [found.reservation.put()])
                    return found
                except TransactionConflict:  # the other host has the same one, once in 340 runs
                    host.allocators.invalidate([found.reservation])

        for number in range(200):
            found = await reserve(other if number == 7 else context, f"{number:032x}")
            chosen[f"{number:032x}"] = found.id
        assert len(set(chosen.values())) == 200
        assert all(FIRST_PROJECT <= each < FIRST_PROJECT + PROJECTS for each in chosen.values())
        assert 2000 < max(chosen.values()) - min(chosen.values()) < 65536, "random, in a window"
        theirs = chosen.pop(f"{7:032x}")
        assert await reserved_projects(context) == chosen, "those of this host"
        assert await reserved_projects(other) == {f"{7:032x}": theirs}
        gone, project = chosen.popitem()
        driver.limits[project] = DiskLimit(1, 1)
        await release_project(context, project, gone)
        assert await reserved_projects(context) == chosen and project not in driver.limits
        await store.close()

    asyncio.run(main())


def test_the_window_of_project_ids_is_that_of_the_root_directory_and_grows(tmp_path: Path) -> None:
    """So that two insulads on one file system have different ones, and xfs keeps few records."""

    async def ids(root: str, taken: int) -> set[int]:
        store: Any = SimpleNamespace()
        allocators = Allocators(store)
        allocators.of("disk-project")._taken = {str(-1 - number) for number in range(taken)}
        settings = Settings(root=Path(root))
        context: Any = SimpleNamespace(
            disk=CountingQuota(tmp_path), host="h", settings=settings, store=store, allocators=allocators
        )
        found = [await choose_project(context, "0" * 32) for _ in range(300)]
        return {each.id for each in found if each}

    first, second = asyncio.run(ids("/a", 0)), asyncio.run(ids("/b", 0))
    assert len(first) == len(second) == 300
    assert {each >> 16 for each in first} != {each >> 16 for each in second}
    assert len({each >> 16 for each in first}) == 1
    assert 2 <= len({each >> 16 for each in asyncio.run(ids("/a", 100_000))}) <= 4


def test_without_a_driver_that_enforces_there_are_no_project_ids(tmp_path: Path) -> None:
    context: Any = SimpleNamespace(disk=ReservationOnly(tmp_path, "none here"))
    assert asyncio.run(choose_project(context, "0" * 32)) is None


@pytest.mark.parametrize(
    ("reserve", "space", "short"),
    [
        ("1g", DiskSpace(100 << 30, 1 << 30, 0, 0), False),
        ("1g", DiskSpace(100 << 30, (1 << 30) - 1, 0, 0), True),
        ("1g", DiskSpace(200 << 20, 10 << 20, 0, 0), False),  # a twentieth
        ("1g", DiskSpace(200 << 20, (10 << 20) - 1, 0, 0), True),
        ("1g", DiskSpace(100 << 30, 50 << 30, 10**6, 1000), False),
        ("1g", DiskSpace(100 << 30, 50 << 30, 10**6, 999), True),
        ("0", DiskSpace(100 << 30, 0, 10**6, 0), False),
    ],
)
def test_the_reserve(monkeypatch: pytest.MonkeyPatch, reserve: str, space: DiskSpace, short: bool) -> None:
    monkeypatch.setattr(disk, "disk_space", lambda _: space)
    settings = Settings(root=Path("/"), storage=StorageSettings(reserve=reserve))
    found = shortage(ReservationOnly(Path("/"), ""), settings)
    assert (found is not None) is short


def test_a_limit_is_not_lowered_below_the_use(tmp_path: Path) -> None:
    driver = CountingQuota(tmp_path)

    def resize(before: Resources | None, **after: int | None) -> None:
        spec = InstanceSpec(image="x", resources=Resources(**after))
        resize_disk(driver, objects.instance(spec=spec, project_id=9), before)

    resize(Resources(disk=8 << 20), disk=5 << 20, inodes=50)
    assert driver.limits[9] == DiskLimit(5 << 20, 50)
    for after in ({"disk": (5 << 20) - 1}, {"inodes": 49}):
        with pytest.raises(Failed, match="on its disk, more than"):
            resize(Resources(disk=8 << 20), **after)
        assert driver.limits[9] == DiskLimit(5 << 20, 50)
    resize(Resources(disk=1 << 20, cpus=1.0), disk=1 << 20)  # it has more, but this limit is not what changed
    assert driver.limits[9] == DiskLimit(1 << 20, None)


def test_the_view_of_several_instances(tmp_path: Path) -> None:
    counted = [objects.instance(project_id=number) for number in (1, 2)]
    found = disk_view(CountingQuota(tmp_path), counted, Limits(disk=1 << 30))
    assert (found.used, found.inodes, found.limit, found.enforced) == (10 << 20, 100, 1 << 30, True)
    older = [*counted, objects.instance()]
    found = disk_view(CountingQuota(tmp_path), older, Limits())
    assert (found.used, found.enforced) == (None, False), "a part of it is not counted"
    assert disk_view(ReservationOnly(tmp_path, ""), [], Limits()).used is None


@pytest.mark.parametrize(
    ("used", "limit", "enforced", "words"),
    [
        (5 << 20, 1 << 30, True, "5M of at most 1G"),
        (5 << 20, None, True, "5M, no limit"),
        (None, 1 << 30, False, "not counted of at most 1G, which the kernel does not enforce here"),
        (None, None, False, "not counted, no limit"),
    ],
)
def test_explain_tells_what_enforces_a_limit(used: int | None, limit: int | None, enforced: bool, words: str) -> None:
    view = {"used": used, "limit": limit, "inodes": None, "inodes_limit": 7, "enforced": enforced}
    assert disk_facts(view) == {"on disk": words, "files and directories": "not counted of at most 7"}


def test_nothing_is_written_while_the_pool_is_not_there(tmp_path: Path) -> None:
    driver = ReservationOnly(tmp_path, "it is broken", trouble="it is broken")
    with pytest.raises(Unavailable, match="it is broken"):
        driver.assign(1, [tmp_path])


def test_a_tree_is_measured(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(1 << 20))
    (tmp_path / "-odd\nname").mkdir()
    space = asyncio.run(measured(tmp_path))
    assert space is not None and 1 << 20 <= space < 2 << 20
    assert asyncio.run(measured(tmp_path, inodes=True)) == 3
    assert asyncio.run(measured(tmp_path / "gone")) is None


def test_the_sizes_of_the_kernels_structs() -> None:
    assert quota._DQBLK.size == 72 and quota._FSXATTR.size == 28 and loop._CONFIG.size == 304


def test_a_file_systems_kind_is_told_by_its_content(tmp_path: Path) -> None:
    for name, content in (("xfs", b"XFSB"), ("ext4", bytes(1080) + b"\x53\xef"), ("other", bytes(2000))):
        (tmp_path / name).write_bytes(content)
        fd = os.open(tmp_path / name, os.O_RDONLY)
        try:
            if name == "other":
                with pytest.raises(Failed, match="neither"):
                    pool._kind(fd)
            else:
                assert pool._kind(fd) == name
        finally:
            os.close(fd)


def test_a_directory_on_a_file_system_without_quotas(tmp_path: Path) -> None:
    found = open_quota(tmp_path / "missing")
    assert not found.enforced and found.refutation()


def test_a_capability_is_given_up_and_taken_again() -> None:
    before = capabilities.current()
    with capabilities.Lowered(capabilities.to_mask(["SYS_RESOURCE"])):
        during = capabilities.current()
        assert not during.effective & capabilities.to_mask(["SYS_RESOURCE"])
        assert during.permitted == before.permitted
    assert capabilities.current() == before


def test_a_stored_instance_without_the_new_fields_is_read() -> None:
    stored = msgspec.to_builtins(objects.instance())
    del stored["project_id"]
    for name in ("disk", "inodes"):
        del stored["spec"]["resources"][name]
    assert msgspec.convert(stored, type(objects.instance())) == objects.instance()
