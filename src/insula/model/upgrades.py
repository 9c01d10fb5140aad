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


def instance(value: dict[str, Any]) -> dict[str, Any]:
    """Convert an `Instance`. 0.1.0 had one port, one kind, one host, and counted starts only.

    The host of its instances is "", the one that the store belongs to.
    """
    if "host" in value:
        return value
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
    return {**rest, "mounts": mounts, "options": {"kind": "container", **options}}


def status(value: dict[str, Any]) -> dict[str, Any]:
    """Convert an `InstanceStatus`. In 0.1.0 the field `generation` was the start that it belongs to."""
    if "generation" not in value:
        return value
    starts = value["generation"]
    rest = {name: each for name, each in value.items() if name != "generation"}
    return {**rest, "starts": starts, "observed_generation": max(1, starts)}
