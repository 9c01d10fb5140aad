"""The verbs of users, service accounts, bindings and tokens.

Every change is one transaction, and is in force when the verb returns, for later requests and for open streams. A
tenant's usage record is its guard (allocation/quotas.py): a binding to a tenant rewrites it, so that a tenant that is
removed at the same time leaves no binding behind for a later one of its name.
"""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TypeVar

from insula.control.allocation.quotas import add
from insula.control.allocation.transaction import guard, guarded, retried
from insula.control.context import Context
from insula.control.idempotency import kept_of
from insula.control.identities.authority import Authority
from insula.control.identities.cache import IdentityCache
from insula.control.identities.counts import AccountQuotas, Parts, StoredProof
from insula.control.identities.records import key_of, kind_of, new, reservations_of
from insula.control.identities.tokens import generate
from insula.control.instances.specs import check_labels
from insula.control.keys import BINDINGS, CERTIFICATES, HOST, PRINCIPALS, TENANTS, TOKENS, USAGE
from insula.control.tenants import FIRST_ID, LAST_ID, Tenants
from insula.model import rules
from insula.model.errors import Conflict, Denied, Invalid, NotFound, QuotaExceeded, Unauthenticated
from insula.model.permissions import HOST_ROLES, TENANT_ROLES, Role, permissions_of
from insula.model.principals import (
    JOIN_TTL,
    MAX_TTL,
    Binding,
    BindingView,
    Certificate,
    CertificateView,
    Principal,
    PrincipalView,
    Token,
    TokenCreated,
    TokenSpec,
    TokenView,
    WhoAmI,
)
from insula.model.quota_settings import user_limit
from insula.model.units import check_label, shorten
from insula.model.views import Usage
from insula.store.protocol import Compare, TransactionConflict, Write
from insula.store.typed import Found, Keyspace

MAX_GROUPS = 100
"""Groups with roles in one tenant, and on the host."""
P = TypeVar("P", Token, Certificate)


