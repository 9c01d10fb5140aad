"""Principals and their rights: who may do what.

- `authority` is the right of one request: a principal, the proof of it, and the roles that count for it.
- `tokens` are the text that proves a principal.
- `cache` holds principals, bindings and tokens in memory, as the store has them.
- `verbs` change them.
"""
