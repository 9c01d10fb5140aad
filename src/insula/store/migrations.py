"""The schema of the SQLite store, as migration steps.

`PRAGMA user_version` is the number of steps that were applied to a file. A released step is never edited: a change of
the schema, or of the objects' encoding, is a new step at the end. All missing steps run in one transaction.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence

from insula.model.errors import Unavailable

Migration = Callable[[sqlite3.Connection], None]


def _initial(connection: sqlite3.Connection) -> None:
    connection.execute(
        """CREATE TABLE entries (
            key TEXT PRIMARY KEY, value BLOB NOT NULL, revision INTEGER NOT NULL, created INTEGER NOT NULL,
            lease INTEGER REFERENCES leases (id)
        ) STRICT, WITHOUT ROWID"""
    )
    connection.execute("CREATE INDEX entries_lease ON entries (lease) WHERE lease IS NOT NULL")
    connection.execute(
        """CREATE TABLE changes (
            revision INTEGER NOT NULL, position INTEGER NOT NULL, kind TEXT NOT NULL, key TEXT NOT NULL,
            value BLOB NOT NULL, created INTEGER NOT NULL,
            previous_value BLOB, previous_revision INTEGER, previous_created INTEGER,
            PRIMARY KEY (revision, position)
        ) STRICT, WITHOUT ROWID"""
    )
    connection.execute("CREATE TABLE leases (id INTEGER PRIMARY KEY AUTOINCREMENT, ttl REAL NOT NULL) STRICT")
    connection.execute("CREATE TABLE counters (revision INTEGER NOT NULL, compacted INTEGER NOT NULL) STRICT")
    connection.execute("INSERT INTO counters VALUES (0, 0)")


STEPS: tuple[Migration, ...] = (_initial,)


def migrate(connection: sqlite3.Connection, steps: Sequence[Migration] = STEPS) -> int:
    """Migrate the file to version `len(steps)`; returns its previous version. Unavailable for a newer file."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > len(steps):
        raise Unavailable(
            f"the state has schema version {version}, this Insula supports {len(steps)}",
            "install the newer Insula again, or restore an older state",
        )
    if version < len(steps):
        connection.execute("BEGIN IMMEDIATE")
        try:
            for step in steps[version:]:
                step(connection)
            connection.execute(f"PRAGMA user_version = {len(steps)}")
            connection.execute("COMMIT")
        except BaseException:
            connection.execute("ROLLBACK")
            raise
    return int(version)
