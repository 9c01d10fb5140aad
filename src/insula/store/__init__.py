"""The store of all state: its protocol, an implementation with SQLite, and typed keys."""
