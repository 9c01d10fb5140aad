"""Objects that 0.1.0 stored are read; unknown fields of later versions are ignored."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from insula.control.keys import ACCOUNTS, EVENTS, IMAGES, INSTANCES, NETWORKS, STATUS, TENANTS, USAGE
from insula.model import upgrades
from insula.model.errors import Failed
from insula.model.objects import ContainerOptions, InstanceSpec, NetworkAttachment, OverlayRoot, Rlimit, TmpfsMount
from insula.store.protocol import Entry
from insula.store.typed import Keyspace, known_fields

STORED: dict[str, Any] = json.loads((Path(__file__).parent / "stored_by_0_1_0.json").read_text())
KINDS: list[Keyspace[Any]] = [TENANTS, USAGE, NETWORKS, IMAGES, INSTANCES, STATUS, EVENTS]


def entry(key: str, value: Any) -> Entry:
    return Entry(key, json.dumps(value).encode(), 1, 1)


def decode(key: str, value: Any = None) -> Any:
    [kind] = [kind for kind in KINDS if key.startswith(f"{kind.root}/")]
    return kind.decode(entry(key, STORED[key] if value is None else value))


def test_everything_that_0_1_0_stored_is_read() -> None:
    for key in STORED:
        decode(key)


def test_an_instance_of_0_1_0() -> None:
    web = decode("/instances/acme/web")
    assert (web.host, web.starts, web.generation, web.wanted) == ("", 3, 3, "running")
    assert web.root == OverlayRoot(layers=["sha256:1", "sha256:2"])
    assert [port.address for port in web.ports] == ["10.77.0.2"] and web.port == web.ports[0]
    assert (web.port.interface, web.port.wanted, web.port.allowed_pairs) == ("eth0", "plugged", [])
    assert web.spec.networks == [NetworkAttachment(network="default")]
    assert web.spec.mounts == [TmpfsMount(path="/t", executable=True)]
    assert web.spec.kind == "container"
    assert web.spec.options == ContainerOptions(
        init=True,
        shm_size=1 << 20,
        group_add=["5"],
        rlimits=[Rlimit(name="nofile", soft=1, hard=2)],
        cap_add=["SYS_ADMIN"],
        cap_drop=["CHOWN"],
        sysctls={"net.a": "1"},
        pid_of="db",
        nesting=True,
        socket_families=["packet"],
        aio=True,
    )
    assert (web.spec.command, web.spec.env, web.spec.resources.cpus) == (["sleep", "9"], {"A": "b"}, 0.5)
    db = decode("/instances/acme/db")
    assert (db.starts, db.generation, db.ports, db.port, db.spec.networks) == (0, 1, [], None, [])


def test_an_instance_with_one_network() -> None:
    """As it was stored after 0.1.0, before an instance could have several ports."""
    now = msgspec.to_builtins(decode("/instances/acme/web"))
    for was, becomes in (
        ({"network": "a"}, [NetworkAttachment(network="a")]),
        ({"network": None, "address": None}, []),
        (
            {"network": "a", "address": "10.0.0.9", "address6": "fd00::9", "mac_address": "02:42:ac:11:00:02"},
            [NetworkAttachment(network="a", address="10.0.0.9", address6="fd00::9", mac="02:42:ac:11:00:02")],
        ),
    ):
        spec = {name: value for name, value in now["spec"].items() if name != "networks"} | was
        port = {
            name: now["ports"][0][name]
            for name in ("tenant", "network", "instance", "index", "mac", "address", "address6")
        }
        found = decode("/instances/acme/web", {**now, "spec": spec, "ports": [port]})
        assert found.spec.networks == becomes
        assert found.ports == decode("/instances/acme/web").ports
        assert upgrades.networks(upgrades.networks(spec)) == upgrades.networks(spec)


def test_an_account_with_one_port() -> None:
    meter = {"incarnation": "x", "raw": 5, "total": 7}
    found = ACCOUNTS.decode(entry("/accounting/instances/acme/1", {"cpu": meter, "received": meter, "sent": meter}))
    assert found.cpu.total == 7
    assert {name: (each.received.total, each.sent.total) for name, each in found.ports.items()} == {"eth0": (7, 7)}
    assert found.ports["eth0"].sent_packets.total == 0
    assert ACCOUNTS.decode(entry("/accounting/instances/acme/1", msgspec.to_builtins(found))) == found


def test_a_status_of_0_1_0() -> None:
    running, ended = decode("/status/acme/web"), decode("/status/acme/db")
    assert (running.state, running.starts, running.observed_generation, running.pid) == ("running", 3, 3, 42)
    assert (ended.state, ended.starts, ended.exit.exit_status, ended.exit.oom) == ("exited", 1, 137, True)


@pytest.mark.parametrize("key", STORED)
def test_migrated_objects_stay_as_they_are(key: str) -> None:
    found = msgspec.to_builtins(decode(key))
    assert msgspec.to_builtins(decode(key, found)) == found
    for upgrade in (upgrades.instance, upgrades.status, upgrades.account):
        if key.startswith(f"/{upgrade.__name__}"):
            assert upgrade(found) == found


@pytest.mark.parametrize("key", STORED)
def test_fields_of_a_later_version_are_left_out(key: str) -> None:
    now = msgspec.to_builtins(decode(key))
    assert msgspec.to_builtins(decode(key, {**now, "later": {"x": [1]}})) == now
    if key == "/instances/acme/web":
        deeper = json.loads(json.dumps(now))
        for part in (deeper["spec"], deeper["spec"]["options"], deeper["spec"]["mounts"][0], deeper["ports"][0]):
            part["later"] = 1
        assert msgspec.to_builtins(decode(key, deeper)) == now


@pytest.mark.parametrize(
    "change",
    [
        {"ports": 7},
        {"spec": None},
        {"spec": {"image": 7}},
        {"wanted": "flying"},
        {"root": {"type": "unknown", "layers": []}},
        {"generation": "one"},
    ],
)
def test_damaged_objects_are_reported(change: dict[str, Any]) -> None:
    now = msgspec.to_builtins(decode("/instances/acme/web"))
    with pytest.raises(Failed, match="damaged"):
        decode("/instances/acme/web", {**now, **change})
    with pytest.raises(Failed, match="damaged"):
        decode("/instances/acme/web", [])


def test_requests_are_read_strictly() -> None:
    with pytest.raises(msgspec.ValidationError, match="unknown field"):
        msgspec.json.decode(b'{"image": "x", "later": 1}', type=InstanceSpec)
    with pytest.raises(msgspec.ValidationError, match="unknown field"):
        msgspec.json.decode(b'{"image": "x", "options": {"kind": "container", "later": 1}}', type=InstanceSpec)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
)


@given(json_values, st.sampled_from(sorted(STORED)))
def test_any_value_is_read_or_damaged(value: Any, key: str) -> None:
    with contextlib.suppress(Failed):
        decode(key, {"x": value} if value is None else value)
    known_fields(value, InstanceSpec)
