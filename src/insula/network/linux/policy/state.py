"""`InstalledPolicy`: the policies that are installed for one tenant, and the changes of them.

A whole intent is compared with what the kernel has. Between two of these, changes are made by what was installed last:
reading a thousand elements takes longer than changing one. If the kernel has something else by then, it refuses the
transaction, and everything is read again.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, NamedTuple

import msgspec

from insula.kernel.netlink import NetlinkError, Request
from insula.kernel.netlink.maps import KeyInterval
from insula.kernel.netlink.nftables import NftablesSocket
from insula.model.errors import Failed
from insula.model.objects import Network, Port
from insula.network.fabric import CountedFlow
from insula.network.intent import PolicyIntent, TenantIntent
from insula.network.linux.epoch import Epoch
from insula.network.linux.policy import audit, elements
from insula.network.linux.policy.compiler import Compiled, Compiler, member_of, members_of
from insula.network.linux.policy.elements import SetContents
from insula.network.linux.policy.operator import compile_operator
from insula.network.linux.policy.population import PolicyMember

_PERMITTING: Final = (
    "subjects", "peers", "ports", "protocols", "everything", "port_ranges", "pairs_", "to_all_", elements.GUARDED,
)  # fmt: skip
"""Sets to which elements can be added without that a connection becomes forbidden, by the beginning of their names."""


class PolicyChange(NamedTuple):
    """Requests that change the installed policies. `restricts`: open connections may be forbidden afterwards."""

    requests: Sequence[Request]
    restricts: bool
    contents: SetContents
    instead: SetContents | None = None
    """The elements that `contents` replaces; None if it has whole sets."""


_ADDRESSES: Final = ("subjects4", "subjects6", "peers4", "peers6")
NO_CHANGE: Final = PolicyChange((), restricts=False, contents={})


class InstalledPolicy:
    """The policies of one tenant, used by one thread at a time."""

    def __init__(self, nftables: NftablesSocket, table: str, epoch: Epoch) -> None:
        self._nftables = nftables
        self._table = table
        self._epoch = epoch
        self._intent: PolicyIntent | None = None
        self._networks: Sequence[Network] = ()
        self._members: dict[tuple[str, str], PolicyMember] = {}
        self._compiler: Compiler | None = None
        self._last: Compiled | None = None
        self._installed: SetContents | None = None

    @property
    def intent(self) -> PolicyIntent | None:
        """The intent that was installed last; None if nothing was since insulad started."""
        return self._intent

    # -- changes -------------------------------------------------------------------------------------------------

    def whole(self, intent: TenantIntent, plugged: Iterable[Port]) -> PolicyChange:
        """Return the change from what the kernel has to the intent, of whose ports some are plugged. If it is
        incomplete, addresses stay that it doesn't have."""
        have = elements.read(self._nftables, self._table)
        self._intent, self._networks = intent.policy, intent.networks
        self._members = {_key(member): member for member in members_of(plugged, intent.remotes)}
        wanted = self._compiled()
        if not intent.complete:
            for name in _ADDRESSES:
                numbers = {*wanted[name].values()}
                stay = {key: number for key, number in have[name].items() if number in numbers}
                wanted[name] = stay | wanted[name]
            known = {elements.device(member.device) for member in self._members.values()}
            wanted[elements.GUARDED] |= {each: b"" for each in have[elements.GUARDED] if each not in known}
        return self._change(have, wanted)

    def replace(self, policy: PolicyIntent) -> None:
        """Change policies, labels and groups. Failed, Conflict; then nothing has changed."""
        before = self._intent
        try:
            self._intent = msgspec.structs.replace(policy, labels={**policy.labels})  # the caller's may change
            self._again_if_stale((), lambda: self._replaced(before))
        except BaseException as error:
            self._intent, self._last = before, None
            if isinstance(error, OSError):
                raise Failed(f"the policies can't be changed: {error.strerror or error}") from error
            raise

    def _replaced(self, before: PolicyIntent | None) -> PolicyChange:
        """Return the change to other policies, labels and groups. If it concerns little, it is found without looking at
        all of them again."""
        intent, compiled = self._intent, self._last
        if self._installed is None or before is None or intent is None or compiled is None or self._compiler is None:
            return self._change(self._known(), self._compiled())
        alike = before.labels == self._compiler.population.labels
        if not alike or intent.operator != before.operator:
            return self._change(self._known(), self._compiled())
        if (found := self._compiler.change(compiled, intent)) is None:
            return self._change(self._known(), self._compiled())
        self._last, changes = found
        have, wanted = elements.difference(compiled, self._last, changes)
        return self._change(have, wanted)._replace(instead=have)

    def admit(self, port: Port, labels: Mapping[str, str], requests: Sequence[Request]) -> None:
        """Carry out the requests of a port that is plugged, together with the change of policies for it. NetlinkError;
        Failed if policies are installed, and nobody has told them to this process."""
        self._again_if_stale(requests, lambda: self._with_port(port, labels))

    def withdraw(self, port: Port, requests: Sequence[Request]) -> None:
        """Carry out the requests of a port that is unplugged, and forget its addresses. NetlinkError."""
        member, have = member_of(port), self._known()
        self._members.pop(_key(member), None)
        if have["audit_isolated_in"] or have["audit_isolated_out"]:  # the next owner of an address has flows of its own
            requests = [*requests, *audit.forget(self._nftables, self._table, member.addresses)]
        self._again_if_stale(requests, lambda: self._without(member), restricts=True)

    def _without(self, member: PolicyMember) -> PolicyChange:
        have, mine = self._known(), elements.addresses_of(member.addresses)
        mine = {**mine, elements.GUARDED: {elements.device(member.device)}}
        gone = {name: {key: have[name][key] for key in keys if key in have[name]} for name, keys in mine.items()}
        if self._last is not None:
            for devices in self._last.devices.values():
                devices.discard(member.device)
        if self._compiler is not None:
            self._compiler.population.discard(member)
        return self._change(gone, {name: {} for name in gone})._replace(instead=gone)

    def commit(self, requests: Sequence[Request], change: PolicyChange, *, restricts: bool = False) -> None:
        """Carry out requests and a change of policies as one transaction. Open connections are judged anew if it
        restricts what they may. NetlinkError."""
        begin = self._epoch.transact if restricts or change.restricts else self._nftables.transact
        try:
            begin(*requests, *change.requests)
        except NetlinkError:
            self._installed = self._last = None
            raise
        if change.instead is not None and self._installed is not None:
            for name, some in change.contents.items():
                for key in change.instead[name]:
                    self._installed[name].pop(key, None)
                self._installed[name].update(some)
        elif self._installed is not None or change.contents.keys() == {*elements.SETS}:
            self._installed = {**(self._installed or {}), **change.contents}

    def _again_if_stale(
        self, requests: Sequence[Request], change: Callable[[], PolicyChange], *, restricts: bool = False
    ) -> None:
        """Commit a change; once more from what the kernel has if that was not what it was thought to have."""
        try:
            self.commit(requests, change(), restricts=restricts)
        except NetlinkError as error:
            if error.errno not in (errno.ENOENT, errno.EEXIST):
                raise
            self.commit(requests, change(), restricts=restricts)

    def _with_port(self, port: Port, labels: Mapping[str, str]) -> PolicyChange:
        member, have = member_of(port), self._known()
        if self._intent is None or self._compiler is None:
            if any(have[f"isolated_{direction}"] for direction in ("in", "out")):
                raise Failed("the policies of the tenant are not known yet", "try again in a moment")
            self._intent = PolicyIntent()
        known = self._members.get(_key(member)) == member and self._intent.labels.get(port.instance, {}) == labels
        self._members[_key(member)] = member
        self._intent = msgspec.structs.replace(self._intent, labels={**self._intent.labels, port.instance: labels})
        if known or self._compiler is None or self._last is None or member.allowed:
            return self._change(have, self._compiled())
        population = self._compiler.population
        population.labels = self._intent.labels
        wanted: SetContents = {name: {} for name in (*_ADDRESSES, elements.GUARDED)}
        for address, kind in population.classes(member):
            if (number := population.numbers.get(kind)) is None:  # a class that no other port has
                return self._change(have, self._compiled())
            elements.add_address(wanted, address, number)
            self._last.devices.setdefault(number, set()).add(member.device)
            self._last.subjects[address] = number
            if number in self._last.enforced["in"].isolated:
                wanted[elements.GUARDED][elements.device(member.device)] = b""
        population.add(member)
        return self._change_of(have, wanted)

    def audited(self) -> list[CountedFlow]:
        """Return the flows that were counted for policies in audit."""
        return audit.read(self._nftables, self._table)

    def drift(self) -> list[str]:
        """Return differences between what the kernel has and what was installed last, as text."""
        if self._installed is None:
            return []
        have = elements.read(self._nftables, self._table)
        return [
            f"set {name} has {len(have[name])} elements, {len(have[name].items() ^ wanted.items())} of which differ"
            for name, wanted in self._installed.items()
            if have[name] != wanted
        ]

    # -- parts ---------------------------------------------------------------------------------------------------

    def _compiled(self) -> SetContents:
        assert self._intent is not None
        self._compiler = Compiler(self._intent, self._networks, self._members.values())
        self._last = self._compiler.run()
        return elements.contents(self._last, compile_operator(self._intent.operator))

    def _known(self) -> SetContents:
        if self._installed is None:
            self._installed = elements.read(self._nftables, self._table)
        return self._installed

    def _change_of(self, have: SetContents, wanted: SetContents) -> PolicyChange:
        """Return the change of some elements; others of these sets stay, and are not looked at."""
        before = {name: {key: have[name][key] for key in some if key in have[name]} for name, some in wanted.items()}
        return self._change(before, wanted)._replace(instead=before)

    def _change(self, have: SetContents, wanted: SetContents) -> PolicyChange:
        requests = elements.changes(self._table, have, wanted)
        return PolicyChange(requests, any(_restricts(name, have[name], some) for name, some in wanted.items()), wanted)


def _restricts(name: str, have: Mapping[KeyInterval, bytes], wanted: Mapping[KeyInterval, bytes]) -> bool:
    """Whether the change of a set may forbid open connections: what is deleted, or replaced, and some additions."""
    if have == wanted or (not have and name.startswith(_PERMITTING)):
        return False
    return not name.startswith(_PERMITTING) or any(wanted.get(key) != value for key, value in have.items())


def _key(member: PolicyMember) -> tuple[str, str]:
    return member.network, member.instance
