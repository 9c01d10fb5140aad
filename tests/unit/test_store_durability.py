"""Commits that need not be on the disk at once: for what would be done again, should the host lose its power."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import threading
from pathlib import Path

from insula.store.protocol import Put
from insula.store.sqlite import SqliteStore


def test_a_commit_that_is_not_durable_is_not_synced_before_the_next_one(tmp_path: Path) -> None:
    """Unless another one in its group is. It survives kill -9 all the same, and what was flushed is there as well."""
    path = tmp_path / "state.db"

    async def main() -> None:
        store = SqliteStore(path)

        def synced() -> bool:
            return bool(store._tables.connection.execute("PRAGMA synchronous").fetchone() == (2,))

        await store.transact([], [Put("/a", b"1")])
        assert synced()
        await store.transact([], [Put("/b", b"2")], durable=False)
        assert not synced()
        await store.flush()
        await store.put("/c", b"3")
        assert synced()
        held = threading.Event()
        beside = [store._read(held.wait), store.transact([], [Put("/d", b"4")], durable=False), store.put("/e", b"5")]
        waiting = [asyncio.ensure_future(each) for each in beside]
        await asyncio.sleep(0)
        held.set()
        await asyncio.gather(*waiting)
        assert synced()
        await store.transact([], [Put("/f", b"6")], durable=False)
        os.kill(os.getpid(), signal.SIGKILL)

    if (child := os.fork()) == 0:
        try:
            asyncio.run(main())
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    connection = sqlite3.connect(path)
    assert [key for (key,) in connection.execute("SELECT key FROM entries ORDER BY key")] == [f"/{c}" for c in "abcdef"]
    connection.close()
