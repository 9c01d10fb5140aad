"""The proof of isolation: what is installed, interpreted for all packets at once, is what the intent wants.

Three parts are independent of each other: the reference model computes from the intent which packets should come where;
the fabric installs the intent; the fabric's interpreter reads the kernel and computes which packets may come where.
Every difference between the first and the last is a finding, with one packet as its witness.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from insula.model.objects import Tenant
from insula.network.fabric import Entries, Fabric
from insula.network.intent import TenantIntent
from insula.network.interpreter.delivery import Delivery
from insula.network.interpreter.interpretation import Interpretation
from insula.network.interpreter.space import Boundaries
from insula.network.proof import findings, link_findings, queue_findings
from insula.network.proof.collector import resting_collector
from insula.network.proof.findings import ProofFinding
from insula.network.reference.connections import ConnectionReference
from insula.network.reference.expectation import Expectation
from insula.network.reference.host import HostReference
from insula.network.reference.model import ReferenceModel
from insula.network.reference.queues import guaranteed

VERSIONS: Final = (4, 6)


@dataclass
class Proof:
    """`cells` is the number of packet classes that were compared, over all sources, destinations and services.
    `computed` is the number of tenants that were computed anew, of `tenants`."""

    cells: int = 0
    findings: list[ProofFinding] = field(default_factory=list)
    tenants: int = 0
    computed: int = 0


@dataclass
class _Known:
    """The last result of a tenant, and what it was computed from; which connections the intent allows."""

    found: Interpretation
    intent: TenantIntent
    running: Collection[int]
    entries: Entries
    proof: Proof
    connections: ConnectionReference | None = None


class Prover:
    """Proves tenants, and remembers the result of each: one that has not changed is not computed again."""

    def __init__(self, fabric: Fabric) -> None:
        self._fabric = fabric
        self._known: dict[str, _Known] = {}
        self._host: tuple[Interpretation, Proof] | None = None

    def prove(self, intents: Sequence[TenantIntent], running: Collection[int]) -> Proof:
        """Comparison all tenants of this host; `running` are the indices of the ports that are plugged.

        InsulaError if a tenant can't be read.
        """
        whole = Proof(tenants=len(intents))
        entries = self._fabric.entries([intent.tenant for intent in intents])
        for intent in intents:
            known = self._known.get(intent.tenant.name)
            one = self._tenant(intent, running, entries[intent.tenant.name])
            whole.computed += known is None or known.proof is not one
            _add(whole, one)
            whole.findings += self.connections(intent)
        _add(whole, self.between([intent.tenant for intent in intents], intents))
        numbers = {intent.tenant.name: guaranteed(intent) for intent in intents}
        installed = self._fabric.installed_queues([intent.tenant for intent in intents], numbers)
        whole.findings += queue_findings.findings(intents, installed)
        unread = {f"the filter of packets of {tenant} ({direction})" for tenant, direction in installed.unread}
        whole.findings += findings.unknown("host", unread)
        names = {intent.tenant.name for intent in intents}
        self._known = {name: known for name, known in self._known.items() if name in names}
        return whole

    def tenant(self, intent: TenantIntent, running: Collection[int]) -> Proof:
        """Comparison one tenant: what its ports send and receive, and what comes from its uplink."""
        return self._tenant(intent, running, self._fabric.entries([intent.tenant])[intent.tenant.name])

    @resting_collector()
    def _tenant(self, intent: TenantIntent, running: Collection[int], entries: Entries) -> Proof:
        name, mine = intent.tenant.name, frozenset(port.index for port in intent.ports).intersection(running)

        @functools.cache
        def references() -> dict[int, ReferenceModel]:
            return {v: self._model(intent, v, mine, entries) for v in VERSIONS}

        found = self._fabric.interpret(intent.tenant, intent, mine, lambda: _boundaries(references()))
        known = self._known.get(name)
        if (
            known
            and known.found is found
            and known.intent == intent
            and (known.running, known.entries) == (mine, entries)
        ):
            return known.proof
        proof = Proof()
        for delivery in found.inside:
            _compare(proof, name, delivery, references()[delivery.version].of_ports(delivery.space, delivery.senders))
        for delivery in found.groups:
            _compare(proof, name, delivery, references()[delivery.version].of_groups(delivery.space, delivery.senders))
        for delivery in found.above:
            reference, from_peer = references()[delivery.version], delivery.senders[0].place.kind == "peer"
            if from_peer:
                expected = reference.of_peer(delivery.space, delivery.senders)
            else:
                expected = reference.of_uplink(delivery.space, delivery.senders)
            _compare(proof, name, delivery, expected)
        proof.findings += findings.forged(name, found.forgeries)
        proof.findings += findings.overheard(name, found.overheard)
        proof.findings += link_findings.findings(intent, found.links, mine)
        proof.findings += findings.unknown(name, found.unknown)
        self._known[name] = _Known(found, intent, mine, entries, proof)
        return proof

    def _model(self, intent: TenantIntent, version: int, running: Collection[int], entries: Entries) -> ReferenceModel:
        return ReferenceModel(intent, version, self._fabric.reserved, running, entries, self._fabric.between_peers)

    def connections(self, intent: TenantIntent) -> list[ProofFinding]:
        """Return the open connections of a tenant that was proven, and that its intent does not allow. It is asked once
        about each, as long as the intent stays the same."""
        known = self._known[intent.tenant.name]
        listed = self._fabric.connections(intent.tenant, known.found.judged)
        if known.connections is None:
            models = {v: self._model(intent, v, known.running, known.entries) for v in VERSIONS}
            known.connections = ConnectionReference(intent, models)
        return list(findings.open_connections(intent, known.connections.forbidden(listed)))

    def between(self, tenants: Sequence[Tenant], intents: Sequence[TenantIntent] = ()) -> Proof:
        """Comparison what the host forwards: nothing between tenants, and to the outside what has the right source."""
        entries = self._fabric.entries([intent.tenant for intent in intents])
        offered = [(intent.tenant, intent.networks, intent.outside) for intent in intents], entries

        @functools.cache
        def references() -> dict[int, HostReference]:
            return {v: HostReference(v, self._fabric.reserved, intents, entries) for v in VERSIONS}

        found = self._fabric.interpret_host(tenants, offered, lambda: _boundaries(references()))
        if self._host and self._host[0] is found:
            return self._host[1]
        proof = Proof()
        for delivery in found.inside:
            expected = references()[delivery.version].of_uplinks(delivery.space, delivery.senders)
            expected.excuse(delivery.unrouted)  # where the host itself can't go, tenants need not
            _compare(proof, "host", delivery, expected)
        for delivery in found.above:
            _compare(proof, "host", delivery, references()[delivery.version].of_others(delivery.space))
        proof.findings += findings.unknown("host", found.unknown)
        self._host = found, proof
        return proof


def _boundaries(references: Mapping[int, ReferenceModel | HostReference]) -> dict[int, Boundaries]:
    found = {version: Boundaries(version) for version in references}
    for version, reference in references.items():
        reference.cut(found[version])
    return found


def _compare(proof: Proof, tenant: str, delivery: Delivery, expected: Expectation) -> None:
    """Add the differences between what is delivered and what is expected."""
    space = delivery.space
    proof.cells += space.sources * len(space.targets) * len(space.services)
    proof.findings += _between(tenant, delivery, expected)


def _between(tenant: str, delivery: Delivery, expected: Expectation) -> Iterator[ProofFinding]:
    for place in dict.fromkeys([*delivery.ends, *expected.required]):
        have = delivery.ends.get(place, 0)
        leaks = have & ~expected.permitted.get(place, 0) & ~expected.ignored
        blocked = expected.required.get(place, 0) & ~have
        yield from findings.between(tenant, "leak", delivery, place, leaks)
        yield from findings.between(tenant, "blocked", delivery, place, blocked)


def _add(whole: Proof, one: Proof) -> None:
    whole.cells += one.cells
    whole.findings += one.findings
