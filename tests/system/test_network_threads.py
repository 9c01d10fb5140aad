"""Concurrent calls of the fabric from threads, as after a cancelled or timed-out caller."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
import pytest

from insula.model.errors import InsulaError, Unavailable
from insula.network.fabric import NetnsNic
from insula.network.linux.fabric import LinuxFabric
from insula.network.linux.tenant import TenantNamespace
from tests.support.lab import Lab, eventually, isolated
from tests.support.wait import patiently
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
        deadline = time.monotonic() + patiently(20)
        while any(self.done[name] < times for name in self._names) and not self.errors:
            assert time.monotonic() < deadline, self.done
            time.sleep(0.005)

    def end(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(patiently(20))
        assert not any(thread.is_alive() for thread in self._threads)
        assert self.errors == []


def works(cloud: Lab) -> dict[str, Callable[[], object]]:
    """One of each kind of call about the tenant acme; `remove` takes away what the others need."""
    fabric, tenant, network = cloud.fabric, cloud.tenants["acme"], cloud.networks["acme", "net"]
    instance, whole = cloud.instances["acme", "web"], cloud.intent("acme")

    def remove() -> None:
        time.sleep(0.2)  # leave the others some time to succeed
        fabric.remove(tenant)

    return {
        "apply": lambda: fabric.apply(whole),
        "less": lambda: fabric.apply(msgspec.structs.replace(whole, ports=[], names={"db": ["10.0.0.3"]})),
        "status": lambda: fabric.status(tenant, network),
        "plug": lambda: fabric.plug(tenant, network, instance.port, NetnsNic(instance.netns)),
        "unplug": lambda: fabric.unplug(tenant, network, instance.port),
        "read": lambda: (fabric.installed(tenant), fabric.traffic(tenant, [instance.port])),
        "sweep": lambda: fabric.sweep([tenant]),
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
        eventually(lambda: snapshot(run) == before)
    cloud.fabric.open()  # the control: it is the teardown that they were refused for
    cloud.apply("acme")
    assert cloud.fabric.installed(tenant).drift == []
    cloud.fabric.teardown()
    eventually(lambda: snapshot(run) == before)


@isolated
def test_a_closed_fabric_leaves_what_it_made_and_the_next_one_takes_it_over() -> None:
    cloud = Lab()
    tenant = cloud.tenant("acme")
    cloud.network("acme", subnet6="fd00::/64")
    instance = cloud.instance("acme", "web")
    some = {name: work for name, work in works(cloud).items() if name not in ("remove", "unplug", "less")}
    hammer = Hammer(some, 2)
    try:
        hammer.wait_until_all_have_succeeded()
        cloud.fabric.close()
    finally:
        hammer.end()
    cloud.fabric = LinuxFabric(cloud.run, "lab", resolvers=())
    cloud.fabric.open()
    cloud.apply("acme")
    cloud.plug(instance)
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
    real = TenantNamespace.apply

    def apply(self: TenantNamespace, *args: object) -> object:
        name = self.tenant.name
        inside[name] += 1
        most[name] = max(most[name], inside[name])
        if len(+inside) == 2:
            met.set()
        assert self.netns >= 0, "a handle that is closed"
        met.wait(patiently(5))
        made = real(self, *args)  # type: ignore[arg-type]
        inside[name] -= 1
        return made

    monkeypatch.setattr(TenantNamespace, "apply", apply)
    calls = {name: (lambda name=name: cloud.apply(name)) for name in cloud.tenants}
    hammer = Hammer(calls, 4)
    try:
        hammer.wait_until_all_have_succeeded(8)
    finally:
        hammer.end()
    assert met.is_set(), "tenants don't wait for each other"
    assert most == {"acme": 1, "globex": 1}
    with contextlib.suppress(Unavailable):
        cloud.fabric.teardown()