class Identities:
    def __init__(self, context: Context, tenants: Tenants, cache: IdentityCache) -> None:
        self.context = context
        self.tenants = tenants
        self.cache = cache
        self.counts = AccountQuotas(context, tenants, cache)

    # -- principals ------------------------------------------------------------------------------------------------

    def list(self, tenant: str | None = None) -> Sequence[PrincipalView]:
        """The users, or a tenant's service accounts."""
        found = (each for each in self.cache.principals() if each.tenant == tenant and each.kind != "group")
        return [self._view(each) for each in sorted(found, key=lambda each: each.name)]

    def get(self, label: str) -> PrincipalView:
        """A user by its name, or a service account by TENANT/NAME. NotFound."""
        return self._view(self._find(label))

    async def create_user(
        self, name: str, uid: int | None = None, *, provider: str | None = None, subject: str | None = None
    ) -> PrincipalView:
        """Create a user without roles. `uid` is its user ID on the host, `subject` the one that tokens of `provider`
        name (None: the only one). Invalid, Conflict."""
        principal = self._new_user(name, uid, provider, subject)
        await self._create(principal, [], [])
        return self._view(principal)

    def admit_user(
        self, name: str, uid: int | None = None, *, provider: str | None = None, subject: str | None = None
    ) -> None:
        """Check whether a user of this name could be replaced by such a one. Invalid, Conflict."""
        wanted = {each.key for each in reservations_of(self._new_user(name, uid, provider, subject))}
        others = (each for each in self.cache.principals() if each.label != name)
        if any(wanted & {own.key for own in reservations_of(each)} for each in others):
            raise _taken()

    def _new_user(self, name: str, uid: int | None, provider: str | None, subject: str | None) -> Principal:
        if provider is not None and subject is None:
            raise Invalid("a provider without a subject names nobody", "give the subject, too")
        issuer = None if subject is None else self._issuer(provider)
        if subject is not None and not re.fullmatch(rules.SUBJECT, subject):
            raise Invalid("the subject is not 1 to 255 printable ASCII characters", "see `insula whoami` of the user")
        if uid is not None and FIRST_ID <= uid < LAST_ID:
            raise Invalid(f"user ID {uid} belongs to a tenant's instances", "give that of a user of the host")
        return new(check_label("user", name), uid=uid, issuer=issuer, subject=subject)

    async def create_service_account(self, tenant: str, name: str) -> PrincipalView:
        """Create a service account of a tenant, without a role. Invalid, NotFound, Conflict."""
        principal = new(check_label("service account", name), tenant=tenant)

        async def attempt(guard: Found[Usage]) -> None:
            owner = await self.tenants.find(tenant)
            usage = add(owner.value, guard.value, Usage(service_accounts=1))
            compares = [USAGE.unchanged(guard, tenant), TENANTS.unchanged(owner, tenant)]
            await self._create(principal, compares, [USAGE.put(usage, tenant)])

        await guarded(self.context.store, tenant, attempt)
        return self._view(principal)

    async def _create(self, principal: Principal, compares: Sequence[Compare], writes: Sequence[Write]) -> None:
        key, own = key_of(principal), reservations_of(principal)
        try:
            await self._commit(
                [PRINCIPALS.absent(*key), *(each.absent() for each in own), *compares],
                [PRINCIPALS.put(principal, *key), *(each.put() for each in own), *writes],
            )
        except TransactionConflict as conflict:
            if conflict.key == PRINCIPALS.key(*key):
                raise Conflict(
                    f"there is a {kind_of(principal)} {principal.label} already", "choose another name"
                ) from None
            if any(conflict.key == each.key for each in own):
                raise _taken() from None
            raise

    async def remove(self, label: str) -> None:
        """Remove a principal with its bindings and tokens; open streams of it end. NotFound."""
        principal = self._find(label)

        async def attempt() -> None:
            found = await self._stored(principal)
            bindings = [
                BINDINGS.delete(each.tenant or HOST, principal.id) for each in self.cache.bindings(principal.id)
            ]
            proofs = await self.counts.stored([principal.id])
            deletes = [PRINCIPALS.delete(*key_of(principal)), *(each.delete() for each in reservations_of(principal))]
            compares, writes = await self.counts.less(principal, Usage(service_accounts=1, tokens=len(proofs)))
            kept = await kept_of(self.context.store, [principal.id])
            await self._commit(
                [PRINCIPALS.unchanged(found, *key_of(principal)), *compares],
                [*deletes, *bindings, *(each.delete() for each in proofs), *kept, *writes],
            )

        await self.counts.in_turn(principal, attempt)

    # -- bindings --------------------------------------------------------------------------------------------------

    def bindings(self, tenant: str | None) -> Sequence[BindingView]:
        """The bindings in a tenant; on the host for None."""
        found = (
            _binding_view(principal, binding)
            for principal in self.cache.principals()
            if (binding := self.cache.binding(principal.id, tenant))
        )
        return sorted(found, key=lambda each: each.user)

    async def bind(self, by: Authority, label: str, role: Role, tenant: str | None) -> BindingView:
        """Give a principal a role in a tenant, or on the host; it replaces the one that it had there. PROVIDER:GROUP is
        a group of a provider of OpenID Connect.

        Denied unless the caller holds all that the role, and the one before, allow. Invalid, NotFound.
        """
        if role not in (HOST_ROLES if tenant is None else TENANT_ROLES):
            where = "the host" if tenant is None else "a tenant"
            hint = f"use one of {', '.join(HOST_ROLES if tenant is None else TENANT_ROLES)}"
            raise Invalid(f"the role {role} can't be bound in {where}", hint)
        if (owner := _tenant_of(label)) and owner != tenant:  # before the look-up, which would tell whether it exists
            raise Invalid(f"service account {label} is of another tenant", "bind it in its own tenant only")
        principal = self._group(label) if ":" in label else self._find(label)
        if principal.kind == "group" and self._has_too_many_groups(principal, tenant):
            raise Conflict(f"{MAX_GROUPS} groups have roles {_place(tenant)}", "unbind those that are not needed")
        maker = by.principal.id if by.principal else None
        binding = Binding(principal=principal.id, tenant=tenant, role=role, by=maker, created=time.time())
        await self._change(by, principal, tenant, binding)
        return _binding_view(principal, binding)

    def _has_too_many_groups(self, group: Principal, tenant: str | None) -> bool:
        bound = (each for each in self.cache.principals() if each.kind == "group" and each.id != group.id)
        return sum(self.cache.binding(each.id, tenant) is not None for each in bound) >= MAX_GROUPS

    def _group(self, label: str) -> Principal:
        """Return the group PROVIDER:GROUP as it is stored, else a new one. Invalid."""
        name, _, group = label.partition(":")
        if not re.fullmatch(rules.GROUP, label) or not group.isprintable():
            raise Invalid(f"{shorten(label)} is no group", "write PROVIDER:GROUP, with up to 256 characters")
        issuer = self._issuer(name)
        return self.cache.group(issuer, label) or new(label, issuer=issuer)

    def _issuer(self, provider: str | None) -> str:
        """Return the issuer of the provider with this name; that of the only provider for None. Invalid."""
        known = self.context.settings.oidc
        found = [each.issuer for each in known if provider in (each.name, None)]
        if len(found) == 1:
            return found[0]
        names = ", ".join(each.name for each in known) or "none"
        what = f"there is no provider {shorten(provider)}" if provider else "it takes the name of a provider"
        raise Invalid(what, f"[[oidc]] in insulad.toml(5) has: {names}")

    async def unbind(self, by: Authority, label: str, tenant: str | None) -> None:
        """Take the role of a principal in a tenant, or on the host. NotFound if it has none, Denied as in `bind`."""
        for principal in self.cache.principals():
            if principal.label == label and self.cache.binding(principal.id, tenant):
                return await self._change(by, principal, tenant, None)
        raise NotFound(f"{shorten(label)} has no role {_place(tenant)}", "`insula user bindings` lists them")

    async def _change(self, by: Authority, principal: Principal, tenant: str | None, new: Binding | None) -> None:
        """Put a binding, or delete it. Of a removal at the same time and this, one fails: only a group can be new."""
        key = (tenant or HOST, principal.id)

        async def attempt() -> None:
            is_new = principal.kind == "group" and self.cache.principal(principal.id) is None
            found = None if is_new else await self._stored(principal)
            before = await BINDINGS.get(self.context.store, *key)
            for role in {each.role for each in (new, before.value if before else None) if each}:
                if not by.covers(permissions_of(role), tenant):
                    raise Denied(f"{by.name} does not hold all that the role {role} allows", "ask an operator")
            compares = [
                PRINCIPALS.unchanged(found, *key_of(principal)) if found else PRINCIPALS.absent(*key_of(principal)),
                Compare(BINDINGS.key(*key), before.revision if before else 0),
            ]
            writes: list[Write] = [BINDINGS.put(new, *key) if new else BINDINGS.delete(*key)]
            writes.append(self._kept(principal, tenant, new))
            if tenant is not None:
                await self.tenants.find(tenant)
                usage = await guard(self.context.store, tenant)
                compares.append(USAGE.unchanged(usage, tenant))
                writes.append(USAGE.put(usage.value, tenant))
            await self._commit(compares, writes)

        await retried(attempt)

    def _kept(self, principal: Principal, tenant: str | None, new: Binding | None) -> Write:
        """The principal's record as a change of its binding leaves it: a group without roles is not kept."""
        others = [each for each in self.cache.bindings(principal.id) if each.tenant != tenant]
        if principal.kind == "group" and new is None and not others:
            return PRINCIPALS.delete(*key_of(principal))
        return PRINCIPALS.put(principal, *key_of(principal))

    # -- tokens ----------------------------------------------------------------------------------------------------

    def tokens(self, owner: str | None = None) -> Sequence[TokenView]:
        """The tokens of the principal with this ID; all for None."""
        now = time.time()
        found = (each for each in self.cache.tokens() if owner in (None, each.principal) and each.expires > now)
        views = [self._token_view(each) for each in found if self.cache.principal(each.principal)]
        return sorted(views, key=lambda each: each.created)

    async def create_token(self, by: Authority, spec: TokenSpec) -> TokenCreated:
        """Create a token for the caller or for `spec.user`. Invalid, NotFound, Denied, QuotaExceeded."""
        return await self._create_token(self._owner(by, spec.user), spec)

    async def _create_token(
        self,
        principal: Principal,
        spec: TokenSpec,
        *,
        exchanged_for: float | None = None,
        instead_of: str | None = None,
    ) -> TokenCreated:
        check_labels(spec.labels)
        if not 0 < spec.ttl <= MAX_TTL:
            raise Invalid(f"a token can't live {spec.ttl:g} s", f"use up to {MAX_TTL // 86400} days")
        text, parsed = generate()
        now = time.time()
        token = Token(
            id=parsed.id,
            principal=principal.id,
            digest=parsed.digest,
            description=spec.description,
            labels=spec.labels,
            exchanged_for=exchanged_for,
            created=now,
            expires=now + spec.ttl,
        )

        async def used() -> Parts:
            """The invitation that is exchanged, which may be used once."""
            if instead_of is None:
                return [], []
            invitation = await TOKENS.get(self.context.store, instead_of)
            if invitation is None:
                raise Unauthenticated("the invitation was used already", "ask for another one")
            return [TOKENS.unchanged(invitation, instead_of)], [TOKENS.delete(instead_of)]

        await self._add_proof(principal, TOKENS, token, token.id, self.cache.tokens, used)
        return TokenCreated(id=token.id, token=text, expires=token.expires)

    async def invite(self, by: Authority, user: str, ttl: float) -> TokenCreated:
        """Create a token that can be exchanged once, within `JOIN_TTL`, for one that is valid for `ttl` seconds."""
        spec = TokenSpec(user=user, ttl=JOIN_TTL, description="an invitation")
        return await self._create_token(self._owner(by, user), spec, exchanged_for=ttl)

    async def join(self, by: Authority) -> TokenCreated:
        """Exchange the invitation by which the caller is authenticated for a token, in one transaction: only the first
        exchange succeeds. Unauthenticated."""
        invitation = self.cache.token(by.token or "")
        if invitation is None or invitation.exchanged_for is None or by.principal is None:
            raise Unauthenticated("this is no invitation", "ask for one: `insula remote invite USER`")
        spec = TokenSpec(ttl=invitation.exchanged_for, description="by an invitation")
        return await self._create_token(by.principal, spec, instead_of=invitation.id)

    def _owner(self, by: Authority, user: str | None) -> Principal:
        """The principal that a proof is made for. A caller that makes it for another must hold all that it gives. The
        permission is checked before the look-up, so that nobody else learns who exists."""
        if by.principal is not None and user in (None, by.principal.label):
            return by.principal
        if user is None:
            raise Invalid("the local operator needs no proof", "make one for a user: --user NAME")
        tenant = _tenant_of(user)
        by.check("service-account.write" if tenant else "user.write", tenant)
        principal = self._find(user)
        for each in self._bindings_of(principal):
            if not by.covers(permissions_of(each.role), each.tenant):
                raise Denied(f"{by.name} does not hold all that {principal.label} may do", "ask an operator")
        return principal

    async def revoke_token(self, by: Authority, token_id: str) -> None:
        """End a token at once; open streams of it end. NotFound, also for those that the caller may not revoke."""
        token = self.cache.token(token_id)
        principal = self.cache.principal(token.principal) if token else None
        if token is None or principal is None or not _may_revoke(by, principal):
            raise NotFound(f"there is no token {shorten(token_id)}", "`insula token ls` lists them")
        await self._delete_proof(principal, StoredProof(TOKENS, token.id))

    # -- certificates ------------------------------------------------------------------------------------------------

    def certificates(self, owner: str | None = None) -> Sequence[CertificateView]:
        """List the certificates of the principal with this ID; all for None."""
        now = time.time()
        found = (each for each in self.cache.certificates() if owner in (None, each.principal) and each.expires > now)
        views = [
            CertificateView(serial=each.serial, user=principal.label, created=each.created, expires=each.expires)
            for each in found
            if (principal := self.cache.principal(each.principal))
        ]
        return sorted(views, key=lambda each: each.created)

    async def record_certificate(self, by: Authority, user: str | None, serial: str, ttl: float) -> Certificate:
        """Store a certificate that is about to be signed for a principal. Denied, NotFound, Conflict."""
        principal = self._owner(by, user)
        now = time.time()
        made = Certificate(serial=serial, principal=principal.id, created=now, expires=now + ttl)

        await self._add_proof(principal, CERTIFICATES, made, serial, self.cache.certificates)
        return made

    async def _add_proof(
        self,
        principal: Principal,
        keyspace: Keyspace[P],
        proof: P,
        key: str,
        known: Callable[[], Iterable[P]],
        more: Callable[[], Awaitable[Parts]] | None = None,
    ) -> None:
        """Store a token or certificate of a principal, and delete those that have expired. QuotaExceeded.

        The principal's record is rewritten, so that its removal at the same time fails, or this. `more` is what else
        the transaction compares and writes.
        """
        most = user_limit(self.context.settings.quotas, "user_tokens")

        async def attempt() -> None:
            found = await self._stored(principal)
            own = [each for each in known() if each.principal == principal.id and each.expires > proof.created]
            if most is not None and len(own) >= most:
                what = f"{principal.label} may have {most} of these and has {len(own)}: 0 left"
                raise QuotaExceeded(what, "revoke those that are not needed")
            extra: Parts = await more() if more else ((), ())
            expired: Sequence[StoredProof] = await self.counts.stored(
                self.counts.together(principal), before=proof.created
            )
            deletes: dict[str, Write] = {each.key: each for each in (*(old.delete() for old in expired), *extra[1])}
            counted: Parts = await self.counts.exchanged(principal, less=len(deletes), more=1)
            await self._commit(
                [PRINCIPALS.unchanged(found, *key_of(principal)), *counted[0], *extra[0]],
                [
                    keyspace.put(proof, key),
                    PRINCIPALS.put(principal, *key_of(principal)),
                    *deletes.values(),
                    *counted[1],
                ],
            )

        await self.counts.in_turn(principal, attempt)

    async def _delete_proof(self, principal: Principal, proof: StoredProof) -> None:
        """Delete a token or certificate, unless that was done meanwhile."""

        async def attempt() -> None:
            found = await proof.keyspace.get(self.context.store, proof.id)
            if found is None:
                return
            compares, writes = await self.counts.less(principal, Usage(tokens=1))
            same = proof.keyspace.unchanged(found, proof.id)
            await self._commit([same, *compares], [proof.delete(), *writes])

        await self.counts.in_turn(principal, attempt)

    async def revoke_certificate(self, by: Authority, serial: str) -> None:
        """End a certificate at once. NotFound, also for those that the caller may not revoke."""
        found = next((each for each in self.cache.certificates() if each.serial == serial), None)
        principal = self.cache.principal(found.principal) if found else None
        if found is None or principal is None or not _may_revoke(by, principal):
            raise NotFound(f"there is no certificate {shorten(serial)}", "`insula certificate ls` lists them")
        await self._delete_proof(principal, StoredProof(CERTIFICATES, serial))

    # -- the caller ------------------------------------------------------------------------------------------------

    def whoami(self, by: Authority) -> WhoAmI:
        return WhoAmI(
            user=by.name,
            display=by.claims.name if by.claims else "",
            id=by.principal.id if by.principal else None,
            proof=by.proof,
            host=sorted(by.host),
            tenants=dict(sorted(by.tenants.items())),
            labels=dict(by.labels),
            expires=by.expires,
        )

    # -- helpers -----------------------------------------------------------------------------------------------------

    def _find(self, label: str) -> Principal:
        for principal in self.cache.principals():
            if principal.label == label.removeprefix("/"):
                return principal
        what = "service account" if _tenant_of(label) else "group with a role" if ":" in label else "user"
        raise NotFound(f"there is no {what} {shorten(label)}", "`insula user ls` lists them")

    def _bindings_of(self, principal: Principal) -> Sequence[Binding]:
        return [*self.cache.bindings(principal.id)]

    async def _stored(self, principal: Principal) -> Found[Principal]:
        found = await PRINCIPALS.get(self.context.store, *key_of(principal))
        if found is None or found.value.id != principal.id:
            raise NotFound(f"there is no {kind_of(principal)} {principal.label}", "`insula user ls` lists them")
        return found

    async def _commit(self, compares: Sequence[Compare], writes: Sequence[Write]) -> None:
        """Commit, and apply it to the cache at once."""
        self.cache.take(writes, await self.context.store.transact(compares, writes))

    def _view(self, principal: Principal) -> PrincipalView:
        bindings = [_binding_view(principal, each) for each in self.cache.bindings(principal.id)]
        return PrincipalView(principal=principal, bindings=sorted(bindings, key=lambda each: each.tenant or ""))

    def _token_view(self, token: Token) -> TokenView:
        owner = self.cache.principal(token.principal)
        return TokenView(
            id=token.id,
            user=owner.label if owner else token.principal,
            description=token.description,
            labels=token.labels,
            created=token.created,
            expires=token.expires,
        )


def _tenant_of(label: str) -> str | None:
    """The tenant of a service account by its label; None for a user and for a group, whose name may have slashes."""
    return (label.rpartition("/")[0] or None) if ":" not in label else None


def _may_revoke(by: Authority, principal: Principal) -> bool:
    if by.principal is not None and by.principal.id == principal.id:
        return "self.token" in by.held()
    if principal.tenant is None:
        return "user.write" in by.held()
    return "service-account.write" in by.held(principal.tenant)


def _place(tenant: str | None) -> str:
    return "on the host" if tenant is None else f"in tenant {tenant}"


def _binding_view(principal: Principal, binding: Binding) -> BindingView:
    return BindingView(
        user=principal.label,
        kind=principal.kind,
        tenant=binding.tenant,
        role=binding.role,
        created=binding.created,
    )


def _taken() -> Conflict:
    return Conflict("this user ID or subject is that of another user", "remove that one first")
