"""The keys of objects in the store.

/tenants/TENANT                     Tenant
/usage/TENANT                       Usage: the sums over its instances; see allocation/quotas.py
/networks/TENANT/NETWORK            Network
/routers/TENANT/ROUTER              Router
/policies/TENANT/POLICY             Policy
/address-groups/TENANT/GROUP        AddressGroup
/operator-policies/POLICY           OperatorPolicy
/peerings/TENANT/OTHER/NAME         Peering, once below each of its two tenants
/endpoints/TENANT/ENDPOINT          ServiceEndpoint
/floating-ips/TENANT/NAME           FloatingIp
/load-balancers/TENANT/NAME         LoadBalancer
/healthy-backends/TENANT/NAME       HealthyBackends of a load balancer: measured
/guarantees/TENANT/ID               Guarantee of the instance with that ID; ID is "_" for the tenant as a whole
/floors/_                           FloorGuard
/images/OWNER/NAME                  Image; OWNER is "_" for shared ones
/instances/TENANT/INSTANCE          Instance: the desired state
/status/TENANT/INSTANCE             InstanceStatus: the observed state, when it has settled
/events/TENANT/INSTANCE             InstanceEvent: the last one; the store's history has earlier ones
/snapshots/TENANT/ID/NAME           InstanceSnapshot of the instance with that ID
/claims/KIND/…                      see allocation/reservations.py
/external/PROTOCOL/PORTS/ADDRESS    ExternalClaim of a range of ports; ADDRESS is "*" for all of the host's
/external-guard                     see networks/external.py
/identities/principals/TENANT/NAME  Principal; TENANT is "_" for users, "_groups" for groups of providers
/identities/bindings/TENANT/ID      Binding of the principal with that ID; TENANT is "_" for the host
/identities/tokens/ID               Token
/identities/certificates/SERIAL     Certificate
/audit/outbox/N                     see api/outbox.py
/accounting/…                       see accounting/
/declared/sets/TENANT/SET           ApplySet; TENANT is "_" for those of the host
/declared/members/TENANT/KIND/NAME  SetMember: an object that belongs to a set; TENANT is its own, or "_"
/idempotency/PRINCIPAL/DIGEST       IdempotencyRecord of the key with that digest; PRINCIPAL is "_" for the operator
"""

from __future__ import annotations

from insula.model import upgrades
from insula.model.accounting import Account, Checkpoint, History, Ledger, TenantUsage, TrafficMeters, UsageMeter
from insula.model.declared import ApplySet, SetMember
from insula.model.external import ExternalClaim
from insula.model.floating_ips import FloatingIp
from insula.model.guarantees import FloorGuard, Guarantee
from insula.model.load_balancers import HealthyBackends, LoadBalancer
from insula.model.objects import IdempotencyRecord, Image, Instance, InstanceEvent, InstanceStatus, Network, Tenant
from insula.model.peerings import Peering
from insula.model.policies import AddressGroup, OperatorPolicy, Policy
from insula.model.principals import Binding, Certificate, Principal, Token
from insula.model.routers import Router
from insula.model.service_endpoints import ServiceEndpoint
from insula.model.snapshots import InstanceSnapshot
from insula.model.views import Usage
from insula.store.typed import Keyspace

TENANTS = Keyspace("/tenants", Tenant, 1)
USAGE = Keyspace("/usage", Usage, 1)
NETWORKS = Keyspace("/networks", Network, 2)
ROUTERS = Keyspace("/routers", Router, 2)
POLICIES = Keyspace("/policies", Policy, 2)
ADDRESS_GROUPS = Keyspace("/address-groups", AddressGroup, 2)
OPERATOR_POLICIES = Keyspace("/operator-policies", OperatorPolicy, 1)
PEERINGS = Keyspace("/peerings", Peering, 3)
ENDPOINTS = Keyspace("/endpoints", ServiceEndpoint, 2)
FLOATING_IPS = Keyspace("/floating-ips", FloatingIp, 2)
LOAD_BALANCERS = Keyspace("/load-balancers", LoadBalancer, 2)
HEALTHY = Keyspace("/healthy-backends", HealthyBackends, 2)
GUARANTEES = Keyspace("/guarantees", Guarantee, 2)
FLOOR_GUARDS = Keyspace("/floors", FloorGuard, 1)
IMAGES = Keyspace("/images", Image, 2)
INSTANCES = Keyspace("/instances", Instance, 2, upgrades.instance)
STATUS = Keyspace("/status", InstanceStatus, 2, upgrades.status)
EVENTS = Keyspace("/events", InstanceEvent, 2)
SNAPSHOTS = Keyspace("/snapshots", InstanceSnapshot, 3)

IDENTITIES = "/identities/"
"""The prefix of all that says who may do what."""
PRINCIPALS = Keyspace("/identities/principals", Principal, 2)
BINDINGS = Keyspace("/identities/bindings", Binding, 2)
TOKENS = Keyspace("/identities/tokens", Token, 1)
CERTIFICATES = Keyspace("/identities/certificates", Certificate, 1)
IDEMPOTENCY = Keyspace("/idempotency", IdempotencyRecord, 2)

ACCOUNTS = Keyspace("/accounting/instances", Account, 2, upgrades.account)
LEDGERS = Keyspace("/accounting/ledgers", Ledger, 1)
GROUPS = Keyspace("/accounting/groups", UsageMeter, 2)
EGRESS = Keyspace("/accounting/egress", TrafficMeters, 2)
HISTORIES = Keyspace("/accounting/history", History, 2)
REMOVED = Keyspace("/accounting/removed", TenantUsage, 2)
CHECKPOINTS = Keyspace("/accounting/checkpoints", Checkpoint, 1)
SETS = Keyspace("/declared/sets", ApplySet, 2)
MEMBERS = Keyspace("/declared/members", SetMember, 3)

EXTERNAL = Keyspace("/external", ExternalClaim, 3)

OUTBOX = "/audit/outbox/"
"""The prefix of what requests are about to do, until the audit log has it."""

HOST = "_"
"""The tenant, in keys, of users, of bindings and of sets on the host; no tenant can have this name."""
PROVIDERS = "_groups"
"""The tenant, in keys, of groups of providers of OpenID Connect; no tenant can have this name."""
SHARED = "_"
"""The owner, in keys, of shared images. No tenant can have this name."""
