"""`OidcSettings`: the settings of a provider of OpenID Connect, `[[oidc]]` in insulad.toml(5)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec

_MAX_PROVIDERS = 8
_MAX_SCOPES = 16
_PROVIDER = re.compile(r"[a-z][a-z0-9-]{0,15}")
_WORD = re.compile(r"[!-~](?:[ -~]{0,254}[!-~])?")
_SCOPE = re.compile(r"[!#-\[\]-~]{1,128}")  # RFC 6749, 3.3
_URL = re.compile(
    r"(?P<scheme>https?)://(?P<host>[A-Za-z0-9.-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(:[0-9]{1,5})?(/[!-\"$-~]{0,500})?"
)


class OidcSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One of `[[oidc]]`: a provider of OpenID Connect. `name` is its name in Insula, as in the group NAME:GROUP."""

    name: str = "oidc"
    issuer: str = ""
    client_id: str = ""
    audience: str = ""
    name_claim: str = "name"
    groups_claim: str = "groups"
    scopes: list[str] = msgspec.field(default_factory=lambda: ["openid", "profile"])
    ca: str = ""
    allow_loopback: bool = False


def check_providers(providers: list[OidcSettings], wrong: Any) -> None:
    """Check values beyond their types. `wrong` makes the error of a key, a value, what is wrong with it and a hint."""
    if len(providers) > _MAX_PROVIDERS:
        raise wrong("oidc", len(providers), "are too many", f"name at most {_MAX_PROVIDERS}")
    for key in ("name", "issuer"):
        values = [getattr(each, key) for each in providers]
        if twice := next((value for value in values if values.count(value) > 1), None):
            raise wrong(f"oidc.{key}", twice, "is there twice", "give each provider its own")
    for each in providers:
        if not _PROVIDER.fullmatch(each.name):
            raise wrong("oidc.name", each.name, "is no name", "use 1 to 16 of a-z, 0-9 and -, a letter first")
        if not is_provider_url(each.issuer, loopback=each.allow_loopback) or "?" in each.issuer:
            raise wrong("oidc.issuer", each.issuer, "is no https URL", "as in https://login.example.com/realms/lab")
        for key in ("client_id", "name_claim", "groups_claim", *(["audience"] if each.audience else [])):
            if not _WORD.fullmatch(getattr(each, key)):
                raise wrong(f"oidc.{key}", getattr(each, key), "is not 1 to 256 printable characters", "write it down")
        if len(each.scopes) > _MAX_SCOPES or "openid" not in each.scopes or not all(map(_SCOPE.fullmatch, each.scopes)):
            raise wrong("oidc.scopes", each.scopes, "are no scopes with openid", 'as in ["openid", "profile"]')
        if each.ca and (not Path(each.ca).is_absolute() or ".." in Path(each.ca).parts or "\0" in each.ca):
            raise wrong("oidc.ca", each.ca, "is not absolute", "write the whole path")


def is_provider_url(text: str, *, loopback: bool) -> bool:
    """Whether the text is an https URL without user and fragment; http of a loopback address with `loopback`."""
    match = _URL.fullmatch(text)
    return match is not None and (match["scheme"] == "https" or (loopback and match["host"] in ("127.0.0.1", "[::1]")))


DESCRIPTIONS = (
    ("name", "1 to 16 of a-z, 0-9 and -", "Name of the provider in Insula, as in the group NAME:GROUP."),
    ("issuer", "https URL", "The provider's issuer identifier, exactly as it is in its tokens."),
    ("client_id", "text", "The client that Insula's command line is at the provider: a public one."),
    (
        "audience",
        "text",
        "If the provider issues access tokens as JWT (RFC 9068): the audience that stands for this API. Only these are "
        "accepted then. Without it ID tokens of the client are.",
    ),
    ("name_claim", "text", "The claim with a name for people to read. It is no identity."),
    ("groups_claim", "text", "The claim with the groups of the user."),
    ("scopes", "list of at most 16 texts", "The scopes that the command line asks for."),
    (
        "ca",
        "absolute path",
        "A file with the authorities (PEM) that the provider's certificate is checked with, instead of the system's.",
    ),
    ("allow_loopback", "true, false", "Whether the provider may be at http://127.0.0.1 or http://[::1]: for tests."),
)
"""Each setting: its name, the values that it takes, and its meaning."""
