"""`[quotas]` of insulad.toml: the limits of new tenants, one setting for each quota of the table, and limits of users.

A limit is a number, a size as "500g", a rate as "100m", or "none".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from insula.model.errors import Invalid
from insula.model.objects import Limits
from insula.model.quotas import TABLE, Quota
from insula.model.units import parse_rate, parse_size, shorten

NONE = "none"
USERS = (
    Quota("user_tokens", "store", "", 100, "tokens", "Tokens that a user has at a time, and certificates.", least=1),
    Quota("user_requests", "rate", "/s", 1000, "requests a second", "Requests a second of a user.", least=1),
    Quota(
        "user_streams",
        "now",
        "",
        100,
        "open streams",
        "Open requests of a user for streams about no single tenant.",
        least=1,
    ),
)
"""The limits of users, which are of no tenant."""


def _written(quota: Quota) -> object:
    """Return the default as in the file."""
    if quota.default is None:
        return NONE
    return quota.show(quota.default).lower() if quota.unit == "bytes" else quota.default


if TYPE_CHECKING:

    class QuotaSettings(msgspec.Struct):
        def __getattr__(self, name: str) -> Any: ...

else:
    QuotaSettings = msgspec.defstruct(
        "QuotaSettings",
        [(quota.name, int | str if quota.whole else int | float | str, _written(quota)) for quota in (*TABLE, *USERS)],
        module=__name__,
        namespace={"__doc__": "`[quotas]`: the limits of new tenants, and those of users."},
        frozen=True,
        kw_only=True,
        forbid_unknown_fields=True,
    )


def new_limits(settings: QuotaSettings) -> Limits:
    """Return the limits of a new tenant. Invalid."""
    limits: dict[str, Any] = {quota.name: limit(settings, quota) for quota in TABLE}
    return Limits(**limits)


def user_limit(settings: QuotaSettings, name: str) -> float | int | None:
    """Return a limit of users; None is no limit. Invalid."""
    return limit(settings, next(quota for quota in USERS if quota.name == name))


def limit(settings: QuotaSettings, quota: Quota) -> float | int | None:
    """Return one limit; None is no limit. Invalid, whose message begins with the name of the setting."""
    value = getattr(settings, quota.name)
    if value == NONE:
        return None
    try:
        if isinstance(value, str):
            value = {"bytes": parse_size, "bit/s": parse_rate}[quota.unit](value)
        if quota.least <= value <= quota.most:
            return value  # type: ignore[no-any-return]
    except (Invalid, KeyError):
        pass
    kind = {"bytes": 'a size as "10g"', "bit/s": 'a rate as "100m"'}.get(quota.unit, "a number")
    what = f"quotas.{quota.name} {shorten(str(value))} is out of bounds, or not {kind}"
    raise Invalid(what, f'use {quota.least:g} to {quota.most}, or "{NONE}" for no limit')


def takes(quota: Quota) -> str:
    """Return what the setting takes, for the manual."""
    return {"bytes": "size, or none", "bit/s": "rate, or none"}.get(quota.unit, f"number from {quota.least:g}, or none")
