"""Any sequence of store operations does the same as on a dict: hypothesis looks for one that doesn't."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from insula.store.protocol import Compare, Delete, Entry, Put, Snapshot, Store, TransactionConflict, Write
from insula.store.sqlite import SqliteStore

KEYS = st.sampled_from(["/a", "/a/b", "/a/c", "/b", "/b/\x7e"])
VALUES = st.binary(max_size=3)


class StoreMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="insula-store-"))
        self.loop = asyncio.new_event_loop()
        self.model: dict[str, Entry] = {}
        self.revision = 0
        self.watched: dict[str, bytes] = {}
        self.leases: dict[int, set[str]] = {}

    def open(self) -> Store:
        return SqliteStore(self.directory / "state.db")

    @initialize()
    def start(self) -> None:
        self.store = self.open()

    @rule()
    def reopen(self) -> None:
        self.loop.run_until_complete(self.store.close())
        self.store = self.open()

    @rule(
        compares=st.dictionaries(KEYS, st.booleans(), max_size=3),
        writes=st.dictionaries(KEYS, st.none() | VALUES, max_size=4),
        data=st.data(),
    )
    def transact(self, compares: dict[str, bool], writes: dict[str, bytes | None], data: st.DataObject) -> None:
        lease = data.draw(st.none() | st.sampled_from(sorted(self.leases))) if self.leases else None
        conditions = [
            Compare(key, self.revision_of(key) if right else self.revision_of(key) + 1)
            for key, right in compares.items()
        ]
        changes: list[Write] = [Delete(k) if v is None else Put(k, v, lease) for k, v in writes.items()]
        wrong = next((key for key, right in compares.items() if not right), None)
        try:
            revision = self.loop.run_until_complete(self.store.transact(conditions, changes))
        except TransactionConflict as conflict:
            assert conflict.key == wrong
            return
        assert wrong is None
        self.apply(changes)
        assert revision == self.revision

    def revision_of(self, key: str) -> int:
        return self.model[key].revision if key in self.model else 0

    def apply(self, changes: list[Write]) -> None:
        effective = [change for change in changes if isinstance(change, Put) or change.key in self.model]
        if effective:
            self.revision += 1
        for change in effective:
            for keys in self.leases.values():
                keys.discard(change.key)
            if isinstance(change, Put):
                created = self.model[change.key].created if change.key in self.model else self.revision
                self.model[change.key] = Entry(change.key, change.value, self.revision, created)
                if change.lease:
                    self.leases[change.lease].add(change.key)
            else:
                del self.model[change.key]

    @rule()
    def grant(self) -> None:
        lease = self.loop.run_until_complete(self.store.grant(3600))
        assert lease not in self.leases
        self.leases[lease] = set()

    @rule(data=st.data())
    def revoke(self, data: st.DataObject) -> None:
        if self.leases:
            lease = data.draw(st.sampled_from(sorted(self.leases)))
            self.loop.run_until_complete(self.store.revoke(lease))
            self.apply([Delete(key) for key in self.leases.pop(lease)])

    @invariant()
    def lists_what_the_model_holds(self) -> None:
        for prefix in ("/", "/a", "/a/", "/b/"):
            expected = sorted((e for k, e in self.model.items() if k.startswith(prefix)), key=lambda e: e.key)
            snapshot = self.loop.run_until_complete(self.store.list(prefix))
            assert snapshot == Snapshot(expected, self.revision)

    @rule()
    def replaying_the_history_gives_the_present(self) -> None:
        async def replay() -> dict[str, Entry]:
            state: dict[str, Entry] = {}
            events = self.store.watch("/", 0)
            last = await self.store.put("/marker", b"")
            async for event in events:
                assert event.previous == state.get(event.entry.key)
                if event.kind == "put":
                    state[event.entry.key] = event.entry
                else:
                    del state[event.entry.key]
                if event.revision == last:
                    break
            await self.store.delete("/marker")
            return state

        state = self.loop.run_until_complete(replay())
        self.revision += 2
        del state["/marker"]
        assert state == self.model

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.loop.run_until_complete(self.store.close())
        self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        self.loop.close()
        shutil.rmtree(self.directory)


StoreMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
TestStore = StoreMachine.TestCase
