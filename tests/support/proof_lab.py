"""Corruptions of what is installed, which the proof of isolation has to find."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from insula.model.policies import Policy
from insula.network.proof.findings import ProofFinding
from insula.network.proof.prover import Prover
from tests.support.lab import Lab


@dataclass(frozen=True)
class Corruption:
    """What is done with these policies in force, and one difference that it makes: its kind, source and target, and a
    part of its text."""

    do: Callable[[Lab], None]
    kind: str
    source: str
    target: str
    says: str
    policies: tuple[Policy, ...] = ()

    def is_among(self, found: Sequence[ProofFinding]) -> bool:
        return any(
            (each.kind, each.source, each.target) == (self.kind, self.source, self.target) and self.says in each.text
            for each in found
        )


def prove(cloud: Lab, prover: Prover | None = None) -> list[ProofFinding]:
    """What the proof finds of all tenants."""
    running = {instance.port.index for instance in cloud.instances.values()}
    return (prover or Prover(cloud.fabric)).prove([cloud.intent(name) for name in cloud.tenants], running).findings


def told(found: Sequence[ProofFinding]) -> list[str]:
    return [f"{each.kind} {each.source} → {each.target}: {each.text}" for each in found]


def finds(cloud: Lab, corruption: Corruption) -> None:
    """Nothing is found before the corruption, and it is found afterwards."""
    prover = Prover(cloud.fabric)
    assert told(prove(cloud, prover)) == [], "the positive control"
    corruption.do(cloud)
    found = prove(cloud, prover)
    assert corruption.is_among(found), told(found)


def nft(cloud: Lab, tenant: str, command: str) -> None:
    """Change the rules in a tenant's namespace."""
    cloud.fabric._tenant(cloud.tenants[tenant]).nft.run(command)


def on_host(cloud: Lab, command: str) -> None:
    """Change the host's rules."""
    cloud.fabric._handles()[1].run(command)
