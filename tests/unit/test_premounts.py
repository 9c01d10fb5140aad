"""Choice of mounts that are made before the others, for many containers alike, and the order that they must keep."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from insula.container.create.rootfs import API_FILESYSTEMS, PremountPlan

PATHS = ("/", "/proc", "/dev", "/dev/shm", "/dev/shm/x", "/dev/pts", "/sys", "/sys/fs", "/sys/fs/cgroup", "/mnt")
KINDS: dict[str, dict[str, Any]] = {
    "bind": {"type": "bind", "source": "/x", "options": ["rbind"]},
    "tmpfs": {"type": "tmpfs", "source": "tmpfs"},
    "read-only": {"type": "tmpfs", "source": "tmpfs", "options": ["ro"]},
    "proc": {"type": "proc", "source": "proc"},
}
entries = st.tuples(st.sampled_from(PATHS), st.sampled_from(sorted(KINDS)))


def plan(*wanted: tuple[str, str]) -> PremountPlan:
    mounts = [{"destination": path, **KINDS[kind]} for path, kind in wanted]
    return PremountPlan({"mounts": mounts, "linux": {"namespaces": [], "maskedPaths": [], "readonlyPaths": []}})


def lies_below(path: str, upper: str) -> bool:
    return path == upper or upper == "/" or path.startswith(f"{upper}/")


def test_a_mount_hidden_by_a_later_one_is_not_premounted() -> None:
    assert sorted(plan(("/dev", "tmpfs"), ("/dev/shm", "tmpfs")).entries) == [0, 1], "the control"
    assert sorted(plan(("/dev", "tmpfs"), ("/dev/shm/x", "bind"), ("/dev/shm", "tmpfs")).entries) == [0]
    assert sorted(plan(("/dev", "tmpfs"), ("/dev/shm", "bind"), ("/dev/shm/x", "tmpfs")).entries) == [0]
    assert sorted(plan(("/dev", "read-only"), ("/dev/shm", "tmpfs")).entries) == []


@given(st.lists(entries, max_size=6))
def test_no_premount_is_over_or_below_an_earlier_ordinary_mount(wanted: list[tuple[str, str]]) -> None:
    """So it makes no difference that it comes first: all that is premounted is so in the listed order."""
    premounted = plan(*wanted).entries
    for late in premounted:
        path, kind = wanted[late]
        assert kind in ("tmpfs", "proc")
        above = [wanted[early][0] for early in premounted if wanted[early][0] in API_FILESYSTEMS]
        assert path in API_FILESYSTEMS or any(lies_below(path, each) for each in above)
        for early in set(range(late)) - set(premounted):
            other = wanted[early][0]
            assert not lies_below(path, other) and not lies_below(other, path)
