"""`Recent`: a cache of committed entries, and of keys that are not there.

The store's thread writes it, other threads only read it. It is valid because no other process writes the file.
"""

from __future__ import annotations

from collections.abc import Iterable

from insula.store.protocol import Entry, Event


class Recent:
    """The cache, of at most `most` entries with `most_bytes` of values together, and of as many missing keys. What was
    added first is dropped first."""

    def __init__(self, most: int, most_bytes: int) -> None:
        self.most = most
        self.most_bytes = most_bytes
        self.entries: dict[str, Entry] = {}
        self.size = 0
        self.absent: dict[str, None] = {}

    def __getitem__(self, key: str) -> Entry | None:
        """Return the entry, or None if there is none. KeyError if the cache doesn't know."""
        if entry := self.entries.get(key):
            return entry
        if key in self.absent:
            return None
        raise KeyError(key)

    def add(self, key: str, entry: Entry | None) -> None:
        """Keep what the file has at this key."""
        if (before := self.entries.pop(key, None)) is not None:
            self.size -= len(before.value)
        self.absent.pop(key, None)
        if entry is None:
            self.absent[key] = None
            if len(self.absent) > self.most:
                del self.absent[next(iter(self.absent))]
            return
        self.entries[key] = entry
        self.size += len(entry.value)
        while len(self.entries) > self.most or self.size > self.most_bytes:
            self.size -= len(self.entries.pop(next(iter(self.entries))).value)

    def apply(self, events: Iterable[Event]) -> None:
        """Keep what was committed."""
        for event in events:
            self.add(event.entry.key, event.entry if event.kind == "put" else None)
