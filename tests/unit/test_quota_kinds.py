"""The table of quotas, the usage that is counted by it, and its recount from stored objects."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from insula.control.allocation import quotas
from insula.control.allocation.in_flight import InFlight
from insula.control.allocation.quotas import add, change, check_covers, of_images, of_instance, subtract, total
from insula.control.allocation.recount import _COUNTS, migrate, outdated, recount, repair, repair_all
from insula.control.keys import (
    ADDRESS_GROUPS,
    FLOATING_IPS,
    IMAGES,
    INSTANCES,
    LOAD_BALANCERS,
    NETWORKS,
    POLICIES,
    PRINCIPALS,
    ROUTERS,
    TENANTS,
    TOKENS,
    USAGE,
)
from insula.model.errors import Failed, QuotaExceeded
from insula.model.floating_ips import FloatingIp
from insula.model.load_balancers import LoadBalancer
from insula.model.objects import Image, ImageConfig, InstanceSpec, Limits, Network, PublishedPort, Resources, Tenant
from insula.model.policies import AddressGroup, Policy, Selector
from insula.model.principals import Principal, Token
from insula.model.quotas import NOW, QUOTAS, STORED, TABLE, Quota
from insula.model.routers import Router
from insula.model.views import LimitsPatch, Usage
from insula.settings import default_of
from insula.store.protocol import Put
from insula.store.sqlite import SqliteStore
from tests.support import objects

NAMES = [quota.name for quota in TABLE]
ACME = Tenant(name="acme", index=1, id_base=1 << 30, created=0.0)


def limited(**limits: Any) -> Tenant:
    return msgspec.structs.replace(ACME, limits=Limits(**limits))


def image(name: str, **content: int) -> Image:
    return Image(
        tenant="acme",
        name=name,
        digest=f"sha256:{name}",
        config_digest="",
        layers=[],
        size=1,
        config=ImageConfig(),
        created=0.0,
        content=content,
    )


# -- the table -----------------------------------------------------------------------------------------------------


def test_a_line_of_the_table_is_all_that_a_quota_takes() -> None:
    """It is a limit, a change of one, and a usage if it is counted; an option and a setting (their tests)."""
    assert list(Limits.__struct_fields__) == list(LimitsPatch.__struct_fields__) == NAMES
    assert list(Usage.__struct_fields__) == [quota.name for quota in (*STORED, *NOW)]
    assert sorted(name for names in _COUNTS.values() for name in names) == sorted(quota.name for quota in STORED)
    assert tuple(name for name in quotas.OF_INSTANCES if QUOTAS[name].counted == "store") == quotas.OF_INSTANCES


def test_the_table_in_the_documentation_is_that_of_the_code() -> None:
    text = (Path(__file__).parents[2] / "docs" / "tenancy.md").read_text()
    rows = re.findall(r"^\| `(--[a-z-]+)` \| (\S+) \| [a-z ]+ \| (.+) \|$", text, re.M)
    assert rows == [(quota.option, str(default_of(f"quotas.{quota.name}")), quota.text) for quota in TABLE]


def test_tenants_of_earlier_versions_have_no_new_limits() -> None:
    """So that an upgrade takes nothing from them."""
    stored = {"name": "acme", "index": 1, "id_base": 1 << 30, "limits": {"cpus": 1.5}, "labels": {}, "created": 0.0}
    limits = msgspec.json.decode(msgspec.json.encode(stored), type=Tenant).limits
    assert msgspec.to_builtins(limits) == {**dict.fromkeys(NAMES), "cpus": 1.5, "pids": 16384}


@pytest.mark.parametrize("quota", STORED, ids=lambda quota: quota.name)
def test_a_refusal_tells_the_limit_the_use_and_what_is_left(quota: Quota) -> None:
    limit, used, asked = (3, 2, 2) if quota.whole else (3.0, 2.5, 1.0)
    usage = Usage(**{quota.name: used})
    with pytest.raises(QuotaExceeded) as refused:
        add(limited(**{quota.name: limit}), usage, Usage(**{quota.name: asked}))
    left = quota.show(limit - used)
    assert f"tenant acme may {'use' if quota.unit else 'have'} {quota.show(limit)} " in refused.value.message
    assert refused.value.message.endswith(f": {left} left") and quota.what in refused.value.message
    assert quota.option in str(refused.value.hint) and "\n" not in str(refused.value)
    add(limited(**{quota.name: limit}), usage, Usage(**{quota.name: limit - used}))


@pytest.mark.parametrize("quota", STORED, ids=lambda quota: quota.name)
def test_no_limit_may_be_lowered_below_what_is_in_use(quota: Quota) -> None:
    usage = Usage(**{quota.name: 5})
    with pytest.raises(QuotaExceeded, match="in use, not"):
        check_covers(ACME, Limits(**{quota.name: 4}), usage)
    check_covers(ACME, Limits(**{quota.name: 5}), usage)
    check_covers(ACME, Limits(**{quota.name: None}), usage)


_AMOUNTS = st.fixed_dictionaries(
    {}, optional={quota.name: st.integers(0, 50) if quota.whole else st.integers(0, 800).map(lambda n: n / 100)
                  for quota in STORED}
).map(lambda fields: Usage(**fields))  # fmt: skip


@given(st.lists(st.tuples(st.sampled_from(["add", "change", "remove"]), _AMOUNTS), max_size=20), _AMOUNTS)
def test_whatever_happens_the_usage_is_the_sum_of_what_is_there(steps: list[tuple[str, Usage]], most: Usage) -> None:
    """Refused steps change nothing, and no quota is ever exceeded."""
    tenant = limited(**{quota.name: 3 * getattr(most, quota.name) for quota in STORED})
    there: list[Usage] = []
    usage = Usage()
    for what, amount in steps:
        try:
            if what == "add":
                usage = add(tenant, usage, amount)
                there.append(amount)
            elif what == "change" and there:
                usage = change(tenant, usage, there[0], amount)
                there[0] = amount
            elif what == "remove" and there:
                usage = subtract(usage, there.pop())
        except QuotaExceeded:
            pass
        for quota in STORED:
            whole = sum(getattr(each, quota.name) for each in there)
            assert getattr(usage, quota.name) == pytest.approx(whole, abs=1e-6)
            assert whole <= getattr(tenant.limits, quota.name) + 1e-6


def test_content_that_two_images_share_counts_once() -> None:
    found = of_images([image("a", x=5, y=7), image("b", y=7, z=1)])
    assert (found.images, found.image_bytes) == (2, 13)
    [one, two] = (of_images([each]).config_bytes for each in (image("a", x=5, y=7), image("b", y=7, z=1)))
    assert found.config_bytes == one + two and one > 100, "the record of each counts"
    assert of_images([image("a", x=5), image("a2", x=5)]).image_bytes == 5
    old = msgspec.structs.replace(image("old"), size=9)
    assert of_images([old]).image_bytes == 9, "one of an earlier version counts its size"


def test_an_instance_counts_the_most_that_its_log_may_take() -> None:
    spec = InstanceSpec(image="x", resources=Resources(cpus=0.5), log_size=1 << 20, log_files=4)
    found = of_instance(spec)
    assert found == Usage(instances=1, cpus=0.5, ports=1, log_bytes=4 << 20, spec_bytes=found.spec_bytes)


def test_an_instance_counts_what_its_record_takes_whatever_its_name() -> None:
    spec = InstanceSpec(image="x", command=["true"])
    found = of_instance(spec).spec_bytes
    assert 500 < found < 2000
    assert of_instance(msgspec.structs.replace(spec, name="n" * 63)).spec_bytes == found
    for more in ({"command": ["true", "y" * 1000]}, {"labels": {"y": "y" * 1000}}, {"env": {"y": "y" * 1000}}):
        assert 1000 <= of_instance(msgspec.structs.replace(spec, **more)).spec_bytes - found < 1020
    assert of_instance(spec, ImageConfig(labels={"y": "y" * 1000})).spec_bytes - found > 1000


# -- what open requests hold ---------------------------------------------------------------------------------------


def test_open_requests_hold_no_more_than_the_limit() -> None:
    limits = {"acme": Limits(exec_sessions=2, upload_bytes=10), "globex": Limits(exec_sessions=1)}
    in_flight = InFlight(lambda tenant: limits[tenant], 1)
    held = [in_flight.of_tenant("acme", "exec_sessions") for _ in range(3)]
    held[0].take()
    held[1].take()
    with pytest.raises(QuotaExceeded, match="tenant acme may have 2 open sessions and has 2: 0 left"):
        held[2].take()
    held[2].release()  # of nothing
    upload = in_flight.of_tenant("acme", "upload_bytes")
    upload.take(6)
    with pytest.raises(QuotaExceeded, match="10B of uploads and has 6B in use, 5B asked: 4B left"):
        upload.take(5)
    assert in_flight.complete("acme", Usage(images=1)) == Usage(images=1, exec_sessions=2, upload_bytes=6)
    in_flight.of_tenant("globex", "exec_sessions").take()  # which another tenant's limit does not concern
    in_flight.of_user("ann").take()
    with pytest.raises(QuotaExceeded, match="user ann may have 1 open streams"):
        in_flight.of_user("ann").take()
    in_flight.of_user("ben").take()
    for each in (*held, upload):
        each.release()
        each.release()  # twice is once
    held[2].take()
    assert in_flight.complete("acme", Usage()) == Usage(exec_sessions=1)


# -- recounts ------------------------------------------------------------------------------------------------------


def in_store(path: Path, work: Callable[[SqliteStore], Awaitable[None]]) -> None:
    async def main() -> None:
        store = SqliteStore(path / "state.db")
        try:
            await work(store)
        finally:
            await store.close()

    asyncio.run(main())


async def populate(store: SqliteStore) -> Usage:
    """Two tenants, and objects of each kind of one; returns what it uses."""
    network = Network(tenant="acme", name="n", index=1, vni=5000, subnet="10.0.0.0/24", gateway="10.0.0.1", created=0.0)
    accounts = [Principal(id="1", name="ci", tenant="acme", created=0.0), Principal(id="2", name="ann", created=0.0)]
    tokens = [Token(id=f"t{n}", principal=f"{n}", digest="", created=0.0, expires=1.0) for n in (1, 2)]
    resources = Resources(cpus=0.25, memory=64 << 20, disk=1 << 30, inodes=500)
    spec = InstanceSpec(image="x", resources=resources, published=[PublishedPort(port=8000, target=80, count=5)])
    floating = FloatingIp(tenant="acme", name="f", address="203.0.113.7", created=0.0)
    puts = [
        TENANTS.put(ACME, "acme"),
        TENANTS.put(msgspec.structs.replace(ACME, name="globex"), "globex"),
        *(INSTANCES.put(objects.instance(name=name, spec=spec), "acme", name) for name in ("a", "b")),
        NETWORKS.put(network, "acme", "n"),
        ROUTERS.put(Router(tenant="acme", name="r", created=0.0), "acme", "r"),
        POLICIES.put(Policy(tenant="acme", name="p", select=Selector(), directions=["in"], created=0.0), "acme", "p"),
        ADDRESS_GROUPS.put(AddressGroup(tenant="acme", name="g", cidrs=["10.0.0.0/8"], created=0.0), "acme", "g"),
        FLOATING_IPS.put(floating, "acme", "f"),
        LOAD_BALANCERS.put(
            LoadBalancer(tenant="acme", name="l", index=1, listen=[], on=[], reached=[], port=80, created=0.0),
            "acme",
            "l",
        ),
        *(IMAGES.put(each, "acme", each.name) for each in (image("i", x=3, y=4), image("j", y=4))),
        IMAGES.put(image("shared", s=100), "_", "shared"),
        *(PRINCIPALS.put(each, each.tenant or "_", each.name) for each in accounts),
        *(TOKENS.put(each, each.id) for each in tokens),
    ]
    await store.transact([], puts)
    return Usage(
        instances=2,
        cpus=0.5,
        memory=128 << 20,
        disk=2 << 30,
        inodes=1000,
        spec_bytes=2 * of_instance(spec).spec_bytes,
        log_bytes=60 << 20,
        networks=1,
        ports=2,
        routers=1,
        policies=1,
        address_groups=1,
        published_ports=10,
        floating_ips=1,
        load_balancers=1,
        images=2,
        image_bytes=7,
        config_bytes=of_images([image("i", x=3, y=4), image("j", y=4)]).config_bytes,
        service_accounts=1,
        tokens=1,
    )


def test_a_recount_counts_every_stored_object(tmp_path: Path) -> None:
    async def work(store: SqliteStore) -> None:
        expected = await populate(store)
        assert all(getattr(expected, quota.name) for quota in STORED), "each kind is there"
        assert await recount(store, "acme") == expected
        assert await recount(store, "globex") == Usage()

    in_store(tmp_path, work)


def test_usage_that_an_earlier_version_stored_is_counted_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def work(store: SqliteStore) -> None:
        expected = await populate(store)
        old = b'{"instances": 2, "cpus": 0.5, "memory": 134217728}'
        await store.transact([], [Put("/usage/acme", old), USAGE.put(Usage(), "globex")])
        await migrate(store)
        found = await USAGE.get(store, "acme")
        assert found and found.value == expected
        entry = await store.get("/usage/acme")
        assert entry and not outdated(entry)
        await migrate(store)
        again = await USAGE.get(store, "acme")
        assert again and again.revision == found.revision, "it is not counted again"

    caplog.set_level(logging.INFO)
    in_store(tmp_path, work)
    assert [r.message for r in caplog.records if "earlier version" in r.message] == [
        "the usage of tenant acme was recorded by an earlier version, and is counted anew"
    ]


@pytest.mark.parametrize("wrong", [Usage(), Usage(instances=9, networks=9, tokens=9)])
def test_drift_is_repaired_and_logged(tmp_path: Path, wrong: Usage, caplog: pytest.LogCaptureFixture) -> None:
    async def work(store: SqliteStore) -> None:
        expected = await populate(store)
        await store.transact([], [USAGE.put(wrong, "acme"), USAGE.put(Usage(), "globex")])
        await repair_all(store)
        assert [r.message for r in caplog.records if "counted anew" in r.message] == [
            f"the usage of tenant acme was recorded as {wrong}, and is counted anew"
        ]
        found = await USAGE.get(store, "acme")
        assert found and found.value == expected
        assert await repair(store, "acme") is None, "nothing is left to repair"

    in_store(tmp_path, work)


def test_a_damaged_object_leaves_its_kind_as_it_was(tmp_path: Path) -> None:
    async def work(store: SqliteStore) -> None:
        expected = await populate(store)
        before = msgspec.structs.replace(expected, networks=9, instances=4)
        await store.transact([], [USAGE.put(before, "acme"), Put("/instances/acme/c", b"[]")])
        assert await repair(store, "acme") == before
        with pytest.raises(Failed, match="damaged"):
            await recount(store, "acme")
        found = await USAGE.get(store, "acme")
        assert found and found.value == msgspec.structs.replace(expected, instances=4)

    in_store(tmp_path, work)


def test_a_damaged_usage_is_counted_anew_and_that_of_no_tenant_is_left(tmp_path: Path) -> None:
    async def work(store: SqliteStore) -> None:
        expected = await populate(store)
        await store.transact([], [Put("/usage/acme", b"[]"), USAGE.put(Usage(images=3), "gone")])
        await migrate(store)
        found, gone = await USAGE.get(store, "acme"), await USAGE.get(store, "gone")
        assert found and found.value == expected
        assert gone and gone.value == Usage(images=3)
        assert await repair(store, "gone") is None

    in_store(tmp_path, work)


def test_totals_know_no_limit() -> None:
    assert total(Usage(images=1, cpus=0.1), Usage(images=2, cpus=0.2)) == Usage(images=3, cpus=0.3)
