"""A laboratory for policies: instances with labels, short forms of policies, and connections that stay open."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from insula.model.policies import (
    AddressGroup,
    AnyPeer,
    CidrPeer,
    Direction,
    GroupPeer,
    InstancePeer,
    OperatorPolicy,
    Policy,
    PolicyPeer,
    PolicyRule,
    PortMatch,
    Selector,
)
from insula.network.intent import PolicyIntent
from tests.support.lab import SOON, Instance, Lab, two_tenants

SHORT = 0.3
"""How long is waited for what should not come."""


def policy(
    name: str,
    select: dict[str, str],
    *rules: str,
    directions: tuple[Direction, ...] = ("in",),
    audit: bool = False,
    dns: bool = True,
) -> Policy:
    """A policy with rules as in "in app=web tcp/80,udp/53-60", or "out 10.0.0.0/8"."""
    return Policy(
        tenant="acme",
        name=name,
        select=Selector(labels=select),
        directions=list(directions),
        rules=[_rule(each) for each in rules],
        audit=audit,
        dns=dns,
        created=0,
    )


def _rule(text: str) -> PolicyRule:
    direction, peer, *ports = text.split()
    assert direction in ("in", "out")
    matches = [_ports(each) for each in ports[0].split(",")] if ports else []
    return PolicyRule(direction=direction, peers=[_peer(peer)], ports=matches)  # type: ignore[arg-type]


def _peer(text: str) -> PolicyPeer:
    if text == "any":
        return AnyPeer()
    if text.startswith("network:"):
        return InstancePeer(network=text.removeprefix("network:"))
    if text.startswith("group:"):
        return GroupPeer(group=text.removeprefix("group:"))
    if "=" in text:
        return InstancePeer(select=Selector(labels=dict([text.split("=")])))
    return CidrPeer(cidr=text)


def _ports(text: str) -> PortMatch:
    protocol, _, ports = text.partition("/")
    if protocol.startswith("icmp"):
        return PortMatch(protocol=protocol, icmp_type=int(ports) if ports else None)  # type: ignore[arg-type]
    first, _, last = ports.partition("-")
    return PortMatch(
        protocol=protocol,  # type: ignore[arg-type]
        port=int(first) if first else None,
        end_port=int(last) if last else None,
    )


class PolicyLab:
    """A lab whose tenant acme has policies. Instances have their names as the label "app"."""

    def __init__(self, cloud: Lab) -> None:
        self.cloud = cloud
        self.policies: dict[str, Policy] = {}
        self.groups: dict[str, AddressGroup] = {}
        self.labels: dict[str, dict[str, str]] = {}
        self.operator: list[OperatorPolicy] = []
        for tenant, name in cloud.instances:
            if tenant == "acme":
                self.labels[name] = {"app": name}
        self.enforce()

    def intent(self) -> PolicyIntent:
        """The policies of now."""
        return PolicyIntent(
            policies=[*self.policies.values()],
            groups=[*self.groups.values()],
            labels=self.labels,
            operator=self.operator,
        )

    def enforce(self, *policies: Policy) -> None:
        """Add or replace policies, and have all of them enforced."""
        self.policies |= {each.name: each for each in policies}
        self.cloud.others["acme"] = {"policy": self.intent()}
        self.cloud.fabric.enforce(self.cloud.tenants["acme"], self.intent())

    def remove(self, *names: str) -> None:
        for name in names:
            del self.policies[name]
        self.enforce()

    def instance(self, name: str, network: str = "net", labels: dict[str, str] | None = None, **other: Any) -> Instance:
        """An instance more, with its labels from its start on."""
        self.labels[name] = {"app": name} if labels is None else labels
        made = self.cloud.instance("acme", name, network, labels=self.labels[name], **other)
        self.cloud.others["acme"] = {"policy": self.intent()}
        self.cloud.apply("acme")
        return made

    def __getitem__(self, name: str) -> Instance:
        return self.cloud.instances["acme", name]


@contextmanager
def policy_lab(**other: Any) -> Iterator[PolicyLab]:
    """acme with web and db, and globex with the same addresses."""
    with two_tenants(**other) as cloud:
        yield PolicyLab(cloud)


def address(instance: Instance, family: int) -> str:
    """The address of an instance, of an address family."""
    found = instance.port.address if family == socket.AF_INET else instance.port.address6
    assert found
    return found


def reaches(one: Instance, other: Instance, family: int, port: int, kind: int = socket.SOCK_STREAM) -> bool:
    """Whether a connection, or a datagram, of `one` arrives at a port of `other`, and an answer comes back."""
    with other.socket(family, kind) as server, one.socket(family, kind) as client:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((address(other, family), port))
        if kind == socket.SOCK_STREAM:
            server.listen()
        client.settimeout(SHORT)
        server.settimeout(SHORT)
        try:
            client.connect((address(other, family), port))
            client.send(b"x")
            if kind == socket.SOCK_STREAM:
                client.settimeout(SOON)
                peer, _ = server.accept()
                with peer:
                    peer.settimeout(SOON)
                    peer.sendall(peer.recv(1))
            else:
                data, where = server.recvfrom(10)
                server.sendto(data, where)
                client.settimeout(SOON)
            return client.recv(10) == b"x"
        except OSError:
            return False


@contextmanager
def connected(one: Instance, other: Instance, family: int, port: int) -> Iterator[tuple[socket.socket, socket.socket]]:
    """The two ends of a TCP connection that `one` has opened."""
    with other.socket(family, socket.SOCK_STREAM) as server, one.socket(family, socket.SOCK_STREAM) as client:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((address(other, family), port))
        server.listen()
        client.settimeout(SOON)
        client.connect((address(other, family), port))
        peer, _ = server.accept()
        with peer:
            peer.settimeout(SOON)
            yield client, peer


def passes(sender: socket.socket, receiver: socket.socket, timeout: float = SHORT) -> bool:
    """Whether data arrives."""
    with contextlib.suppress(OSError):
        sender.sendall(b"x")
        receiver.settimeout(timeout)
        return receiver.recv(1) == b"x"
    return False
