"""Idempotency keys: a request that is sent again gets the first answer (draft-ietf-httpapi-idempotency-key-header).

A key belongs to one principal and one request, for a day. Its record is committed in the transaction of the change
that the request makes (carried.py): it is there if and only if the change is, also after a crash. When the request has
been answered, the answer is added to the record. A record without an answer, of a request that no longer runs, means
that insulad ended between the commit and the answer: then the answer is made of the object as it is now, which is found
by the revision that it was created at.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterable, Sequence

import msgspec

from insula.control.context import Context
from insula.control.keys import HOST, IDEMPOTENCY
from insula.model.errors import Conflict, Failed, IdempotencyKeyReused, TooManyRequests
from insula.model.objects import IdempotencyRecord
from insula.store.protocol import Delete, Put, Store, Write
from insula.store.typed import Found

LIFE = 86_400.0
"""Seconds that a key is remembered."""
MAX_KEYS = 500
"""Keys of one principal at a time."""
MAX_ANSWER = 4 << 10
"""The longest answer in bytes that is kept; a longer one is made anew of the object."""
_LEASE = 3600.0  # keys of an hour share a lease of the store, which deletes them


class Attempt:
    """A request with a key that runs: what its first transaction carries (`carried.Carried`)."""

    def __init__(self, keys: IdempotencyKeys, name: tuple[str, str], record: IdempotencyRecord, lease: int) -> None:
        self._keys = keys
        self._name = name
        self._record = record
        self._lease = lease
        self.stored = False

    def writes(self) -> Sequence[Write]:
        return () if self.stored else [self._put(self._record)]

    def committed(self) -> None:
        self.stored = True
        self._keys.count(self._name, self._record.created)

    async def answered(self, status: int, media_type: str, body: bytes | None, made: str | None = None) -> None:
        """Keep the answer. An error is kept only if something was committed before it: otherwise nothing was changed,
        and the request may be sent again. `body` None is an answer that holds a secret, or is too long."""
        if status >= 400 and not self.stored:
            return
        kept = body if body is not None and len(body) <= MAX_ANSWER else None
        record = msgspec.structs.replace(self._record, status=status, media_type=media_type, body=kept, made=made)
        self.committed()  # first: this transaction is not to carry the record once more
        await self._keys.context.store.transact([], [self._put(record)], durable=False)

    def close(self) -> None:
        """The request has ended, in whatever way."""
        self._keys.running.pop(self._name, None)

    def _put(self, record: IdempotencyRecord) -> Put:
        return IDEMPOTENCY.put(record, *self._name, lease=self._lease)


class IdempotencyKeys:
    """The keys of all principals."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.running: dict[tuple[str, str], str] = {}  # fingerprints
        self._known: dict[str, dict[str, float]] = {}  # principal → digest of a key → when it was first used
        self._lease = (0, 0.0)

    async def begin(self, principal: str | None, key: str, fingerprint: str) -> Attempt | Found[IdempotencyRecord]:
        """Begin a request with a key; if it was carried out before, return the record of that instead.

        IdempotencyKeyReused if the key belongs to another request, Conflict while the same request runs,
        TooManyRequests if the principal has too many keys.
        """
        name = (principal or HOST, hashlib.sha256(key.encode()).hexdigest()[:32])
        if (other := self.running.get(name)) is not None:
            _check_same(other, fingerprint)
            raise _runs()
        self.running[name] = fingerprint
        try:
            found = await IDEMPOTENCY.get(self.context.store, *name)
            if found is not None and found.value.created + LIFE > time.time():
                _check_same(found.value.fingerprint, fingerprint)
                del self.running[name]
                return found
            await self._check_room(name[0])
            record = IdempotencyRecord(fingerprint=fingerprint, created=time.time())
            return Attempt(self, name, record, await self._current_lease())
        except BaseException:
            self.running.pop(name, None)
            raise

    def count(self, name: tuple[str, str], created: float) -> None:
        self._known.setdefault(name[0], {})[name[1]] = created

    async def _check_room(self, principal: str) -> None:
        known = self._known.get(principal)
        if known is None:
            snapshot = await self.context.store.list(IDEMPOTENCY.prefix(principal))
            known = self._known.setdefault(principal, {})
            for entry in snapshot.entries:
                with contextlib.suppress(Failed):  # damaged
                    known[IDEMPOTENCY.parts(entry.key)[1]] = IDEMPOTENCY.decode(entry).created
        now = time.time()
        if len(known) >= MAX_KEYS:
            for digest in [digest for digest, created in known.items() if created + LIFE <= now]:
                del known[digest]
        if len(known) >= MAX_KEYS:
            left = min(known.values()) + LIFE - now
            raise TooManyRequests(f"you have used {MAX_KEYS} idempotency keys today", "send it without a key", left)

    async def _current_lease(self) -> int:
        lease, granted = self._lease
        if not granted or time.monotonic() > granted + _LEASE:
            lease = await self.context.store.grant(LIFE + 2 * _LEASE)
            self._lease = lease, time.monotonic()
        return lease


def _check_same(first: str, fingerprint: str) -> None:
    if first != fingerprint:
        raise IdempotencyKeyReused(
            "this idempotency key was used for another request, or with other rights", "use a new key for each request"
        )


def _runs() -> Conflict:
    error = Conflict("a request with this idempotency key is running", "wait, and send it again")
    error.retry_after = 1.0
    return error


async def kept_of(store: Store, principals: Iterable[str]) -> list[Delete]:
    """Return the deletions of what is kept of the keys of principals, which are to be removed."""
    snapshots = [await store.list(IDEMPOTENCY.prefix(each)) for each in principals]
    return [Delete(entry.key) for snapshot in snapshots for entry in snapshot.entries]
