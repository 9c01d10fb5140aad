"""/v1/authorities: the certificate authorities of this host, and their rotation."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Any, Literal

from litestar import Controller, Request, get, post
from litestar.params import PathParameter

from insula.api.audit import note
from insula.api.parameters import Flag, Plane
from insula.control.plane import ControlPlane
from insula.model.errors import NotFound, Unavailable
from insula.model.principals import Authorities

if TYPE_CHECKING:
    from insula.api.tls.certificates import Certificates, Holder

_SHOWN = {"enum": ["server", "client"], "examples": ["server"]}
AuthorityKind = Annotated[str, PathParameter(schema_extra=_SHOWN, description="whose certificates it signs")]
HTTPS = "https"
"""The state of the application with the `TlsSupervisor`, if HTTPS is on."""


class AuthorityRoutes(Controller):
    path = "/authorities"
    tags = ("identities",)

    @get(summary="The certificates by which clients know this host", permission="self.read")
    async def get_authorities(self, plane: Plane) -> Authorities:
        return Authorities(server=await server_authorities(plane) if plane.settings.api.listen else "")

    @post(
        "/{kind:str}/rotate",
        summary="Replace an authority; the one before is trusted for a time, or with `now` no longer",
        permission="host.certificates",
    )
    async def rotate_authority(
        self, plane: Plane, request: Request[Any, Any, Any], kind: AuthorityKind, now: Flag = False
    ) -> Authorities:
        note(name=kind)
        which = _kind(kind)
        await asyncio.to_thread(authorities(plane).rotate, which, now=now)
        if (supervisor := request.app.state.get(HTTPS)) is not None:
            await supervisor.renew(now=now)
        return Authorities(server=await server_authorities(plane))


def _kind(text: str) -> Holder:
    kinds: dict[str, Literal["server", "client"]] = {"server": "server", "client": "client"}
    if text not in kinds:
        raise NotFound(f"there is no authority {text}", "there are those of the `server` and of `client`s")
    return kinds[text]


async def server_authorities(plane: ControlPlane) -> str:
    """Return the certificates of the authorities by which clients know this host: PEM. Unavailable if HTTPS is off."""
    return (await asyncio.to_thread(authorities(plane).trusted, "server")).decode()


def authorities(plane: ControlPlane) -> Certificates:
    """Return the certificate authorities of this host. Unavailable if HTTPS is off."""
    if not plane.settings.api.listen:
        raise Unavailable("this host is not reached by HTTPS", "set [api] listen in insulad.toml(5)")
    from insula.api.tls.certificates import Certificates  # takes 50 ms

    return Certificates(plane.settings.root / "pki")
