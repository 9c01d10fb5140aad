"""Names, numbers and sets of capabilities."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from insula.kernel import capabilities as caps
from insula.model.errors import Invalid


def test_numbers_are_the_kernel_headers() -> None:
    assert caps.NUMBERS["CAP_CHOWN"] == 0
    assert caps.NUMBERS["CAP_NET_ADMIN"] == 12
    assert caps.NUMBERS["CAP_SYS_ADMIN"] == 21
    assert caps.NUMBERS["CAP_SETFCAP"] == 31
    assert caps.NUMBERS["CAP_CHECKPOINT_RESTORE"] == 40


def test_default_is_the_fourteen_of_docker() -> None:
    names = caps.to_names(caps.DEFAULT)
    assert len(names) == 14
    assert "CAP_CHOWN" in names
    assert not {"CAP_SYS_ADMIN", "CAP_NET_ADMIN", "CAP_SYS_PTRACE", "CAP_DAC_READ_SEARCH"} & set(names)


@given(st.sets(st.sampled_from(caps.NAMES)))
def test_masks_and_names_are_inverse(names: set[str]) -> None:
    assert set(caps.to_names(caps.to_mask(names))) == names


@pytest.mark.parametrize("name", ["NET_ADMIN", "net_admin", "CAP_NET_ADMIN", "cap_net_admin"])
def test_every_spelling(name: str) -> None:
    assert caps.normalise(name) == "CAP_NET_ADMIN"


@pytest.mark.parametrize(
    "name", ["", "CAP_", "ALL", "NET ADMIN", "CAP_CAP_CHOWN", "x" * 10000, "CHOWN\0", "ſYS_ADMIN\n"]
)
def test_unknown_names_are_refused_in_one_short_line(name: str) -> None:
    with pytest.raises(Invalid) as caught:
        caps.normalise(name)
    assert caught.value.hint
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


def test_adjust_is_dockers() -> None:
    admin, chown = caps.to_mask(["SYS_ADMIN"]), caps.to_mask(["CHOWN"])
    assert caps.adjust(caps.DEFAULT) == caps.DEFAULT
    assert caps.adjust(caps.DEFAULT, add=["sys_admin"]) == caps.DEFAULT | admin
    assert caps.adjust(caps.DEFAULT, drop=["CHOWN"]) == caps.DEFAULT & ~chown
    assert caps.adjust(caps.DEFAULT, add=["CHOWN"], drop=["all"]) == chown
    assert caps.adjust(caps.DEFAULT, add=["ALL"], drop=["CAP_SYS_ADMIN"]) == caps.ALL & ~admin
    assert caps.adjust(caps.DEFAULT, add=["CHOWN"], drop=["CHOWN"]) & chown


MASKS = st.integers(0, caps.ALL)


@given(st.tuples(MASKS, MASKS, MASKS, MASKS, MASKS), st.sampled_from(range(5)), st.integers(0, 40))
def test_sets_are_equal_if_all_five_are(masks: tuple[int, ...], changed: int, bit: int) -> None:
    """Other tests compare by it."""
    sets = caps.Capabilities(*masks)
    assert (sets.bounding, sets.effective, sets.permitted, sets.inheritable, sets.ambient) == tuple(sets) == masks
    same, other = caps.Capabilities(*masks), list(masks)
    other[changed] ^= 1 << bit
    assert sets == same and hash(sets) == hash(same)
    assert sets != caps.Capabilities(*other)
    assert sets != masks, "a tuple is no sets of capabilities"
    swapped = [masks[1], masks[0], *masks[2:]]
    assert (sets == caps.Capabilities(*swapped)) == (masks[0] == masks[1])


def test_sets_of_the_spec() -> None:
    given = {
        "bounding": ["CAP_CHOWN", "CAP_KILL"],
        "effective": [],
        "permitted": ["CAP_KILL"],
        "inheritable": ["CAP_SYS_ADMIN"],
        "ambient": ["CAP_CHOWN", "CAP_KILL"],
    }
    sets = caps.Capabilities.from_oci(given)
    assert {field: caps.to_names(getattr(sets, field)) for field in given} == given
    assert caps.Capabilities.from_oci(None) == caps.Capabilities()
    with pytest.raises(Invalid):
        caps.Capabilities.from_oci({"effective": ["CAP_EVERYTHING"]})
