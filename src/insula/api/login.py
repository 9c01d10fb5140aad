"""GET /v1/login: by which providers of OpenID Connect to log in. It takes no proof, and says nothing else."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path

from litestar import get

from insula.api.authorities import server_authorities
from insula.api.parameters import Plane
from insula.model.errors import Unavailable
from insula.model.oidc import OidcSettings
from insula.model.principals import LoginInfo, LoginProvider

_AGE = 30.0  # seconds that an answer is kept: strangers may ask, and it reads files
_known: dict[Path, tuple[float, LoginInfo]] = {}  # by the root directory of the daemon


@get("/login", tags=["identities"], summary="By which providers to log in", permission="self.login")
async def login(plane: Plane) -> LoginInfo:
    known = _known.get(plane.settings.root)
    if known is None or time.monotonic() - known[0] > _AGE:
        known = _known[plane.settings.root] = (
            time.monotonic(),
            LoginInfo(
                authority=await server_authorities(plane) if plane.settings.api.listen else "",
                providers=await asyncio.to_thread(_providers, plane.settings.oidc),
            ),
        )
    return known[1]


def _providers(settings: Sequence[OidcSettings]) -> list[LoginProvider]:
    """It reads files. Unavailable if one can't be read."""
    found = []
    for each in settings:
        try:
            trusted = Path(each.ca).read_text("ascii") if each.ca else ""
        except (OSError, ValueError) as error:
            raise Unavailable(f"{each.ca} can't be read: {error}", "see [[oidc]] in insulad.toml(5)") from None
        found.append(
            LoginProvider(
                name=each.name,
                issuer=each.issuer,
                client_id=each.client_id,
                audience=each.audience,
                scopes=each.scopes,
                authority=trusted,
            )
        )
    return found
