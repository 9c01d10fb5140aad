"""Names of scopes, and limits as systemd's properties. Scopes themselves are tested in tests/modern/inside."""

from __future__ import annotations

import pytest

from insula.kernel.cgroups.systemd import Scope, properties_of
from insula.model.errors import Invalid


@pytest.mark.parametrize(
    ("path", "group"),
    [
        ("system.slice:docker:abc", "system.slice/docker-abc.scope"),
        (":podman:abc", "system.slice/podman-abc.scope"),
        ("machine.slice::abc", "machine.slice/abc.scope"),
        ("a-b-c.slice:x:y", "a.slice/a-b.slice/a-b-c.slice/x-y.scope"),
        ("-.slice:x:y", "x-y.scope"),
        ("a.slice:x:y.scope", "a.slice/y.scope"),
        (None, "system.slice/insula-oci-web.scope"),
    ],
)
def test_names(path: str | None, group: str) -> None:
    assert Scope.parse(path, "web").path == group


@pytest.mark.parametrize(
    "path",
    [
        *("/a/b", "a", "a:b", "a.slice:b:", "a:b:c", "a.slice:x:y:z"),
        *("a--b.slice:x:y", ".slice:x:y", "a.slice:x:y.slice", "a/b.slice:x:y"),
        *("a.slice:../..:y", "a.slice:x:y/z", "a.slice:x y:z", "a.slice:x:" + "y" * 300),
    ],
)
def test_invalid_names_are_refused(path: str) -> None:
    with pytest.raises(Invalid, match=r"linux\.cgroupsPath"):
        Scope.parse(path, "web")


@pytest.mark.parametrize(
    ("resources", "words"),
    [
        ({}, []),
        ({"memory": {"limit": 64, "swap": 100}}, ["MemoryMax t 64", "MemorySwapMax t 36"]),
        ({"memory": {"limit": -1, "swap": -1}}, [f"MemoryMax t {2**64 - 1}", f"MemorySwapMax t {2**64 - 1}"]),
        ({"memory": {"reservation": 5}}, ["MemoryLow t 5"]),
        ({"cpu": {"shares": 1024}}, ["CPUWeight t 100"]),
        ({"cpu": {"quota": 50_000}}, ["CPUQuotaPeriodUSec t 100000", "CPUQuotaPerSecUSec t 500000"]),
        ({"cpu": {"quota": 33_333, "period": 100_000}}, ["CPUQuotaPeriodUSec t 100000", "CPUQuotaPerSecUSec t 340000"]),
        ({"cpu": {"quota": -1}}, ["CPUQuotaPeriodUSec t 100000", f"CPUQuotaPerSecUSec t {2**64 - 1}"]),
        ({"cpu": {"cpus": "0-2,9", "mems": "0"}}, ["AllowedCPUs ay 2 7 2", "AllowedMemoryNodes ay 1 1"]),
        ({"pids": {"limit": -1}}, [f"TasksMax t {2**64 - 1}"]),
        ({"pids": {"limit": 0}, "cpu": {"shares": 0, "quota": 0}, "memory": {"limit": 0}}, []),
    ],
)
def test_limits_as_properties(resources: dict[str, dict[str, object]], words: list[str]) -> None:
    assert [f"{name} {kind} {' '.join(value)}" for name, kind, value in properties_of(resources)] == words
