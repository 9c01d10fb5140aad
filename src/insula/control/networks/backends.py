"""The backends and the addresses of a load balancer, as its tenant has them now. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from insula.model.floating_ips import FloatingIp
from insula.model.load_balancers import LoadBalancer
from insula.model.objects import Instance, Port
from insula.model.rules import MAX_BACKENDS
from insula.network.intent import BalancerListener
from insula.network.reference.policy_model import matches


class Backend(NamedTuple):
    """One address of a backend. `id` is the instance's, "" if there is no instance of that name; an address is None if
    the instance has no network. `runs`: the instance runs."""

    name: str
    id: str
    address: str | None
    port: int
    runs: bool

    @property
    def end(self) -> tuple[str, int] | None:
        """Where its connections go; None if it can't have any."""
        return (self.address, self.port) if self.address and self.runs else None


def backends_of(balancer: LoadBalancer, instances: Iterable[tuple[Instance, bool]]) -> list[Backend]:
    """Return the addresses of the instances that are named or selected, by name. Each instance comes with whether it
    runs. It is reached by its port on a network of the balancer's, or else by its first one."""
    named, networks = {*balancer.instances}, {each.network for each in balancer.on} - {None}
    known = sorted(instances, key=lambda each: each[0].name)
    found = list[Backend]()
    chosen = 0
    for instance, runs in known:
        selected = balancer.select is not None and matches(balancer.select, instance.spec.labels)
        if not (selected or instance.name in named) or chosen == MAX_BACKENDS:
            continue
        chosen += 1
        port = next((port for port in instance.plugged if port.network in networks), instance.port)
        for address in _addresses(port) or [None]:
            found.append(Backend(instance.name, instance.id, address, balancer.port, runs))
    absent = sorted(named - {instance.name for instance, _ in known})
    return [*found, *(Backend(name, "", None, balancer.port, False) for name in absent)]


def _addresses(port: Port | None) -> Sequence[str | None]:
    return [each for each in (port.address, port.address6) if each] if port else []


def listeners_of(balancer: LoadBalancer, floating: Mapping[str, FloatingIp]) -> Iterator[BalancerListener]:
    """Yield where a balancer is reached. `floating` are the tenant's floating addresses by name."""
    for address, network in places_of(balancer, floating):
        for each in balancer.listen:
            yield BalancerListener(address=address, port=each.port, protocol=each.protocol, network=network)


def places_of(balancer: LoadBalancer, floating: Mapping[str, FloatingIp]) -> Iterator[tuple[str | None, str | None]]:
    """Yield the addresses of a balancer, each with its network; None as address is every address of the host, None as
    network is outside."""
    for place in balancer.reached:
        if place.floating_ip is not None:
            if found := floating.get(place.floating_ip):
                yield found.address, None
        elif place.network is not None:
            yield from ((each, place.network) for each in (place.address, place.address6) if each)
        else:
            yield place.address, None
