"""What `insula doctor` and `insula explain` say of virtual machines, and of the hypervisors that can be used."""

from __future__ import annotations

from insula.control.instances.drivers.machine.request import installation
from insula.control.instances.drivers.xen import checks as xen
from insula.machine.installation import check
from insula.machine.libvirt.xen import domain_of_this_host
from insula.machine.qemu.accelerator import Accelerator
from insula.machine.registry import open_hypervisor
from insula.model.errors import InsulaError, Unavailable
from insula.model.machine_settings import MachineSettings
from insula.model.units import format_size
from insula.model.views import Check
from insula.settings import Settings

_NAME = "virtual machines"
_BOUNDARY = "what keeps a guest in is the container around QEMU"
_HINT = "set machines.hypervisor in insulad.toml to have another one tried"


def examine(settings: Settings) -> Check:
    """Check that there is what virtual machines need, and say how their processors are made. Nothing is tried here."""
    if settings.machines.hypervisor.startswith("xen:"):
        return xen.examine(_NAME)
    try:
        kernel = check()
        found, sizes = installation(settings).known()
    except Unavailable as error:
        lost = "`insula run --vm` is refused"
        return Check(name=_NAME, state="degraded", detail=error.message, consequence=lost, hint=error.hint)
    how = processors(found) if found else "whether KVM works is tried before the first one is started"
    ready = ", ".join(format_size(each.memory << 20) for each in sizes if each.cpus == 1)
    templates = f"templates of {ready}" if ready else "no template yet, for which the first start of a size waits"
    return Check(name=_NAME, state="ok", detail=f"{how}; {templates}; {kernel.name}")


def processors(accelerator: Accelerator) -> str:
    """How processors of machines are made, why, and what that means."""
    if accelerator.name == "kvm":
        return f"KVM makes their processors: {accelerator.reason}"
    return f"QEMU emulates their processors (TCG), and {_BOUNDARY}: {accelerator.reason}"


def examine_hypervisors(settings: MachineSettings) -> Check:
    """Try the hypervisor of the settings, and say why others are not used."""
    name, others = "hypervisor", _not_tried(settings.hypervisor)
    if settings.hypervisor == "qemu":
        return Check(name=name, state="ok", detail=f"qemu; {others}")
    hypervisor = open_hypervisor(settings.hypervisor, settings.password_file)
    runs = settings.hypervisor.startswith("xen:")
    lost = "`insula run --vm` fails" if runs else "`insula run --vm` is refused: it makes no guests of ESXi"
    try:
        detail = f"{settings.hypervisor}: {hypervisor.check()}; {others}"
        if runs:
            return Check(name=name, state="ok", detail=detail)
        return Check(name=name, state="degraded", detail=detail, consequence=lost, hint=_HINT)
    except InsulaError as error:
        return Check(name=name, state="degraded", detail=error.message, consequence=lost, hint=error.hint or _HINT)
    finally:
        hypervisor.close()


def refusal(settings: MachineSettings) -> Unavailable | None:
    """Why no machine can be made with QEMU; None if the settings allow it."""
    if settings.hypervisor == "qemu":
        return None
    what = f"such machines are made with qemu only, and this host is set to {settings.hypervisor}"
    return Unavailable(what, "set machines.hypervisor in insulad.toml to qemu, or leave out --vm")


def _not_tried(tried: str) -> str:
    """What there is to say of the hypervisors that the settings don't name."""
    found = [] if tried.startswith("xen:") else [f"xen: {domain_of_this_host()}, not tried"]
    return "; ".join(found if tried.startswith("esx:") else [*found, "esx: no host is set"])
