"""`IdentityCache`: principals, bindings and tokens in memory, as the store has them.

Every request reads it, so it answers without the store. It follows the store's changes. Commits of this daemon are
applied at once (`take`), so that a revoked right is gone when the verb returns. `watchers` are called with the
principal whose rights have changed; they end open streams.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from insula.control.context import Context
from insula.control.identities.authority import Authority
from insula.control.identities.claims import OidcClaims
from insula.control.identities.tokens import Parsed, matches
from insula.control.keys import BINDINGS, CERTIFICATES, IDENTITIES, PRINCIPALS, TOKENS
from insula.control.tasks import Tasks
from insula.model.errors import Failed
from insula.model.permissions import HOST_ROLES, TENANT_ROLES, Role
from insula.model.principals import Binding, Certificate, Principal, Token
from insula.store.protocol import Compacted, Delete, Entry, Put, Write
from insula.store.typed import Keyspace

log = logging.getLogger("insula.control")
K = TypeVar("K")
V = TypeVar("V")
Identity = Principal | Binding | Token | Certificate
_KINDS: Sequence[Keyspace[Any]] = (PRINCIPALS, BINDINGS, TOKENS, CERTIFICATES)
_PAUSE = 1.0  # seconds until the store is asked again after a failure


class IdentityCache:
    def __init__(self, context: Context) -> None:
        self.context = context
        self.watchers: set[Callable[[str], None]] = set()
        self._by_id: dict[str, Principal] = {}
        self._by_uid: dict[int, str] = {}
        self._by_subject: dict[tuple[str, str], str] = {}  # users, by issuer and subject
        self._groups: dict[tuple[str, str], Principal] = {}  # by issuer and name
        self._bindings: dict[str, dict[str | None, Binding]] = {}  # by principal, by tenant
        self._tokens: dict[str, Token] = {}
        self._certificates: dict[str, Certificate] = {}
        self._objects: dict[str, tuple[int, Identity]] = {}  # with their revisions, by key
        self._deleted: dict[str, int] = {}  # keys that this daemon has deleted, until the store tells it

    # -- asking ----------------------------------------------------------------------------------------------------

    def principal(self, principal_id: str) -> Principal | None:
        return self._by_id.get(principal_id)

    def principals(self) -> Iterable[Principal]:
        return self._by_id.values()

    def bindings(self, principal_id: str) -> Iterable[Binding]:
        return self._bindings.get(principal_id, {}).values()

    def binding(self, principal_id: str, tenant: str | None) -> Binding | None:
        return self._bindings.get(principal_id, {}).get(tenant)

    def tokens(self) -> Iterable[Token]:
        return self._tokens.values()

    def token(self, token_id: str) -> Token | None:
        return self._tokens.get(token_id)

    def certificates(self) -> Iterable[Certificate]:
        return self._certificates.values()

    def of_user(self, uid: int) -> Authority | None:
        """Return the rights of a user of the host by its user ID; None if it is no principal."""
        principal = self._by_id.get(self._by_uid.get(uid, ""))
        return self._authority(principal, proof=f"uid {uid}") if principal else None

    def of_token(self, given: Parsed) -> Authority | None:
        """Return the rights that a token gives now; None if it is unknown, revoked or expired, or its secret wrong."""
        token = self._tokens.get(given.id)
        if not matches(given, token.digest if token else None) or token is None or token.expires <= time.time():
            return None
        principal = self._by_id.get(token.principal)
        return self._authority(principal, proof=f"token {token.id}", token=token) if principal else None

    def of_certificate(self, serial: str) -> Authority | None:
        """Return the rights that a certificate gives now; None if it is unknown, revoked or expired."""
        found = self._certificates.get(serial)
        if found is None or found.expires <= time.time():
            return None
        principal = self._by_id.get(found.principal)
        return self._authority(principal, proof=f"certificate {serial}", certificate=found) if principal else None

    def group(self, issuer: str, name: str) -> Principal | None:
        """Return a group that has a role somewhere."""
        return self._groups.get((issuer, name))

    def of_claims(self, claims: OidcClaims) -> Authority | None:
        """Return the rights by a token of a provider now: those of its user, and of its groups. None if it has expired.

        Who is no user has the roles of its groups alone, and nothing is stored.
        """
        if claims.ends <= time.time():
            return None
        found = self._by_id.get(self._by_subject.get((claims.issuer, claims.subject), ""))
        groups = [g for name in claims.groups if (g := self._groups.get((claims.issuer, _group_name(claims, name))))]
        principal = found or _visitor(claims)
        host: set[Role] = set()
        tenants: dict[str, Role] = {}
        for each in [principal, *groups]:
            for tenant, binding in self._bindings.get(each.id, {}).items():
                if tenant is None:
                    host |= {binding.role} & set(HOST_ROLES)
                elif tenant not in tenants or _rank(binding.role) < _rank(tenants[tenant]):
                    tenants[tenant] = binding.role
        return Authority(
            proof=f"oidc {claims.provider}",
            principal=principal,
            host=frozenset(host),
            tenants=tenants,
            claims=claims,
            groups=frozenset(each.id for each in groups),
            expires=claims.ends,
        )

    def again(self, authority: Authority) -> Authority | None:
        """Return the current rights of the sender of an earlier request; None if its proof is not valid any more."""
        if authority.principal is None:
            return authority
        if authority.claims:
            return self.of_claims(authority.claims)
        principal = self._by_id.get(authority.principal.id)
        token = self._tokens.get(authority.token) if authority.token else None
        if principal is None or (authority.token and (token is None or token.expires <= time.time())):
            return None
        certificate = self._certificates.get(authority.certificate) if authority.certificate else None
        if authority.certificate and (certificate is None or certificate.expires <= time.time()):
            return None
        if authority.proof.startswith("uid ") and principal.uid != authority.principal.uid:
            return None
        return self._authority(principal, proof=authority.proof, token=token, certificate=certificate)

    def _authority(
        self, principal: Principal, *, proof: str, token: Token | None = None, certificate: Certificate | None = None
    ) -> Authority:
        bindings = self._bindings.get(principal.id, {})
        tenants: dict[str, Role] = {tenant: each.role for tenant, each in bindings.items() if tenant is not None}
        on_host = bindings.get(None)
        return Authority(
            proof=proof,
            principal=principal,
            host=frozenset({on_host.role} if on_host and on_host.role in HOST_ROLES else ()),
            tenants=tenants,
            token=token.id if token else None,
            labels=token.labels if token else {},
            certificate=certificate.serial if certificate else None,
            invited=token is not None and token.exchanged_for is not None,
            expires=token.expires if token else certificate.expires if certificate else None,
        )

    # -- following the store -----------------------------------------------------------------------------------------

    async def load(self, tasks: Tasks) -> None:
        """Read everything, and follow the store from then on."""
        tasks.spawn(self._follow(await self._read()))

    async def _read(self) -> int:
        """Read all objects from the store, and return its revision."""
        snapshot = await self.context.store.list(IDENTITIES)
        present = {entry.key for entry in snapshot.entries}
        for key in [key for key in self._objects if key not in present]:
            self._take(Delete(key), snapshot.revision)
        for entry in snapshot.entries:
            self._take(Put(entry.key, entry.value), entry.revision)
        return snapshot.revision

    async def _follow(self, revision: int) -> None:
        while True:
            try:
                async for event in self.context.store.watch(IDENTITIES, revision):
                    revision, entry = event.revision, event.entry
                    self._take(Put(entry.key, entry.value) if event.kind == "put" else Delete(entry.key), revision)
                    self._deleted = {key: at for key, at in self._deleted.items() if at > revision}
                return  # the store is closed
            except Compacted:
                revision = await self._read()
            except Exception as error:
                self.context.problems.report("changes of principals", error)
                await asyncio.sleep(_PAUSE)

    def take(self, writes: Iterable[Write], revision: int) -> None:
        """Apply what this daemon committed at `revision`, before the store reports it."""
        for write in writes:
            if write.key.startswith(IDENTITIES):
                self._take(write, revision)

    def _take(self, write: Write, revision: int) -> None:
        """Take the value of a key at `revision`, unless a later one is known."""
        known, old = self._objects.get(write.key, (self._deleted.get(write.key, 0), None))
        if known >= revision:
            return
        new = _decoded(write, revision)
        self._objects.pop(write.key, None)
        if new is None:
            self._deleted[write.key] = revision
        else:
            self._objects[write.key] = revision, new
        self._index(old, present=False)
        self._index(new, present=True)
        for principal in {_owner(each) for each in (old, new) if each}:
            for watcher in tuple(self.watchers):
                watcher(principal)

    def _index(self, value: Identity | None, *, present: bool) -> None:
        """Add an object to the indices, or remove it."""
        match value:
            case Principal():
                _set(self._by_id, value.id, value, present)
                if value.uid is not None:
                    _set(self._by_uid, value.uid, value.id, present)
                if value.issuer is not None and value.subject is not None:
                    _set(self._by_subject, (value.issuer, value.subject), value.id, present)
                elif value.issuer is not None:
                    _set(self._groups, (value.issuer, value.name), value, present)
            case Binding():
                of = self._bindings.setdefault(value.principal, {})
                _set(of, value.tenant, value, present)
                if not of:
                    del self._bindings[value.principal]
            case Certificate():
                _set(self._certificates, value.serial, value, present)
            case Token():
                _set(self._tokens, value.id, value, present)


def _group_name(claims: OidcClaims, name: str) -> str:
    return f"{claims.provider}:{name}"


def _visitor(claims: OidcClaims) -> Principal:
    """Return the principal of a token whose user is not stored. Its ID follows from issuer and subject, so that it is
    the same each time without being kept, and another one for each issuer."""
    identity = hashlib.sha256(f"{claims.issuer}\0{claims.subject}".encode()).hexdigest()[:32]
    name = f"{claims.provider}#{claims.subject}"
    return Principal(id=identity, name=name, issuer=claims.issuer, subject=claims.subject, created=0.0)


def _rank(role: Role) -> int:
    """The place of a role in a tenant; each holds all that the later ones hold."""
    return TENANT_ROLES.index(role)


def _owner(value: Identity) -> str:
    return value.id if isinstance(value, Principal) else value.principal


def _set(index: dict[K, V], key: K, value: V, present: bool) -> None:
    if present:
        index[key] = value
    else:
        index.pop(key, None)


def _decoded(write: Write, revision: int) -> Identity | None:
    """The object; None if it was deleted, or is damaged: then it gives no right."""
    if isinstance(write, Delete):
        return None
    keyspace = next(
        each for each in (PRINCIPALS, BINDINGS, TOKENS, CERTIFICATES) if write.key.startswith(each.prefix_all())
    )
    try:
        found: Identity = keyspace.decode(Entry(write.key, write.value, revision, revision))
        return found
    except Failed as error:
        log.error("%s", error)
        return None
