"""Authentication: the `Authority` of a request, by a bearer token, or by the user at the other end of the socket.

A token counts more than the socket: a request with a token has the token's rights only. On the operator's socket root
and members of the group `insula` are the local operator. On the users' socket every other user of the host is the
principal that has its user ID. User IDs of tenants' ranges are no principals: a process of an instance that reached the
socket has such an ID.
"""

from __future__ import annotations

from collections.abc import Iterable

from insula.api.peer import Peer, allowed
from insula.api.tls.record import ClientRecord
from insula.control.identities.authority import NOBODY, OPERATOR, Authority
from insula.control.identities.cache import IdentityCache
from insula.control.identities.providers import LONGEST, Providers, looks_like_jwt
from insula.control.identities.tokens import parse
from insula.model.errors import Denied, Unauthenticated
from insula.settings import OPERATORS

_HINT = f"be root or a member of the group `{OPERATORS}`"
_BEARER = b"bearer "
_LONGEST = LONGEST + len(_BEARER)  # bytes of the field


async def authenticate(
    cache: IdentityCache,
    providers: Providers | None,
    peer: Peer | None,
    client: ClientRecord | None,
    headers: Iterable[tuple[bytes, bytes]],
    group: int | None,
    *,
    anybody: bool = False,
) -> Authority:
    """Return the rights of a request: from a process of the host, or from a client of the network. Unauthenticated
    without a valid proof, unless the request is one that `anybody` may send; Denied for an unknown user of the host."""
    given = [value for name, value in headers if name == b"authorization"]
    if given:
        return await _by_bearer(cache, providers, given)
    if client is not None:
        return NOBODY if anybody and client.certificate is None else _by_certificate(cache, client)
    if peer is None:
        raise Denied("an unknown user may not use insulad", _HINT)
    if allowed(peer, group):
        return OPERATOR
    if authority := cache.of_user(peer.uid):
        return authority
    raise Denied(f"user {peer.uid} may not use insulad", f"{_HINT}, or ask an operator to make you a user")


def _by_certificate(cache: IdentityCache, client: ClientRecord) -> Authority:
    """Return the rights by a certificate, which the gate has checked to be of the clients' authority."""
    if client.certificate is None:
        raise Unauthenticated("there is no proof who you are", "send a token, or a certificate")
    from cryptography import x509  # only where HTTPS is on: it takes 50 ms

    serial = f"{x509.load_der_x509_certificate(client.certificate).serial_number:x}"
    if authority := cache.of_certificate(serial):
        return authority
    raise Unauthenticated("the certificate is not valid", "it may have expired or been revoked; make a new one")


async def _by_bearer(cache: IdentityCache, providers: Providers | None, given: list[bytes]) -> Authority:
    value = given[0]
    if len(given) == 1 and len(value) <= _LONGEST and value[: len(_BEARER)].lower() == _BEARER:
        text = value[len(_BEARER) :].strip().decode("latin-1")
        if providers is not None and looks_like_jwt(text):
            if authority := cache.of_claims(await providers.verify(text)):
                return authority
            raise Unauthenticated("the token has expired", "log in again: `insula login`")
        parsed = parse(text)
        if parsed is None:
            raise Unauthenticated("the token is malformed", "copy all of it: insula_ID_SECRET_CHECKSUM")
        if authority := cache.of_token(parsed):
            return authority
        raise Unauthenticated("the token is not valid", "it may have expired or been revoked; make a new one")
    raise Unauthenticated("the field Authorization is not a bearer token", "send `Authorization: Bearer TOKEN`")
