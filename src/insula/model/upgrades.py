"""Convert stored objects of earlier versions to the current form. Pure functions from builtins to builtins.

An object in the current form is returned unchanged.
"""

from __future__ import annotations

from typing import Any

_OF_CONTAINERS = (
    "init",
    "shm_size",
    "group_add",
    "rlimits",
    "cap_add",
    "cap_drop",
    "sysctls",
    "pid_of",
    "nesting",
    "socket_families",
    "aio",
)

_OF_NETWORK = {"network": "network", "address": "address", "address6": "address6", "mac_address": "mac"}
_OF_TRAFFIC = ("received", "received_packets", "sent", "sent_packets")


def instance(value: dict[str, Any]) -> dict[str, Any]:
    """Convert an `Instance`. 0.1.0 had one port, one kind, one host, and counted starts only.

    The host of its instances is "", the one that the store belongs to. Later ones had `ports`, with one at most.
    """
    if "host" in value:
        return {**value, "spec": networks(value["spec"])}
    value = {**value, "host": "", "spec": spec(value["spec"])}
    port, layers = value.pop("port"), value.pop("layers")
    starts = value.pop("generation", 0)
    return {
        **value,
        "ports": [port] if port else [],
        "root": {"type": "overlay", "layers": layers},
        "starts": starts,
        "generation": max(1, starts),
    }


def spec(value: dict[str, Any]) -> dict[str, Any]:
    """Convert an `InstanceSpec`. In 0.1.0 it had all options of containers as its own fields."""
    options = {name: value[name] for name in _OF_CONTAINERS if name in value}
    rest = {name: each for name, each in value.items() if name not in (*_OF_CONTAINERS, "tmpfs")}
    mounts = [{"type": "tmpfs", **mount} for mount in value.get("tmpfs", [])]
    return {**networks(rest), "mounts": mounts, "options": {"kind": "container", **options}}


def networks(value: dict[str, Any]) -> dict[str, Any]:
    """Convert the networks of an `InstanceSpec`, or of a part of one. Before there were several, it had one network
    (null for none), and fields of its own for the addresses there."""
    if "networks" in value or value.keys().isdisjoint(_OF_NETWORK):
        return value
    rest = {name: each for name, each in value.items() if name not in _OF_NETWORK}
    if (network := value.get("network", "default")) is None:
        return {**rest, "networks": []}
    addresses = {new: value[old] for old, new in _OF_NETWORK.items() if value.get(old) is not None}
    return {**rest, "networks": [{**addresses, "network": network}]}


def account(value: dict[str, Any]) -> dict[str, Any]:
    """Convert an `Account`. Before an instance could have several ports, its four meters of traffic were here."""
    meters = {name: value[name] for name in _OF_TRAFFIC if name in value}
    if not meters:
        return value
    rest = {name: each for name, each in value.items() if name not in meters}
    return {**rest, "ports": {"eth0": meters}}


def status(value: dict[str, Any]) -> dict[str, Any]:
    """Convert an `InstanceStatus`. In 0.1.0 the field `generation` was the start that it belongs to."""
    if "generation" not in value:
        return value
    starts = value["generation"]
    rest = {name: each for name, each in value.items() if name != "generation"}
    return {**rest, "starts": starts, "observed_generation": max(1, starts)}
