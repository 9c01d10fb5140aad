"""The mounts of a table that are the host's, for `--no-pivot`."""

from __future__ import annotations

from insula.container.create import no_pivot

TABLE = rb"""1 1 0:1 / / rw - rootfs rootfs rw
22 1 0:20 / /proc rw shared:5 - proc proc rw
23 22 0:20 /sys /proc/sys ro - proc proc rw
24 1 0:21 / /sys rw - sysfs sysfs rw
30 1 0:30 / /a\040b\134 rw master:2 - proc other rw
41 40 0:40 / /srv/root/proc rw - proc proc rw
40 1 8:1 /x /srv/root rw - ext4 /dev/sda rw
42 41 0:40 /sys /srv/root/proc/sys ro - proc proc rw
"""


def test_all_but_what_lies_below_the_root() -> None:
    """A mount may have a lower ID than the one that it is on; the first of all is its own parent (rootfs)."""
    found = no_pivot._others(TABLE, 40)
    assert [mount.number for mount in found] == [1, 22, 23, 24, 30]
    assert [mount.number for mount in found if mount.reveals] == [22, 24, 30]
    assert found[-1].path == "/a b\\"
