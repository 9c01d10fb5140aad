"""Policies that change while connections are open: forbidden ones end, and no other loses a byte."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import socket
import time
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.support.lab import Instance, isolated
from tests.support.wait import patiently
from tests.system.fabric.building import built
from tests.system.fabric.packets import Flow, Place, flows
from tests.system.fabric.reference import expected
from tests.system.fabric.worlds import World, owned, tenants

PORT = 443
_ENOUGH = patiently(5.0)
_GRACE = 0.15


class Connection(NamedTuple):
    """The two ends of an open TCP connection."""

    client: socket.socket
    server: socket.socket


def _listening(address: str) -> socket.socket:
    server = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind((address, PORT))
    server.listen(64)
    return server


def _calling(address: str) -> socket.socket:
    client = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    client.bind((address, 0))
    client.settimeout(_ENOUGH)
    return client


@contextlib.contextmanager
def opened(
    instances: Mapping[Place, Instance], allowed: set[Flow], at: Mapping[Flow, Place]
) -> Iterator[dict[Flow, Connection]]:
    """A TCP connection for each of these flows."""
    with contextlib.ExitStack() as stack:
        servers = {}
        for flow in allowed:
            key = at[flow], flow.to_address
            if key not in servers:
                listening = functools.partial(_listening, flow.to_address)
                servers[key] = stack.enter_context(instances[at[flow]].do(listening))
        found = {}
        for flow in allowed:
            client = stack.enter_context(instances[flow.source].do(functools.partial(_calling, flow.from_address)))
            client.connect((flow.to_address, PORT))
            server = stack.enter_context(servers[at[flow], flow.to_address].accept()[0])
            found[flow] = Connection(client, server)
        yield found


def arriving(ends: Mapping[Flow, tuple[socket.socket, socket.socket]], expected: set[Flow]) -> set[Flow]:
    """Send a byte on every connection, from the first end to the second, and return on which of them it arrived. Those
    that are expected are waited for, the others for a moment."""
    for sender, _ in ends.values():
        with contextlib.suppress(OSError):
            sender.send(b"x")
    arrived = {flow for flow in ends if flow in expected and _received(ends[flow][1], _ENOUGH)}
    end = time.monotonic() + _GRACE
    others = [flow for flow in ends if flow not in expected]
    return arrived | {flow for flow in others if _received(ends[flow][1], max(0.0, end - time.monotonic()))}


def _received(sock: socket.socket, timeout: float) -> bool:
    sock.settimeout(timeout)
    try:
        return sock.recv(1) == b"x"
    except OSError:
        return False


def check(before: World, after: World, answers_first: bool) -> None:
    """Open every connection of one world, make the other of it, and send in both directions."""
    with built(before) as cloud:
        tried = list(flows(owned(before), {"tcp": [PORT]}))
        at = {arrival.flow: arrival.at for arrival in expected(before, tried)}
        with opened(cloud.instances, set(at), at) as connections:
            cloud.change(after)
            still = {arrival.flow for arrival in expected(after, tried)} & set(connections)
            for answers in (answers_first, not answers_first):
                ends = {
                    flow: (c.server, c.client) if answers else (c.client, c.server) for flow, c in connections.items()
                }
                arrived = arriving(ends, still)
                assert arrived - still == set(), f"from the {'server' if answers else 'client'}, and may not"
                assert still - arrived == set(), f"from the {'server' if answers else 'client'}, and may"


@st.composite
def two_worlds(draw: st.DrawFn) -> tuple[World, World]:
    """Two worlds that differ in policies, labels and routers only."""
    one, other = draw(tenants("acme")), draw(tenants("acme"))
    names = list(one.instances)
    labels = [each.labels for each in other.instances.values()]
    instances = {
        name: dataclasses.replace(one.instances[name], labels=labels[number % len(labels)])
        for number, name in enumerate(names)
    }
    routers = tuple(r for each in other.routers if len(r := each & frozenset(one.networks)) > 1)
    changed = dataclasses.replace(one, instances=instances, policies=other.policies, routers=routers)
    return {"acme": one}, {"acme": changed}


@settings(
    max_examples=30,
    deadline=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
    database=None,
)
@given(two_worlds(), st.booleans())
def thirty(both: tuple[World, World], answers_first: bool) -> None:
    check(*both, answers_first)


@isolated
def test_open_connections_follow_thirty_changes() -> None:
    thirty()
