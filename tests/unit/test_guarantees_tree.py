"""The tree of classes as data: rates add up, and whatever is admitted fits below the root."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from insula.kernel.netlink.traffic_control import same_class
from insula.model.guarantees import PortRates, Rate, Shaping
from insula.network.linux.guarantees import program, tree

LINK = 10_000_000_000
floors = st.lists(st.integers(8_000, LINK), min_size=1, max_size=20)


@given(floors, st.integers(8_000, 10 * LINK))
def test_floors_that_fit_into_the_link_are_the_rates_of_their_classes(wanted: list[int], ceiling: int) -> None:
    fitting: list[int] = []
    for each in wanted:
        if sum(fitting) + each <= tree.usable(LINK):
            fitting.append(each)
    root = tree.root_class(LINK)
    total = 0
    for index, each in enumerate(fitting):
        classes = tree.tenant_classes(index, Shaping(link=LINK, out=Rate(floor=each, ceiling=ceiling)), "out")
        own, rest = classes[tree.tenant(index)], classes[tree.rest(index)]
        assert own.rate == min(each, ceiling)
        assert own.ceiling == min(ceiling, root.rate)
        assert (rest.rate, rest.ceiling) == (own.rate, own.ceiling)
        assert own.rate <= own.ceiling
        total += own.rate
    assert total <= root.rate


@given(st.dictionaries(st.integers(0, 30_000), st.integers(8_000, 1_000_000), max_size=20), st.integers(0, 12_287))
def test_instances_share_the_floor_of_their_tenant(each: dict[int, int], tenant: int) -> None:
    floor = sum(each.values()) + 8_000
    ports = {port: PortRates(number=number, out=Rate(floor=each[number])) for port, number in enumerate(each)}
    classes = tree.tenant_classes(tenant, Shaping(link=LINK, out=Rate(floor=floor), ports=ports), "out")
    below = [one for one in classes.values() if one.parent == tree.tenant(tenant)]
    assert sum(one.rate for one in below) == floor
    assert len(classes) == len(each) + 2
    assert len({one.number for one in classes.values()}) == len(classes)
    assert all(tree.tenant_index(one.number) == tenant for one in classes.values() if one.parent == tree.root())
    assert {one.number for one in classes.values() if tree.is_instance(one.number)} == set(map(tree.instance, each))
    unshaped = tree.tenant_classes(tenant, Shaping(link=LINK, out=Rate(floor=floor), ports=ports), "in")
    assert len(unshaped) == 2, "the other direction has no floors"


@given(st.integers(8_000, 400_000_000_000))
def test_a_burst_is_short_and_a_queue_too(rate: int) -> None:
    assert tree.burst(rate) <= max(rate / 8 * 0.010, 3_200)
    assert tree.queue(rate) >= 65_536


def test_what_is_unused_is_shared_in_proportion_to_floors() -> None:
    one, other = (tree.htb_class(1, 0, floor * 1_000_000, 500_000_000, 500_000_000) for floor in (200, 25))
    assert one.quantum / other.quantum == pytest.approx(8, rel=0.01)
    none = tree.htb_class(1, 0, tree.LEAST, 500_000_000, 500_000_000)
    assert 1_514 <= none.quantum < other.quantum


def test_rounding_of_the_kernel_is_no_difference_and_anything_else_is() -> None:
    one = tree.htb_class(1, 0, 10_000_001, 20_000_003, 500_000_000)
    assert same_class(one, replace(one, burst=one.burst - 1))
    for other in ({"rate": 10_000_100}, {"ceiling": 8_000}, {"quantum": 1_600}, {"burst": 1_000}, {"parent": 7}):
        assert not same_class(one, replace(one, **other)), other


def test_the_name_of_a_program_tells_what_it_does() -> None:
    rest = tree.rest(1)
    one = program.classifier(rest, {"100.64.128.1": 7, "fd00::1": 7}, source=True)
    names = {
        program.name(each)
        for each in (
            one,
            program.classifier(rest, {}, source=True),
            program.classifier(rest + 1, {}, source=True),
            program.classifier(rest, {"100.64.128.1": 7, "fd00::1": 7}, source=False),
            program.classifier(rest, {"100.64.128.2": 7}, source=True),
        )
    }
    assert len(names) == 5
    assert program.name(one) == program.name(program.classifier(rest, {"fd00::1": 7, "100.64.128.1": 7}, source=True))
