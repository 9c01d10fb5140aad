"""`LibvirtKeeper`: guests of a hypervisor to which libvirt has a driver."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple
from xml.etree.ElementTree import Element

from insula.machine.hypervisor import DiskConfig, GuestConfig, GuestEvent, GuestState, Interface, KeeperFeature
from insula.machine.libvirt import elements, esx, library, xen
from insula.machine.libvirt.connection import SECONDS, LibvirtConnection
from insula.model.errors import Conflict, NotFound, Unavailable

_STATES: Final[dict[int, GuestState]] = {
    1: "running",
    2: "running",
    3: "paused",
    4: "stopping",
    5: "off",
    6: "crashed",
    7: "suspended",
}
_EVENTS: Final = ("defined", "undefined", "started", "paused", "resumed", "stopped", "stopping", "suspended", "crashed")
_LIVE = 1  # VIR_DOMAIN_AFFECT_LIVE
_CHECK = 5.0


class Dialect(NamedTuple):
    """How a hypervisor's domains are written, and what else differs."""

    domain: Callable[[GuestConfig], Element]
    device: Callable[[DiskConfig | Interface, int], Element]
    features: frozenset[KeeperFeature]


XEN: Final = Dialect(xen.domain, xen.device, frozenset(("console", "events", "devices")))
ESX: Final = Dialect(esx.domain, esx.device, frozenset())


class LibvirtKeeper:
    """The guests of the hypervisor at `uri`. Nothing is opened before the first call."""

    type: Literal[1, 2] = 1

    def __init__(
        self, uri: str, dialect: Dialect, password: Callable[[], str] | None = None, seconds: float = SECONDS
    ) -> None:
        self.name = uri
        self.features = dialect.features
        self._dialect = dialect
        self._connection = LibvirtConnection(uri, password, seconds)

    def check(self) -> str:
        found = self._connection.call(lambda _, opened: (opened.getType(), opened.getVersion()), seconds=_CHECK)
        return f"{found[0]} {_version(found[1])}, libvirt {_version(library.load().getVersion())}"

    def close(self) -> None:
        self._connection.close()

    # -- the life of a guest ---------------------------------------------------------------------------------------

    def define(self, config: GuestConfig) -> None:
        text = elements.text(self._dialect.domain(config))

        def define(_: Any, opened: Any) -> None:
            if any(each.name() == config.name for each in opened.listAllDomains()):
                raise Conflict(f"{self.name} has a guest {config.name} already", "use another name, or undefine it")
            opened.defineXML(text)

        self._connection.call(define, config.name)

    def undefine(self, name: str) -> None:
        self._change(name, ("off", "crashed"), lambda domain: domain.undefine())

    def start(self, name: str) -> None:
        self._change(name, ("off", "crashed"), lambda domain: domain.create())

    def shut_down(self, name: str) -> None:
        self._change(name, ("running",), lambda domain: domain.shutdown())

    def kill(self, name: str) -> None:
        self._about(name, lambda domain: None if _state(domain) == "off" else domain.destroy())

    def pause(self, name: str) -> None:
        self._change(name, ("running",), lambda domain: domain.suspend())

    def resume(self, name: str) -> None:
        self._change(name, ("paused",), lambda domain: domain.resume())

    def _change(self, name: str, states: Sequence[GuestState], function: Callable[[Any], object]) -> None:
        """Call `function` with the domain, if it is in one of the states: hypervisors have many errors for others."""

        def change(domain: Any) -> None:
            if (state := _state(domain)) not in states:
                raise Conflict(f"{name} is {state}", f"that is for a guest that is {states[0]}")
            function(domain)

        self._about(name, change)

    # -- what is there ---------------------------------------------------------------------------------------------

    def state(self, name: str) -> GuestState:
        found: GuestState = self._about(name, _state)
        return found

    def guests(self) -> Mapping[str, GuestState]:
        return self._connection.call(lambda _, opened: {d.name(): _state(d) for d in opened.listAllDomains()})

    def console(self, name: str) -> Path:
        if "console" not in self.features:
            raise Unavailable(f"{self.name} gives no console of its guests", "use the hypervisor's own")
        found = self._about(name, lambda domain: elements.console(domain.XMLDesc(0)))
        if found is None:
            raise Conflict(f"{name} has no console now", "start it")
        return Path(found)

    def devices(self, name: str) -> Mapping[str, str]:
        if "devices" not in self.features:
            raise Unavailable(f"the networks of {self.name} are not on this host")
        found: Mapping[str, str] = self._about(name, lambda domain: elements.ends_of_interfaces(domain.XMLDesc(0)))
        return found

    # -- devices ---------------------------------------------------------------------------------------------------

    def attach(self, name: str, device: DiskConfig | Interface) -> None:
        kind = "disk" if isinstance(device, DiskConfig) else "interface"

        def attach(domain: Any) -> None:
            there = len(elements.devices(domain.XMLDesc(0), kind))
            domain.attachDeviceFlags(elements.text(self._dialect.device(device, there)), _LIVE)

        self._about(name, attach)

    def detach(self, name: str, device: DiskConfig | Interface) -> None:
        def detach(domain: Any) -> None:
            found = elements.find(domain.XMLDesc(0), device)
            if found is None:
                what = device.path if isinstance(device, DiskConfig) else device.mac
                raise NotFound(f"{name} has no device {what}")
            domain.detachDeviceFlags(found, _LIVE)

        self._about(name, detach)

    # -- events ----------------------------------------------------------------------------------------------------

    def watch(self, on_event: Callable[[GuestEvent], None]) -> Callable[[], None]:
        if "events" not in self.features:
            raise Unavailable(f"{self.name} does not tell of changes", "look at states")

        def happened(_: Any, domain: Any, event: int, __: int, ___: Any) -> None:
            if 0 <= event < len(_EVENTS):
                on_event(GuestEvent(domain.name(), _EVENTS[event]))

        def register(lib: Any, opened: Any) -> Callable[[], None]:
            number = opened.domainEventRegisterAny(None, lib.VIR_DOMAIN_EVENT_ID_LIFECYCLE, happened, None)
            return lambda: opened.domainEventDeregisterAny(number)

        end = self._connection.call(register)
        return lambda: self._connection.call(lambda *_: end())

    def _about(self, name: str, function: Callable[[Any], Any]) -> Any:
        """Call `function` with the domain of that name."""
        return self._connection.call(lambda _, opened: function(opened.lookupByName(name)), name)


def _state(domain: Any) -> GuestState:
    return _STATES.get(domain.state()[0], "unknown")


def _version(number: int) -> str:
    return f"{number // 1_000_000}.{number // 1000 % 1000}.{number % 1000}"
