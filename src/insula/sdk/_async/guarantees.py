"""`AsyncGuaranteeOperations`: /v1/tenants/{tenant}/guarantee and /guarantees."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Unpack

from insula.model.guarantees import GuaranteePatch, GuaranteeView
from insula.sdk import answers
from insula.sdk._async.calls import AsyncCaller
from insula.sdk.types import GuaranteeOptions


class AsyncGuaranteeOperations:
    """Floors and ceilings: of a tenant as a whole, which operators set, and of its instances."""

    def __init__(self, caller: AsyncCaller) -> None:
        self._caller = caller

    def list(self, tenant: str, *, prefix: str | None = None, page: int | None = None) -> AsyncIterator[GuaranteeView]:
        """Yield the guarantees of the tenant and its instances: of those whose names begin with `prefix`."""
        query = {"prefix": prefix}
        return self._caller.pages(answers.GUARANTEES, "tenants", tenant, "guarantees", query=query, page=page)

    async def get_of_tenant(self, tenant: str) -> GuaranteeView:
        return await self._caller.get(answers.GUARANTEE, "tenants", tenant, "guarantee")

    async def set_of_tenant(
        self, tenant: str, *, idempotency_key: str | None = None, **values: Unpack[GuaranteeOptions]
    ) -> GuaranteeView:
        """Change the given floors and ceilings of a tenant as a whole; None is none. Conflict if that would promise
        more than the host has."""
        patch = GuaranteePatch(**values)
        return await self._caller.change(
            answers.GUARANTEE, "PATCH", "tenants", tenant, "guarantee", body=patch, key=idempotency_key
        )

    async def clear_of_tenant(self, tenant: str, *, idempotency_key: str | None = None) -> None:
        """Remove all floors and ceilings of a tenant as a whole. Conflict while instances have floors."""
        await self._caller.do("DELETE", "tenants", tenant, "guarantee", key=idempotency_key)

    async def get(self, tenant: str, instance: str) -> GuaranteeView:
        return await self._caller.get(answers.GUARANTEE, "tenants", tenant, "guarantees", instance)

    async def set(
        self, tenant: str, instance: str, *, idempotency_key: str | None = None, **values: Unpack[GuaranteeOptions]
    ) -> GuaranteeView:
        """Change the given floors and ceilings of an instance; None is none. Conflict if that would promise more than
        the tenant's floors."""
        patch = GuaranteePatch(**values)
        return await self._caller.change(
            answers.GUARANTEE, "PATCH", "tenants", tenant, "guarantees", instance, body=patch, key=idempotency_key
        )

    async def clear(self, tenant: str, instance: str, *, idempotency_key: str | None = None) -> None:
        """Remove all floors and ceilings of an instance."""
        await self._caller.do("DELETE", "tenants", tenant, "guarantees", instance, key=idempotency_key)
