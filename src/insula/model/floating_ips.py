"""Floating addresses: external addresses of a tenant that lead to an instance, and move to another at once.

They come from the operator's pool (`network.floating` of insulad.toml). An address that is attached to no instance may
have published ports and load balancers of its tenant.
"""

# ruff: noqa: RUF012 (msgspec copies mutable defaults)

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, UnsetType

from insula.model import fields
from insula.model.objects import Struct


class FloatingIp(Struct, kw_only=True):
    """A floating address. `instance` is the ID of the instance that has all its packets, by its port on `network`; None
    as network is its first one.

    `kept_for` is the name of an instance that an apply replaces: when it creates that again, the address is attached to
    the new one, by the port on the same network.
    """

    tenant: str
    name: str
    address: str
    instance: str | None = None
    network: str | None = None
    kept_for: str | None = None
    labels: dict[str, str] = {}
    created: float


class FloatingIpView(Struct, kw_only=True):
    """A floating address with the name of its instance, and the `target`, the instance's address. `reason` says why
    there is none although it is attached."""

    floating_ip: FloatingIp
    instance: str | None = None
    target: str | None = None
    reason: str | None = None


class FloatingIpSpec(Struct, kw_only=True):
    """The request of `insula floating-ip allocate`. Without an address it is a free one of the pool, without a name it
    gets one."""

    name: fields.OptionalLabel = ""
    address: fields.IpAddress | None = None
    family: Literal["ipv4", "ipv6"] = "ipv4"
    instance: fields.Label | None = None
    network: fields.Label | None = None
    labels: fields.Labels = {}


class FloatingIpPatch(Struct, kw_only=True):
    """A change of a floating address, as a JSON merge patch: the instance that it is attached to, and the network of
    the port; null detaches it."""

    instance: fields.Label | UnsetType | None = UNSET
    network: fields.Label | None = None
