"""Declared state: the requests of `insula apply` and `diff`, their results, and the stored sets.

A *set* is what one `insula apply` keeps together, as the ApplySet of Kubernetes (KEP-3659). It is an object of the
server with an ID, not a label, so that nobody puts an object into it by accident.
"""

# ruff: noqa: RUF012 (msgspec copies mutable defaults)

from __future__ import annotations

from typing import Annotated, Any, Literal

from insula.model import fields
from insula.model.objects import Struct

API_VERSION = "insula/v1"
MAX_SIZE = 1 << 20
"""Characters of all files of a request."""
Format = Literal["yaml", "toml", "json"]


class Metadata(Struct, kw_only=True):
    """The name of a declared object. `tenant` is its owner; None is the tenant of the request."""

    name: fields.Label
    tenant: fields.Label | None = None
    labels: fields.Labels = {}


# -- requests ------------------------------------------------------------------------------------------------------


class DeclaredFile(Struct, kw_only=True):
    """A file with documents. `name` is for messages only."""

    name: Annotated[str, fields.schema(maxLength=4096)] = "-"
    format: Format = "yaml"
    text: Annotated[str, fields.schema(maxLength=MAX_SIZE)]


class ApplySpec(Struct, kw_only=True):
    """The request of `insula apply` and `insula diff`.

    `prune` removes members of the set that the files do not declare any more. `force` takes over what was changed by
    hand, or belongs to another set. `replace` removes and creates again what can't be changed. `allow_empty` accepts
    files without documents, and `yes` a removal of tenants or of more than half of the set.
    """

    files: Annotated[list[DeclaredFile], fields.at_most(1000)] = []
    set: fields.Label = "default"
    prune: bool = False
    force: bool = False
    replace: bool = False
    allow_empty: bool = False
    yes: bool = False


# -- responses -----------------------------------------------------------------------------------------------------

Operation = Literal["none", "create", "update", "replace", "remove"]


class DeclaredItem(Struct, kw_only=True):
    """What was done about one object, or would be done ("planned"). `diff` are lines of a unified diff.

    "refused": it can't be done without another option, as after a change by hand. "skipped": something that it depends
    on was not done.
    """

    kind: str
    name: str
    tenant: str | None = None
    operation: Operation
    state: Literal["planned", "done", "refused", "failed", "skipped"]
    reason: str | None = None
    advice: str | None = None
    diff: list[str] = []


# -- stored ----------------------------------------------------------------------------------------------------------


class ApplySet(Struct, kw_only=True):
    """A set. `tenant` is None for one of the host, which may have members in several tenants."""

    id: str
    name: str
    tenant: str | None
    created: float


class SetMember(Struct, kw_only=True):
    """A member of a set: the object with the unique ID `uid`, and its fields as they were applied last.

    An object that is removed and made again by hand has another `uid`: it is no member. `tenant` and `name` are those
    of the set whose ID is `set`. `object` is the name of the object if it can't be part of a key, which then has a
    digest of it.
    """

    set: str
    tenant: str | None
    name: str
    uid: str
    object: str | None = None
    applied: dict[str, Any]
