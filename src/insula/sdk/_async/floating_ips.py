"""`AsyncFloatingIpOperations`: /v1/tenants/{tenant}/floating-ips."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Literal

from insula.model.floating_ips import FloatingIpPatch, FloatingIpSpec, FloatingIpView
from insula.sdk import answers
from insula.sdk._async.calls import AsyncCaller


class AsyncFloatingIpOperations:
    """Floating addresses, which lead from outside to a tenant's instances."""

    def __init__(self, caller: AsyncCaller) -> None:
        self._caller = caller

    def list(
        self, tenant: str, *, prefix: str | None = None, labels: Sequence[str] = (), page: int | None = None
    ) -> AsyncIterator[FloatingIpView]:
        """Yield a tenant's floating addresses: those whose names begin with `prefix`, and that have all `labels`."""
        query = {"prefix": prefix, "label": [*labels]}
        return self._caller.pages(answers.FLOATING_IPS, "tenants", tenant, "floating-ips", query=query, page=page)

    async def allocate(
        self,
        tenant: str,
        name: str = "",
        *,
        address: str | None = None,
        family: Literal["ipv4", "ipv6"] = "ipv4",
        instance: str | None = None,
        network: str | None = None,
        labels: Mapping[str, str] | None = None,
        idempotency_key: str | None = None,
    ) -> FloatingIpView:
        """Allocate a floating address, by default a free one, and attach it to an instance if one is named."""
        spec = FloatingIpSpec(
            name=name, address=address, family=family, instance=instance, network=network, labels=dict(labels or {})
        )
        return await self._caller.change(
            answers.FLOATING_IP, "POST", "tenants", tenant, "floating-ips", body=spec, key=idempotency_key
        )

    async def get(self, tenant: str, floating_ip: str) -> FloatingIpView:
        return await self._caller.get(answers.FLOATING_IP, "tenants", tenant, "floating-ips", floating_ip)

    async def update(
        self,
        tenant: str,
        floating_ip: str,
        instance: str | None,
        *,
        network: str | None = None,
        idempotency_key: str | None = None,
    ) -> FloatingIpView:
        """Attach it to an instance, by its port on a network, or its first one; None detaches it."""
        patch = FloatingIpPatch(instance=instance, network=network)
        return await self._caller.change(
            answers.FLOATING_IP,
            "PATCH",
            "tenants",
            tenant,
            "floating-ips",
            floating_ip,
            body=patch,
            key=idempotency_key,
        )

    async def release(self, tenant: str, floating_ip: str, *, idempotency_key: str | None = None) -> None:
        """Release a floating address. Open connections by it are cut."""
        await self._caller.do("DELETE", "tenants", tenant, "floating-ips", floating_ip, key=idempotency_key)
