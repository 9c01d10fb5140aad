"""Threads that call the fabric against each other, as those do whose caller was cancelled or has lost patience."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from insula.model.errors import InsulaError, Unavailable
from insula.network.linux.fabric import LinuxFabric
from insula.network.linux.tenant import TenantNamespace
from tests.support.lab import Lab, isolated
from tests.system.test_network_cleanup import host_up, snapshot

ROUNDS = 4


class Hammer:
    """Threads that call things over and over. `done` counts what succeeded, `errors` has what may not happen."""

    def __init__(self, works: Mapping[str, Callable[[], object]], threads: int) -> None:
        self.done: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.errors: list[BaseException] = []
        self._names = list(works)
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._work, args=(name, work))
            for name, work in works.items()
            for _ in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def _work(self, name: str, work: Callable[[], object]) -> None:
        while not self._stop.is_set():
            try:
                work()
                self.done[name] += 1
            except Unavailable as error:
                self.refused[error.message] += 1
                return
            except InsulaError:  # what it needs was taken away a moment ago
                pass
            except BaseException as error:
                self.errors.append(error)
                return

    def wait_until_all_have_succeeded(self, times: int = 1) -> None:
        deadline = time.monotonic() + 20
        while any(self.done[name] < times for name in self._names) and not self.errors:
            assert time.monotonic() < deadline, self.done
            time.sleep(0.005)

    def end(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(20)
        assert not any(thread.is_alive() for thread in self._threads)
        assert self.errors == []


def works(cloud: Lab) -> dict[str, Callable[[], object]]:
    """One of each kind of call about the tenant acme; `remove` takes away what the others need."""
    fabric, tenant, network = cloud.fabric, cloud.tenants["acme"], cloud.networks["acme", "net"]
    instance = cloud.instances["acme", "web"]

    def remove() -> None:
        time.sleep(0.2)  # leave the others some time to succeed
        fabric.remove_tenant(tenant)

    return {
        "ensure": lambda: fabric.ensure_tenant(tenant),
        "network": lambda: fabric.ensure_network(tenant, network),
        "status": lambda: fabric.status(tenant, network),
        "attach": lambda: fabric.attach(tenant, network, instance.port, instance.netns),
        "detach": lambda: fabric.detach(tenant, network, instance.port),
        "names": lambda: fabric.set_names(tenant, {"web": ["10.0.0.2"], "db": ["10.0.0.3"]}),
        "name": lambda: (fabric.add_name(tenant, "one", ["10.0.0.9"]), fabric.remove_name(tenant, "one")),
        "read": lambda: (fabric.installed(tenant), fabric.traffic(tenant, [instance.port])),
        "sweep": lambda: fabric.sweep_tenant(tenant, [network], [instance.port]),
        "remove": remove,
        "host": fabric.host_drift,
    }


@isolated
def test_calls_of_many_threads_against_teardown_leave_nothing_and_are_refused_afterwards() -> None:
    run = Path("/run/insula")
    host_up()
    before = snapshot(run)
    for round_ in range(ROUNDS):
        cloud = Lab(run=run)
        tenant = cloud.tenant("acme")
        cloud.network("acme", subnet6="fd00::/64")
        instance = cloud.instance("acme", "web")
        all_works = works(cloud)
        hammer = Hammer(all_works, 2)
        try:
            # in odd rounds the teardown comes at once, when no thread has done much
            if round_ % 2 == 0:
                hammer.wait_until_all_have_succeeded()
            cloud.fabric.teardown()
            assert list(run.iterdir()) == []
        finally:
            hammer.end()
        assert list(hammer.refused) == ["networks are being taken down on this host"]
        for name, work in all_works.items():
            with pytest.raises(Unavailable) as refused:
                work()
            assert "taken down" in refused.value.message and refused.value.hint, name
        instance.remove()
        assert snapshot(run) == before, f"round {round_}"
    cloud.fabric.open()  # the control: it is the teardown that they were refused for
    cloud.fabric.ensure_tenant(tenant)
    assert cloud.fabric.installed(tenant).drift == []
    cloud.fabric.teardown()
    assert snapshot(run) == before


@isolated
def test_a_closed_fabric_leaves_what_it_made_and_the_next_one_takes_it_over() -> None:
    cloud = Lab()
    tenant = cloud.tenant("acme")
    network = cloud.network("acme", subnet6="fd00::/64")
    instance = cloud.instance("acme", "web")
    some = {name: work for name, work in works(cloud).items() if name not in ("remove", "detach")}
    hammer = Hammer(some, 2)
    try:
        hammer.wait_until_all_have_succeeded()
        cloud.fabric.close()
    finally:
        hammer.end()
    cloud.fabric = LinuxFabric(cloud.run, "lab", resolvers=())
    cloud.fabric.open()
    cloud.fabric.ensure_tenant(tenant)
    cloud.fabric.ensure_network(tenant, network)
    cloud.attach(instance)
    assert cloud.fabric.installed(tenant).drift == [] and instance.pings("10.0.0.1")


@isolated
def test_one_thread_a_tenant_uses_its_handles_and_none_that_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shown by the handles themselves: each call tells when it begins and ends to use them."""
    cloud = Lab()
    for name in ("acme", "globex"):
        cloud.tenant(name)
        cloud.network(name, subnet6="fd00::/64")
    inside: Counter[str] = Counter()
    most: Counter[str] = Counter()
    met = threading.Event()  # two tenants at once
    real = TenantNamespace.ensure_network

    def ensure_network(self: TenantNamespace, *args: object) -> None:
        name = self.tenant.name
        inside[name] += 1
        most[name] = max(most[name], inside[name])
        if len(+inside) == 2:
            met.set()
        assert self.netns >= 0, "a handle that is closed"
        met.wait(5)
        real(self, *args)  # type: ignore[arg-type]
        inside[name] -= 1

    monkeypatch.setattr(TenantNamespace, "ensure_network", ensure_network)
    calls = {
        name: (lambda name=name: cloud.fabric.ensure_network(cloud.tenants[name], cloud.networks[name, "net"]))
        for name in cloud.tenants
    }
    hammer = Hammer(calls, 4)
    try:
        hammer.wait_until_all_have_succeeded(8)
    finally:
        hammer.end()
    assert met.is_set(), "tenants don't wait for each other"
    assert most == {"acme": 1, "globex": 1}
    with contextlib.suppress(Unavailable):
        cloud.fabric.teardown()
