"""Ceilings of single instances, and the addresses of those with floors, in the tenant's network namespace.

A ceiling holds for all traffic of an instance, also with others of its tenant, so it is at the router's end of its
ports. What an instance sends is redirected from there to the device `rates`, an intermediate functional block with a
class for each instance. What it receives waits in a token bucket of the port. Packets a second are limited by elements
of two sets of nftables.

On the uplink, which comes after NAT, packets of all instances have the tenant's address. Those of an instance with a
floor get an address of its own (naming.py), in both directions, by which the host gives them to its class: connections
that begin after the floor was set.

The rules are in tables of their own, `PREFIX_rates`, which are there only while an instance needs them.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

from insula.kernel import netlink
from insula.kernel.netlink import Rtnl
from insula.kernel.netlink import traffic_control as tc
from insula.kernel.netlink.traffic_control import HtbClass
from insula.kernel.nftables import Nft
from insula.model.guarantees import PortRates
from insula.model.objects import Port, Tenant
from insula.network.fabric import Queue
from insula.network.linux import naming
from insula.network.linux.deletion import is_gone
from insula.network.linux.guarantees import program, tree
from insula.network.linux.naming import Naming

_JUMBO = 9_300  # bytes: the largest packet of a network, with its header; a token bucket drops what is larger than it
_FIRST = 0x10  # the number of the first class
_FAMILIES = ("bridge", "inet")
_RULES = """
table bridge {table} {{
    set sending {{ typeof iifname; limit rate over 1/second burst 1 packets; }}
    set receiving {{ typeof oifname; limit rate over 1/second burst 1 packets; }}
    chain prerouting {{
        type filter hook prerouting priority -190; policy accept;
        iifname @sending drop
    }}
    chain postrouting {{
        type filter hook postrouting priority 10; policy accept;
        oifname @receiving drop
    }}
}}
table inet {table} {{
    map addresses4 {{ type ipv4_addr : ipv4_addr; }}
    map addresses6 {{ type ipv6_addr : ipv6_addr; }}
    chain postrouting {{
        type nat hook postrouting priority 99; policy accept;
        oifname "{uplink}" snat ip to ip saddr map @addresses4
        oifname "{uplink}" snat ip6 to ip6 saddr map @addresses6
    }}
}}
"""


class Handles(Protocol):
    """Handles in the tenant's namespace, as `TenantNamespace` has them."""

    tenant: Tenant
    rtnl: Rtnl
    nft: Nft


