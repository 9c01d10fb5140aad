"""`LoadBalancerOperations`: /v1/tenants/{tenant}/load-balancers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from msgspec import UNSET, UnsetType

from insula.model.load_balancers import (
    Affinity,
    BackendCheck,
    BalancerAddress,
    BalancerPort,
    LoadBalancerPatch,
    LoadBalancerSpec,
    LoadBalancerView,
)
from insula.model.policies import Selector
from insula.sdk import answers
from insula.sdk._sync.calls import Caller


class LoadBalancerOperations:
    """Load balancers, which spread connections over a tenant's instances."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    def list(
        self, tenant: str, *, prefix: str | None = None, labels: Sequence[str] = (), page: int | None = None
    ) -> Iterator[LoadBalancerView]:
        """Yield the load balancers of a tenant: those whose names begin with `prefix`, and that have all `labels`."""
        query = {"prefix": prefix, "label": [*labels]}
        return self._caller.pages(answers.LOAD_BALANCERS, "tenants", tenant, "load-balancers", query=query, page=page)

    def create(
        self,
        tenant: str,
        name: str,
        listen: Sequence[BalancerPort],
        on: Sequence[BalancerAddress],
        *,
        port: int | None = None,
        select: Selector | None = None,
        instances: Sequence[str] = (),
        affinity: Affinity = "none",
        health: BackendCheck | None = None,
        labels: Mapping[str, str] | None = None,
        idempotency_key: str | None = None,
    ) -> LoadBalancerView:
        """Create a load balancer that listens at these ports of these addresses. Its backends are the instances that
        are named, and those that `select` selects."""
        spec = LoadBalancerSpec(
            name=name,
            listen=[*listen],
            on=[*on],
            port=port,
            select=select,
            instances=[*instances],
            affinity=affinity,
            health=health,
            labels=dict(labels or {}),
        )
        return self._caller.change(
            answers.LOAD_BALANCER, "POST", "tenants", tenant, "load-balancers", body=spec, key=idempotency_key
        )

    def get(self, tenant: str, load_balancer: str) -> LoadBalancerView:
        """Return a load balancer, with the state of its backends."""
        return self._caller.get(answers.LOAD_BALANCER, "tenants", tenant, "load-balancers", load_balancer)

    def update(
        self,
        tenant: str,
        load_balancer: str,
        *,
        listen: Sequence[BalancerPort] | UnsetType = UNSET,
        port: int | UnsetType = UNSET,
        select: Selector | UnsetType | None = UNSET,
        instances: Sequence[str] | UnsetType = UNSET,
        affinity: Affinity | UnsetType = UNSET,
        health: BackendCheck | UnsetType = UNSET,
        idempotency_key: str | None = None,
    ) -> LoadBalancerView:
        """Change a load balancer; what is absent stays."""
        patch = LoadBalancerPatch(
            listen=listen if isinstance(listen, UnsetType) else [*listen],
            port=port,
            select=select,
            instances=instances if isinstance(instances, UnsetType) else [*instances],
            affinity=affinity,
            health=health,
        )
        return self._caller.change(
            answers.LOAD_BALANCER,
            "PATCH",
            "tenants",
            tenant,
            "load-balancers",
            load_balancer,
            body=patch,
            key=idempotency_key,
        )

    def remove(self, tenant: str, load_balancer: str, *, idempotency_key: str | None = None) -> None:
        """Remove a load balancer. Connections through it are cut."""
        self._caller.do("DELETE", "tenants", tenant, "load-balancers", load_balancer, key=idempotency_key)
