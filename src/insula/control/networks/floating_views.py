"""What a floating address leads to."""

from __future__ import annotations

from collections.abc import Sequence

from insula.model.floating_ips import FloatingIp, FloatingIpView
from insula.model.objects import Instance, Port


def view_of(floating: FloatingIp, instances: Sequence[Instance]) -> FloatingIpView:
    """A floating address with what it leads to, among these instances of its tenant."""
    if floating.instance is None:
        kept = floating.kept_for
        return FloatingIpView(
            floating_ip=floating, reason=f"instance {kept} was to be replaced: apply it again" if kept else None
        )
    instance = next((each for each in instances if each.id == floating.instance), None)
    if instance is None:
        return FloatingIpView(floating_ip=floating, reason="its instance is gone")
    port = port_on(instance, floating.network)
    target = target_of(port, floating.address) if port else None
    reason = None
    if port is None:
        where = f"network {floating.network}" if floating.network else "any network"
        reason = f"instance {instance.name} is not on {where}"
    elif target is None:
        reason = f"network {port.network} has no IPv6"
    return FloatingIpView(floating_ip=floating, instance=instance.name, target=target, reason=reason)


def port_on(instance: Instance, network: str | None) -> Port | None:
    """The instance's port on a network; None is its first one."""
    if network is None:
        return instance.port
    return next((port for port in instance.plugged if port.network == network), None)


def target_of(port: Port, address: str) -> str | None:
    """The port's address of the same IP version."""
    return port.address6 if ":" in address else port.address
