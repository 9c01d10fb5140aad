"""`connect`: gives an instance other networks, while it runs or not.

The new ports are committed with the spec, and its host plugs them in (plugging.py). A port that goes stays in the
record, as one to be "removed", until its host has unplugged it: so a daemon that is killed in between finds it again.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from insula.control.accounting.ledger import ledger_with
from insula.control.allocation.quotas import change, of_instance
from insula.control.allocation.transaction import guarded
from insula.control.instances.admission import Admission, explain_port
from insula.control.instances.checks import Known, as_it_is
from insula.control.instances.drivers.base import Driver
from insula.control.instances.specs import check_networks, cli_command
from insula.control.keys import INSTANCES, NETWORKS, TENANTS, USAGE
from insula.control.networks.ports import by_interface, port_reservations
from insula.machine.qemu.devices import MOST_NETWORKS
from insula.model.errors import Conflict, Invalid, NotFound
from insula.model.objects import Instance, MachineOptions, NetworkAttachment, Port
from insula.model.units import shorten
from insula.model.views import Usage
from insula.store.protocol import Compare, TransactionConflict
from insula.store.typed import Found

Attachments = Sequence[NetworkAttachment]


async def connect(admission: Admission, known: Known, wanted: Attachments) -> Found[Instance] | None:
    """Commit other networks of an instance, within its tenant's quota; None if it has them. Invalid, NotFound,
    Conflict, QuotaExceeded; TransactionConflict if something was changed meanwhile.

    An attachment that differs in anything has another port. The addresses of a port that goes are taken until it is
    gone.
    """
    before, context = as_it_is(known), admission.context
    tenant, name, spec = (
        before.tenant,
        before.name,
        msgspec.structs.replace(before.spec, networks=check_networks(wanted)),
    )
    if spec.networks == before.spec.networks:
        return None
    if isinstance(spec.options, MachineOptions):
        _check_machine(context.driver(before), known, len(spec.networks))
    added = [each for each in spec.networks if each not in before.spec.networks]
    networks = [await admission.networks.find(tenant, each.network) for each in added]
    owner = await admission.tenants.find(tenant)
    kept = _without(before.ports, {each.network for each in before.spec.networks if each not in spec.networks})

    async def attempt(guard: Found[Usage]) -> Found[Instance]:
        counts = of_instance(before.spec, before.config), of_instance(spec, before.config)
        usage = change(owner.value, guard.value, *counts)
        asked = [*zip((each.value for each in networks), added, strict=True)]
        made = await admission.ports.allocate(name, asked, before.ports)
        own = [each for port in made for each in port_reservations(port)]
        after = msgspec.structs.replace(
            before, spec=spec, ports=by_interface([*kept, *made]), generation=before.generation + 1
        )
        compares = [
            Compare(INSTANCES.key(tenant, name), known.revision),
            USAGE.unchanged(guard, tenant),
            TENANTS.unchanged(owner, tenant),
            *(NETWORKS.unchanged(each, tenant, each.value.name) for each in networks),
            *(reservation.absent() for reservation in own),
        ]
        writes = [
            INSTANCES.put(after, tenant, name),
            USAGE.put(usage, tenant),
            await ledger_with(context.store, tenant, usage),
            *(reservation.put() for reservation in own),
        ]
        try:
            return Found(after, await context.store.transact(compares, writes))
        except BaseException as error:
            context.allocators.release(own)
            if isinstance(error, TransactionConflict):
                if any(reservation.key == error.key for reservation in own):
                    context.allocators.invalidate(own)
                explain_port(error.key, added)
            raise

    return await guarded(context.store, tenant, attempt)


def _check_machine(driver: Driver, known: Known, networks: int) -> None:
    """Raise Invalid for too many networks of a virtual machine, Conflict if it can't get or lose one now."""
    name = known.instance.name
    if networks > MOST_NETWORKS:
        raise Invalid(f"a virtual machine is on {MOST_NETWORKS} networks at most", "leave out some")
    if known.active and "hotplug" not in driver.features:
        what = f"{name} is a guest of Xen, whose networks can't be changed while it runs"
        raise Conflict(what, "stop it before; its disk is kept")
    if known.active and known.status.state != "running":
        raise Conflict(f"{name} is {known.status.state}, and its guest does not answer", "try again when it runs")


def _without(ports: Sequence[Port], networks: set[str]) -> Sequence[Port]:
    """The ports, of which those on these networks are to be removed."""
    return [msgspec.structs.replace(port, wanted="removed") if port.network in networks else port for port in ports]


def with_network(instance: Instance, attachment: NetworkAttachment) -> Attachments:
    """The instance's networks with one more. Conflict if it is on that one."""
    if any(each.network == attachment.network for each in instance.spec.networks):
        hint = f"{cli_command(instance.tenant, f'port ls {instance.name}')} lists its ports"
        raise Conflict(f"instance {instance.name} is on network {attachment.network} already", hint)
    return [*instance.spec.networks, attachment]


def without_port(instance: Instance, which: str) -> Attachments:
    """The instance's networks without that of a port, which has this interface or is on this network. NotFound."""
    ports = instance.plugged
    found = next((port for port in ports if port.interface == which), None)
    found = found or next((port for port in ports if port.network == which), None)
    if found is None:
        hint = f"{cli_command(instance.tenant, f'port ls {instance.name}')} lists its ports"
        raise NotFound(f"instance {instance.name} has no port {shorten(which)}", hint)
    return [each for each in instance.spec.networks if each.network != found.network]
