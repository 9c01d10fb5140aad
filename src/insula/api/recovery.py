"""Answers made anew for requests with an idempotency key whose first answer is not there: insulad ended between the
commit and the answer, or the answer was too long to keep. They show the object as it is now."""

from __future__ import annotations

from typing import Any

import msgspec
from litestar import Request, Response

from insula.api.answers import Answer
from insula.api.authorization import authority_of, check_labels
from insula.control.keys import FLOATING_IPS, INSTANCES
from insula.control.plane import ControlPlane
from insula.model.errors import Conflict, NotFound
from insula.model.floating_ips import FloatingIpView
from insula.model.guarantees import GuaranteeView
from insula.model.load_balancers import LoadBalancerView
from insula.model.objects import Image
from insula.model.peerings import DEFAULT_NAME, PeeringView
from insula.model.policies import AddressGroup, OperatorPolicy
from insula.model.policy_views import PolicyView
from insula.model.principals import BindingSpec, BindingView, PrincipalView
from insula.model.routers import RouterView
from insula.model.service_endpoints import ServiceEndpoint
from insula.model.snapshots import SnapshotView
from insula.model.views import InstanceView, NetworkView, TenantView
from insula.store.typed import Keyspace


async def recovered(request: Request[Any, Any, Any], plane: ControlPlane, handler: Any, revision: int) -> Response[Any]:
    """Return the answer to a request that was committed at `revision`. Conflict if there is none to make."""
    kind = handler.parsed_fn_signature.return_type.annotation
    if kind in (None, type(None)):
        return Response(None, status_code=handler.status_code)
    tenant = request.path_params.get("tenant")
    body = msgspec.json.decode(await request.body() or b"{}")
    named = str(request.path_params.get("name") or body.get("name") or "").lstrip("/")
    content: Any
    if kind is InstanceView:
        renamed = request.query_params.get("to") if "to" in handler.parsed_fn_signature.parameters else None
        name = renamed or named or await _created_at(plane, INSTANCES, str(tenant), revision)
        await check_labels(authority_of(request.scope), plane, str(tenant), name)  # it may be another one by now
        content = await plane.instances.get(str(tenant), name)
    elif kind is TenantView:
        content = await plane.tenants.get(str(tenant or named))
    elif kind is NetworkView:
        content = await plane.networks.get(str(tenant), request.path_params.get("network") or named)
    elif kind is RouterView:
        content = await plane.routers.get(str(tenant), request.path_params.get("router") or named)
    elif kind is ServiceEndpoint:
        content = await plane.endpoints.get(str(tenant), named)
    elif kind is FloatingIpView:
        name = (
            request.path_params.get("floating_ip")
            or named
            or await _created_at(plane, FLOATING_IPS, str(tenant), revision)
        )
        content = await plane.floating_ips.get(str(tenant), name)
    elif kind is LoadBalancerView:
        content = await plane.load_balancers.get(str(tenant), request.path_params.get("load_balancer") or named)
    elif kind is PolicyView:
        content = await plane.policies.get(str(tenant), request.path_params.get("policy") or named)
    elif kind is AddressGroup:
        content = await plane.address_groups.get(str(tenant), request.path_params.get("group") or named)
    elif kind is OperatorPolicy:
        content = await plane.operator_policies.get(request.path_params.get("policy") or named)
    elif kind is PeeringView:
        peer, peering = (request.path_params.get(each) for each in ("peer", "peering"))
        name = str(peering or body.get("name") or DEFAULT_NAME)
        content = await plane.peerings.get(str(tenant), str(peer or body.get("to")), name)
    elif kind is SnapshotView and body.get("name"):
        content = await plane.snapshots.get(str(tenant), str(request.path_params["name"]), body["name"])
    elif kind is GuaranteeView:
        content = await plane.guarantees.get(str(tenant), request.path_params.get("instance"))
    elif kind is Image:
        content = await plane.images.get(str(tenant), named)
    elif kind is PrincipalView:
        content = plane.identities.get(f"{tenant or ''}/{named}")
    elif kind is BindingView:
        content = _binding(plane, msgspec.convert(body, BindingSpec), tenant)
    else:
        raise Conflict("this request was carried out, and its answer is not kept", "look at what is there")
    return Answer(content, status_code=handler.status_code)


async def _created_at(plane: ControlPlane, kind: Keyspace[Any], tenant: str, revision: int) -> str:
    """The name of the object that was created at this revision of the store: one that its user had not named."""
    for entry in (await plane.context.store.list(kind.prefix(tenant))).entries:
        if entry.created == revision:
            return kind.parts(entry.key)[1]
    raise NotFound("what this request made is not there any more", "send the request with a new key")


def _binding(plane: ControlPlane, spec: BindingSpec, tenant: str | None) -> BindingView:
    for each in plane.identities.bindings(tenant):
        if each.user == spec.user:
            return each
    raise NotFound(f"{spec.user} has no role there any more", "send the request with a new key")