class PortShaper:
    """The rates of one tenant's ports. It is used by one thread at a time; methods raise OSError."""

    def __init__(self, names: Naming, inside: Handles) -> None:
        self._naming = names
        self.inside = inside
        self._rtnl = inside.rtnl
        self._nft = inside.nft
        self._table = f"{names.prefix}_rates"
        self._listed: dict[str, str] = {}  # the rules as they are listed after they were installed
        self._rates: Mapping[int, PortRates] | None = None  # the last ones that were applied

    def apply(self, rates: Mapping[int, PortRates], ports: Iterable[Port]) -> None:
        """Make everything equal to `rates`, by the index of the port. `ports` are all of the tenant."""
        if not rates and self._rates is not None and not self._rates:
            return
        self._apply_rules(rates, ports)
        self._rates = rates
        self._apply_devices()

    def plugged(self, port: Port) -> None:
        """Apply the rates of a port that was just plugged."""
        if self._rates and port.index in self._rates:
            self._apply_devices()

    def queue(self, port: Port, direction: str) -> Queue | None:
        """Return the queue of a port as it is installed, for what it sends ("out") or receives; None if it has none."""
        rates, index = (self._rates or {}).get(port.index), self._rtnl.index(naming.port(port.index))
        if rates is None or index is None:
            return None
        if direction == "in":
            root = tc.qdisc(self._rtnl, index)
            name = f"{naming.port(port.index)} root"
            return Queue("port", None, root.rate, name) if root and root.kind == "tbf" else None
        device, number = self._rtnl.index(naming.RATES), tc.handle(1, _FIRST + rates.number)
        led = tc.filters(self._rtnl, index, tc.INGRESS) if tc.qdisc(self._rtnl, index, tc.CLSACT) else []
        if device is None or device not in [each.to for each in led]:
            return None
        found = tc.some_classes(self._rtnl, device, [number]).get(number)
        return Queue("port", None, found.ceiling, f"{naming.RATES} 1:{number & 0xFFFF:x}") if found else None

    # -- rules ---------------------------------------------------------------------------------------------------

    def _apply_rules(self, rates: Mapping[int, PortRates], ports: Iterable[Port]) -> None:
        text = self._text(rates, ports)
        present = {family for family, table in self._nft.tables() if table == self._table}
        known = self._listed if self._listed.get("") == text and present == {*_FAMILIES} else {}
        if known and all(self._nft.rules(family, self._table) == known[family] for family in _FAMILIES):
            return
        gone = "".join(f"delete table {family} {self._table}\n" for family in sorted(present))
        if gone or text:
            self._nft.run(gone + text)
        listed = {family: self._nft.rules(family, self._table) for family in _FAMILIES} if text else {}
        self._listed = {"": text, **listed}

    def _text(self, rates: Mapping[int, PortRates], ports: Iterable[Port]) -> str:
        """Return the rules with their elements; nothing if no port needs any."""
        elements = [*self._elements(rates, ports)]
        if not elements:
            return ""
        head = _RULES.format(table=self._table, uplink=naming.UPLINK)
        return head + "".join(f"add element {name} {{ {element} }}\n" for name, element in elements)

    def _elements(self, rates: Mapping[int, PortRates], ports: Iterable[Port]) -> Iterator[tuple[str, str]]:
        for port in sorted(ports, key=lambda each: each.index):
            if (of := rates.get(port.index)) is None:
                continue
            for set_, rate in (("sending", of.out), ("receiving", of.in_)):
                if rate.packets is not None:
                    burst = max(rate.packets // 10, 5)
                    limit = f"limit rate over {rate.packets}/second burst {burst} packets"
                    yield f"bridge {self._table} {set_}", f'"{naming.port(port.index)}" {limit}'
            if has_floor(of):
                four, six = self._naming.guaranteed_addresses(of.number)
                yield f"inet {self._table} addresses4", f"{port.address} : {four}"
                if port.address6:
                    yield f"inet {self._table} addresses6", f"{port.address6} : {six}"

    # -- devices -------------------------------------------------------------------------------------------------

    def _apply_devices(self) -> None:
        rates = self._rates or {}
        links = [link for link in self._rtnl.links() if not is_gone(link.group)]
        present = {each.index: n for each in links if (n := naming.number(each.name, "p")) is not None}
        sent = {of.number: of.out.ceiling for of in rates.values() if of.out.ceiling is not None}
        device = self._ensure_device(sent)
        for index, kind in tc.kinds(self._rtnl):
            of = rates.get(present.get(index, -1))
            if kind == "clsact" and index in present and (of is None or of.out.ceiling is None):
                self._rtnl.execute(tc.delete_clsact(index))
            if kind == "tbf" and index in present and (of is None or of.in_.ceiling is None):
                self._rtnl.execute(tc.delete_root(index))
        for index, port in present.items():
            if (of := rates.get(port)) is not None:
                with _unless_gone():
                    self._apply_port(index, of, device)

    def _ensure_device(self, sent: Mapping[int, int]) -> int | None:
        """Make the device with a class for each number in `sent`; delete it if there is none."""
        index = self._rtnl.index(naming.RATES)
        if not sent:
            if index is not None:  # filters that lead to it are deleted first, or packets would be lost
                for each, kind in tc.kinds(self._rtnl):
                    if kind == "clsact":
                        self._rtnl.execute(tc.delete_clsact(each))
                self._rtnl.execute(netlink.delete_link(index=index))
            return None
        if index is None:
            self._rtnl.execute(netlink.ifb(naming.RATES))
            index = self._rtnl.index(naming.RATES)
            assert index is not None
        root = tc.qdisc(self._rtnl, index)
        if root is None or root.kind != "htb":
            self._rtnl.execute(tc.delete_root(index), tc.add_htb(index))
        wanted = {each.number: each for each in (_class(number, ceiling) for number, ceiling in sent.items())}
        have = tc.classes(self._rtnl, index)
        for one in tree.changed(wanted, have):
            self._rtnl.execute(tc.set_class(index, one), tc.set_bfifo(index, one.number, tree.queue(one.ceiling)))
        self._rtnl.execute(*(tc.delete_class(index, number) for number in have if number not in wanted))
        return index

    def _apply_port(self, index: int, of: PortRates, device: int | None) -> None:
        if of.out.ceiling is not None and device is not None:
            code = program.classifier(tc.handle(1, _FIRST + of.number), {}, source=True)
            wanted = (program.name(code), device)
            have = tc.filters(self._rtnl, index, tc.INGRESS) if tc.qdisc(self._rtnl, index, tc.CLSACT) else []
            if [(each.name, each.to) for each in have] != [wanted]:
                with program.LoadedProgram(code) as descriptor:
                    filter_ = tc.set_bpf_filter(index, tc.INGRESS, descriptor, wanted[0], device)
                    self._rtnl.execute(tc.add_clsact(index), filter_)
        if of.in_.ceiling is not None:
            root, limit = tc.qdisc(self._rtnl, index), tree.queue(of.in_.ceiling)
            if root is None or (root.kind, root.rate // 8, root.limit) != ("tbf", of.in_.ceiling // 8, limit):
                burst = max(tree.burst(of.in_.ceiling), _JUMBO)
                self._rtnl.execute(tc.set_tbf(index, of.in_.ceiling, burst, limit))


@contextlib.contextmanager
def _unless_gone() -> Iterator[None]:
    """Ignore that a device is deleted meanwhile, as its instance has ended."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENODEV:
            raise


def has_floor(rates: PortRates) -> bool:
    """Return whether an instance has a floor in either direction."""
    return rates.out.floor is not None or rates.in_.floor is not None


def _class(number: int, ceiling: int) -> HtbClass:
    return tree.htb_class(tc.handle(1, _FIRST + number), tc.handle(1), ceiling, ceiling, ceiling)
