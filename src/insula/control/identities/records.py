"""The records of principals in the store: their keys, and what belongs to one of them only."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Sequence
from typing import Any

from insula.control.allocation.reservations import Reservation
from insula.control.keys import HOST, PROVIDERS
from insula.model.principals import Principal


def new(name: str, **other: Any) -> Principal:
    return Principal(id=secrets.token_hex(8), name=name, created=time.time(), **other)


def key_of(principal: Principal) -> tuple[str, str]:
    if principal.kind == "group":
        return PROVIDERS, _digest(principal.issuer, principal.name)
    return principal.tenant or HOST, principal.name


def _digest(*parts: str | None) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()


def reservations_of(principal: Principal) -> Sequence[Reservation]:
    """The user of the host, and the one of a provider, belong to one principal."""
    own = [] if principal.uid is None else [Reservation("uid", str(principal.uid), principal.id)]
    if principal.subject is not None:
        own.append(Reservation("subject", _digest(principal.issuer, principal.subject), principal.id))
    return own


def kind_of(principal: Principal) -> str:
    return principal.kind.replace("-", " ")
