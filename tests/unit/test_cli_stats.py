"""The figures of `stats`, `top` and `update` as text."""

from __future__ import annotations

import pytest

from insula.cli.options import Arguments, UsageError
from insula.cli.verbs import stats, usage
from insula.cli.verbs.tenant import changes
from insula.cli.verbs.top import spent


def test_processor_time() -> None:
    assert [spent(seconds) for seconds in (0, 0.254, 59.9, 65, 7265.4)] == [
        "0.00s",
        "0.25s",
        "59.90s",
        "1:05",
        "2:01:05",
    ]


def test_a_row_of_stats() -> None:
    shown = {
        "tenant": "acme", "name": "web\x1b[2J", "state": "running", "cpu": 1.234, "cpu_limit": 2.0, "cpu_time": 1,
        "throttled": 0, "memory": 3 << 20, "memory_limit": None, "pids": 2, "pids_limit": None, "received": 1536,
        "sent": None, "read": 0, "written": 5 << 30, "disk": 3 << 20, "disk_limit": 5 << 30,
        "pressure": {"cpu": {"some": 12.4, "full": 0.2}, "io": {"some": 1.0}},
    }  # fmt: skip
    words = ["123.4%", "3M", "-", "2", "1.5K", "-", "0B", "5G", "3M/5G", "cpu 12/0 io 1/0"]
    assert ["-" if cell is None else cell for cell in stats.row(shown, False)][1:] == words
    assert stats.row(shown, True)[:2] == ["acme", "web\x1b[2J"], "the table escapes it"
    gone = dict.fromkeys(shown, None) | {"tenant": "acme", "name": "web", "state": "exited", "pressure": {}}
    assert [cell for cell in stats.row(gone, False)[1:] if cell not in (None, "-")] == []


def test_a_row_of_usage() -> None:
    used = {
        "cpu": 3_725_000_000_000, "received": 1536, "received_packets": 3, "sent": 0, "sent_packets": 0,
        "memory": 1.5 * (1 << 30) * 3600, "memory_sampled": 3600.0, "memory_unsampled": 4.25,
    }  # fmt: skip
    reserved = {"instances": 7200.0, "cpus": 3600.0, "memory": 3600.0 * (2 << 30)}
    images = {"received": 1000, "received_packets": 2, "sent": 24, "sent_packets": 1}
    shown = {"tenant": "acme", "since": 0.0, "until": 1.0, "used": used, "other_cpu": 250_000_000, "images": images}
    shown["reserved"] = reserved
    assert usage.row(shown)[2:] == ["1:02:05", "0.25s", "1:00:00", "1.5Gh", "2Gh", "1.5K", "0B", "1K"]
    assert len(usage.row(shown)) == len(usage.HEADER)
    assert usage.of_instance(used) == ["1:02:05", "1.5Gh", "4.25s", "1.5K", "0B"]


def test_none_and_nothing_of_limits() -> None:
    given = Arguments()
    given.cpus, given.memory, given.pids = 0.5, "none", None
    assert changes(given, "cpus", "memory", "pids") == {"cpus": 0.5, "memory": None}
    given.cpus = given.memory = None
    with pytest.raises(UsageError, match="nothing to change"):
        changes(given, "cpus", "memory", "pids")
