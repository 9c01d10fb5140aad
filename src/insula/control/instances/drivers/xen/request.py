"""`XenRequests`: the container of a guest's shim, and the plan with which the shim serves it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from insula.container.service.client import Launch
from insula.control.instances.drivers.container import spec
from insula.control.instances.drivers.machine import jail, network
from insula.control.instances.drivers.machine.request import MachineRequests, for_agent, plan_descriptor
from insula.model.objects import Instance, Network, Tenant


class XenRequests(MachineRequests):
    """Makes requests to the runtime, as `MachineRequests` does for machines with QEMU."""

    def of_shim(self, tenant: Tenant, program: Launch, base: Path) -> Launch:
        """The request for the container, in place of that for the program. Its limits are the shim's: the guest has the
        memory and the processors of the hypervisor."""
        return jail.launch(tenant, program, base, spec.resources(jail.of_shim()))

    def served(
        self,
        instance: Instance,
        networks: Sequence[Network],
        program: dict[str, Any],
        channel: int,
        generation: str,
    ) -> int:
        """A descriptor of the plan (`insula.machine.shim.kept`). `channel` is the number of that of the console."""
        ports = instance.plugged
        plan = {
            "channel": channel,
            "inserted": [],
            "network": network.plan(ports, networks, [port.mac for port in ports]),
            **for_agent(instance, networks, program, generation),
        }
        return plan_descriptor(plan)
