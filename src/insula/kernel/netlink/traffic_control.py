"""Traffic control by rtnetlink: queueing disciplines, classes and filters of a device (tc(8)).

A packet that leaves a device goes through its *root* queueing discipline. HTB (tc-htb(8)) has a tree of classes: each
may send at its rate, and borrow from its parent up to its ceiling. A leaf holds a queue, here of so many bytes (bfifo).
The discipline *clsact* holds no packets: its filters see those that arrive at and that leave a device. A filter may
redirect them to an intermediate functional block (IFB), a device whose root discipline shapes what is sent to it; the
packets then go on where they were.

A filter chooses a class by writing its number into the packet's priority, which HTB reads (skb->priority).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from insula.kernel.netlink import attributes as rtattr
from insula.kernel.netlink.rtnetlink import Rtnl
from insula.kernel.netlink.socket import ACK, CREATE, ECHO, EXCLUSIVE, REPLACE, NetlinkError, Request

# linux/rtnetlink.h, linux/pkt_sched.h, linux/pkt_cls.h, linux/tc_act/tc_mirred.h
_NEWQDISC, _DELQDISC, _GETQDISC = 36, 37, 38
_NEWCLASS, _DELCLASS, _GETCLASS = 40, 41, 42
_NEWFILTER, _DELFILTER, _GETFILTER = 44, 45, 46
_KIND, _OPTIONS, _STATS2 = 1, 2, 7
_STATS_BASIC, _STATS_QUEUE = 1, 3
_HTB_PARMS, _HTB_INIT, _HTB_RATE64, _HTB_CEIL64 = 1, 2, 6, 7
_TBF_PARMS, _TBF_RATE64, _TBF_BURST = 1, 4, 6
_BPF_ACT, _BPF_FD, _BPF_NAME, _BPF_ID = 1, 6, 7, 11
_U32_CLASSID, _U32_HASH, _U32_LINK, _U32_DIVISOR, _U32_SEL, _U32_ACT = 1, 2, 3, 4, 5, 7
_ACT_KIND, _ACT_OPTIONS, _MIRRED_PARMS, _STOLEN, _REDIRECT = 1, 2, 2, 4, 1
_FIRST_KEY: Final = 16  # the length of a tc_u32_sel without its keys
_ETH_P_ALL: Final = 3
_ENOENT, _EIO, _EINVAL, _ENODEV, _EEXIST = 2, 5, 22, 19, 17

ROOT: Final = 0xFFFFFFFF
CLSACT: Final = 0xFFFFFFF1
INGRESS: Final = 0xFFFFFFF2
"""The parent of filters for packets that arrive at a device."""
EGRESS: Final = 0xFFFFFFF3
"""The parent of filters for packets that leave a device."""

_TCMSG = struct.Struct("=BxHiIII")
_RATESPEC = struct.Struct("=BBHhHI")  # tc_ratespec: cell_log, linklayer, overhead, cell_align, mpu, rate
_HTB_OPT = struct.Struct("=5I")  # tc_htb_opt after the two rates: buffer, cbuffer, quantum, level, prio
_TBF_OPT = struct.Struct("=3I")  # tc_tbf_qopt after the two rates: limit, buffer, mtu
_MIRRED = struct.Struct("=IIiiiiI")
_ETHERNET = 1  # TC_LINKLAYER_ETHERNET
_TICK: Final = 64  # nanoseconds, the kernel's unit of a burst (PSCHED_SHIFT)


def handle(major: int, minor: int = 0) -> int:
    """Return the number of a discipline or class, MAJOR:MINOR."""
    return major << 16 | minor


@dataclass(frozen=True)
class HtbClass:
    """A class of HTB: its number and its parent's; `rate` and `ceiling` are bits a second, `burst` and `ceiling_burst`
    bytes, `quantum` the bytes that it may send in its turn when it borrows."""

    number: int
    parent: int
    rate: int
    ceiling: int
    burst: int
    ceiling_burst: int
    quantum: int


class ClassCounters(NamedTuple):
    """What a class has sent and dropped, and what waits in it."""

    bytes: int
    packets: int
    drops: int
    backlog: int  # bytes


@dataclass(frozen=True)
class BpfFilter:
    """A filter of clsact: `name` is that of its eBPF program, `to` the index of the device that it redirects to,
    `program` the number (ID) that the kernel has given to the program."""

    parent: int
    priority: int
    name: str
    to: int | None
    program: int = 0


@dataclass(frozen=True)
class Qdisc:
    """A queueing discipline. `limit` (bytes) and `rate` (bits a second) are those of a tbf."""

    kind: str
    number: int
    limit: int = 0
    rate: int = 0


# -- queueing disciplines -----------------------------------------------------------------------------------------


def add_htb(index: int, *, default: int = 0) -> Request:
    """Set HTB with the number 1: as a device's root discipline. Packets of no class go to `default` (a minor number);
    0 sends them without limit. EEXIST if it has one."""
    options = rtattr.nested((_HTB_INIT, struct.pack("=5I", 3, 10, default, 0, 0)))
    return _qdisc("add htb", index, handle(1), ROOT, "htb", options, CREATE | EXCLUSIVE)


def add_clsact(index: int) -> Request:
    """Add the discipline that holds filters; no error if it is there."""
    return _qdisc("add clsact", index, handle(0xFFFF), CLSACT, "clsact", None, CREATE | EXCLUSIVE, {_EEXIST})


def delete_clsact(index: int) -> Request:
    """Delete the discipline with all filters; no error if it is gone."""
    body = _TCMSG.pack(0, 0, index, handle(0xFFFF), CLSACT, 0)
    return Request(f"delete clsact of {index}", _DELQDISC, 0, body, frozenset({_ENOENT, _EINVAL, _ENODEV}))


def set_bfifo(index: int, parent: int, limit: int) -> Request:
    """Make a class's queue one of `limit` bytes (tc-bfifo(8)); an existing one keeps its packets."""
    number = handle(parent & 0xFFFF)
    return _qdisc("set bfifo", index, number, parent, "bfifo", struct.pack("=I", limit), CREATE | REPLACE)


def set_tbf(index: int, rate: int, burst: int, limit: int) -> Request:
    """Set a token bucket (tc-tbf(8)) as the device's root discipline: `rate` bits a second, `burst` and `limit` bytes.
    An existing one is changed, and keeps its packets."""
    speed = rate // 8
    parameters = _ratespec(speed) + _ratespec(0) + _TBF_OPT.pack(limit, _ticks(burst, speed), 0)
    options = rtattr.nested(
        (_TBF_PARMS, parameters), (_TBF_RATE64, _rate64(speed)), (_TBF_BURST, struct.pack("=I", burst))
    )
    return _qdisc("set tbf", index, handle(1), ROOT, "tbf", options, CREATE | REPLACE)


def delete_root(index: int) -> Request:
    """Delete the root discipline with everything in it; no error if the device has only its default one."""
    body = _TCMSG.pack(0, 0, index, 0, ROOT, 0)
    return Request(f"delete root discipline of {index}", _DELQDISC, 0, body, frozenset({_ENOENT, _EINVAL, _ENODEV}))


def _qdisc(
    what: str,
    index: int,
    number: int,
    parent: int,
    kind: str,
    options: bytes | None,
    flags: int,
    ignore: set[int] | None = None,
) -> Request:
    body = _TCMSG.pack(0, 0, index, number, parent, 0)
    body += rtattr.attributes((_KIND, rtattr.text(kind)), (_OPTIONS, options))
    return Request(f"{what} of {index}", _NEWQDISC, flags, body, frozenset(ignore or ()))


def qdisc(rtnl: Rtnl, index: int, parent: int = ROOT) -> Qdisc | None:
    """Return the root discipline of a device, or its clsact (`parent` is CLSACT); None if it has only a default one."""
    body = _get(rtnl, _GETQDISC, _TCMSG.pack(0, 0, index, 0, parent, 0))
    if body is None:
        return None
    number = _TCMSG.unpack_from(body)[3]
    parts = rtattr.parse(body[_TCMSG.size :])
    kind, limit, rate = rtattr.string(parts[_KIND]), 0, 0
    if kind == "tbf":
        nested = rtattr.parse(parts[_OPTIONS])
        limit, _, _ = _TBF_OPT.unpack_from(nested[_TBF_PARMS], 2 * _RATESPEC.size)
        rate = _rate_in(nested[_TBF_PARMS], nested.get(_TBF_RATE64))
    return Qdisc(kind, number, limit, rate)


def dropped(rtnl: Rtnl, index: int) -> int:
    """Return how many packets the root discipline of a device has dropped, those of its classes included."""
    body = _get(rtnl, _GETQDISC, _TCMSG.pack(0, 0, index, 0, ROOT, 0))
    stats = rtattr.parse(rtattr.parse(body[_TCMSG.size :]).get(_STATS2, b"")) if body else {}
    return int(struct.unpack_from("=3I", stats[_STATS_QUEUE])[2]) if _STATS_QUEUE in stats else 0


def kinds(rtnl: Rtnl) -> list[tuple[int, str]]:
    """Return the kinds of all disciplines of the namespace, each with the index of its device."""
    found = []
    for body in rtnl.dump(_GETQDISC, _TCMSG.pack(0, 0, 0, 0, 0, 0)):
        index = _TCMSG.unpack_from(body)[2]
        found.append((index, rtattr.string(rtattr.parse(body[_TCMSG.size :])[_KIND])))
    return found


def _get(rtnl: Rtnl, type_: int, body: bytes) -> bytes | None:
    """Return the answer to a request; None if there is no such thing. The kernel answers only those that ask for an
    echo (NLM_F_ECHO): others are told by a notification to the group."""
    try:
        return rtnl.get(type_, body, ECHO | ACK)
    except NetlinkError as error:
        if error.errno in (_ENOENT, _EIO, _EINVAL, _ENODEV):  # EIO: an acknowledgement and no answer
            return None
        raise


# -- classes ------------------------------------------------------------------------------------------------------


def set_class(index: int, each: HtbClass) -> Request:
    """Create or change a class. A change keeps the packets of its queue."""
    rate, ceiling = each.rate // 8, each.ceiling // 8
    parameters = _ratespec(rate) + _ratespec(ceiling)
    parameters += _HTB_OPT.pack(_ticks(each.burst, rate), _ticks(each.ceiling_burst, ceiling), each.quantum, 0, 0)
    options = rtattr.nested((_HTB_PARMS, parameters), (_HTB_RATE64, _rate64(rate)), (_HTB_CEIL64, _rate64(ceiling)))
    body = _TCMSG.pack(0, 0, index, each.number, each.parent, 0)
    body += rtattr.attributes((_KIND, b"htb\0"), (_OPTIONS, options))
    return Request(f"set class {each.number:x} of {index}", _NEWCLASS, CREATE | REPLACE, body)


def delete_class(index: int, number: int) -> Request:
    """Delete a class with its queue; no error if it is gone."""
    body = _TCMSG.pack(0, 0, index, number, 0, 0)
    return Request(f"delete class {number:x} of {index}", _DELCLASS, 0, body, frozenset({_ENOENT, _EINVAL, _ENODEV}))


def classes(rtnl: Rtnl, index: int) -> dict[int, HtbClass]:
    """Return the classes of a device's HTB by number. Bursts are as the kernel rounds them: see `same_class`."""
    return {number: _parsed(number, parent, parts) for number, parent, parts in _classes(rtnl, index)}


def some_classes(rtnl: Rtnl, index: int, numbers: Iterable[int]) -> dict[int, HtbClass]:
    """Return those of these classes that exist, without reading the others."""
    bodies = (_get(rtnl, _GETCLASS, _TCMSG.pack(0, 0, index, number, 0, 0)) for number in numbers)
    return {number: _parsed(number, parent, parts) for number, parent, parts in _htb(body for body in bodies if body)}


def _parsed(number: int, parent: int, parts: Mapping[int, bytes]) -> HtbClass:
    nested = rtattr.parse(parts.get(_OPTIONS, b""))
    parameters = nested[_HTB_PARMS]
    second = parameters[_RATESPEC.size :]
    buffer, ceiling_buffer, quantum, _, _ = _HTB_OPT.unpack_from(parameters, 2 * _RATESPEC.size)
    rate, ceiling = _rate_in(parameters, nested.get(_HTB_RATE64)), _rate_in(second, nested.get(_HTB_CEIL64))
    above = handle(1) if parent == ROOT else parent
    return HtbClass(number, above, rate, ceiling, _bytes(buffer, rate), _bytes(ceiling_buffer, ceiling), quantum)


def same_class(one: HtbClass, other: HtbClass) -> bool:
    """Whether the classes are equal but for the kernel's rounding: rates to bytes, bursts to ticks of 64 ns."""

    def near(one: int, other: int, rate: int) -> bool:
        return abs(one - other) <= 2 + rate * 2 * _TICK // 8_000_000_000

    return (
        (one.number, one.parent, one.rate // 8, one.ceiling // 8)
        == (other.number, other.parent, other.rate // 8, other.ceiling // 8)
        and near(one.burst, other.burst, one.rate)
        and near(one.ceiling_burst, other.ceiling_burst, one.ceiling)
        and one.quantum == other.quantum
    )


def class_counters(rtnl: Rtnl, index: int) -> dict[int, ClassCounters]:
    """Return the counters of a device's classes by number."""
    found = {}
    for number, _, parts in _classes(rtnl, index):
        stats = rtattr.parse(parts.get(_STATS2, b""))
        sent, packets = struct.unpack_from("=QI", stats[_STATS_BASIC].ljust(12, b"\0"))
        _, backlog, drops = struct.unpack_from("=3I", stats[_STATS_QUEUE])
        found[number] = ClassCounters(sent, packets, drops, backlog)
    return found


def _classes(rtnl: Rtnl, index: int) -> Iterator[tuple[int, int, dict[int, bytes]]]:
    return _htb(rtnl.dump(_GETCLASS, _TCMSG.pack(0, 0, index, 0, 0, 0)))


def _htb(bodies: Iterable[bytes]) -> Iterator[tuple[int, int, dict[int, bytes]]]:
    """Yield number, parent and attributes of each class of HTB."""
    for body in bodies:
        _, _, _, number, parent, _ = _TCMSG.unpack_from(body)
        parts = rtattr.parse(body[_TCMSG.size :])
        if parts.get(_KIND) == b"htb\0":
            yield number, parent, parts


# -- filters ------------------------------------------------------------------------------------------------------


def set_bpf_filter(index: int, parent: int, program: int, name: str, to: int, *, priority: int = 1) -> Request:
    """Set the filter of this priority: packets for which the eBPF program (a descriptor) returns -1 are redirected to
    the device `to`. It is replaced at once, so that no packet is missed."""
    options = rtattr.nested(
        (_BPF_ACT | rtattr.NESTED, _redirect_to(to)), (_BPF_FD, rtattr.u32(program)), (_BPF_NAME, rtattr.text(name))
    )
    body = _TCMSG.pack(0, 0, index, 1, parent, _info(priority, _ETH_P_ALL))
    body += rtattr.attributes((_KIND, b"bpf\0"), (_OPTIONS | rtattr.NESTED, options))
    return Request(f"set filter {name} of {index}", _NEWFILTER, CREATE | REPLACE, body)


def delete_filters(index: int, parent: int, priority: int = 1) -> Request:
    """Delete the filters of this priority; no error if they are gone."""
    body = _TCMSG.pack(0, 0, index, 0, parent, _info(priority, 0))
    ignore = frozenset({_ENOENT, _EINVAL, _ENODEV})
    return Request(f"delete filters of {index}", _DELFILTER, 0, body, ignore)


def filters(rtnl: Rtnl, index: int, parent: int) -> list[BpfFilter]:
    """Return a device's filters by eBPF programs below `parent`."""
    found = []
    for body in rtnl.dump(_GETFILTER, _TCMSG.pack(0, 0, index, 0, parent, 0)):
        info = _TCMSG.unpack_from(body)[5]
        parts = rtattr.parse(body[_TCMSG.size :])
        nested = rtattr.parse(parts.get(_OPTIONS, b""))
        if parts.get(_KIND) == b"bpf\0" and _BPF_NAME in nested:
            name = rtattr.string(nested[_BPF_NAME])
            number = rtattr.integer(nested[_BPF_ID]) if _BPF_ID in nested else 0
            found.append(BpfFilter(parent, info >> 16, name, _redirected(nested.get(_BPF_ACT, b"")), number))
    return found


def _redirect_to(device: int) -> bytes:
    """Pack the action that redirects a packet to a device (tc-mirred(8))."""
    parameters = _MIRRED.pack(0, 0, _STOLEN, 0, 0, _REDIRECT, device)
    options = rtattr.nested((_MIRRED_PARMS, parameters))
    action = rtattr.nested((_ACT_KIND, b"mirred\0"), (_ACT_OPTIONS | rtattr.NESTED, options))
    return rtattr.nested((1 | rtattr.NESTED, action))


def _redirected(actions: bytes) -> int | None:
    """Return the device of the first action, if it redirects."""
    action = rtattr.parse(rtattr.parse(actions).get(1, b""))
    parameters = rtattr.parse(action.get(_ACT_OPTIONS, b"")).get(_MIRRED_PARMS)
    return int(_MIRRED.unpack_from(parameters)[6]) if parameters and action.get(_ACT_KIND) == b"mirred\0" else None


def _info(priority: int, protocol: int) -> int:
    (in_network_order,) = struct.unpack("=H", struct.pack("!H", protocol))
    return priority << 16 | int(in_network_order)


# -- filters by u32 -----------------------------------------------------------------------------------------------


class U32Match(NamedTuple):
    """A comparison of tc-u32(8): the 32 bits at `offset` of the network header, under `mask`, are `value`."""

    value: int
    mask: int
    offset: int


def u32_table(index: int, number: int, *, priority: int, protocol: int, buckets: int = 256) -> Request:
    """Create a hash table of u32, with `number` from 1 to 0x7ff; no error if it is there."""
    options = rtattr.nested((_U32_DIVISOR, rtattr.u32(buckets)))
    body = _TCMSG.pack(0, 0, index, number << 20, handle(1), _info(priority, protocol))
    body += rtattr.attributes((_KIND, b"u32\0"), (_OPTIONS, options))
    return Request(f"add hash table {number} of {index}", _NEWFILTER, CREATE | EXCLUSIVE, body, frozenset({_EEXIST}))


def u32_link(
    index: int, matches: list[U32Match], table: int, hash_mask: int, hash_offset: int, *, priority: int, protocol: int
) -> Request:
    """Add a filter that looks packets with these matches up in a hash table. The bucket is the lowest byte that
    `hash_mask` leaves of the 32 bits at `hash_offset`."""
    selector = _selector(matches, hash_mask=hash_mask, hash_offset=hash_offset)
    options = rtattr.nested((_U32_LINK, rtattr.u32(table << 20)), (_U32_SEL, selector))
    return _u32(f"link to table {table}", index, 0, options, priority, protocol)


def u32_class(
    index: int,
    matches: list[U32Match],
    to: int,
    *,
    priority: int,
    protocol: int,
    table: int = 0x800,
    bucket: int = 0,
    node: int = 2,
) -> Request:
    """Create or replace the filter `node` (1 to 0xfff) in a bucket, which gives packets to the class `to`."""
    options = rtattr.nested(
        (_U32_CLASSID, rtattr.u32(to)),
        (_U32_HASH, rtattr.u32(table << 20 | bucket << 12)),
        (_U32_SEL, _selector(matches)),
    )
    return _u32(f"filter to {to:x}", index, table << 20 | bucket << 12 | node, options, priority, protocol)


def u32_redirect(index: int, parent: int, matches: list[U32Match], to: int, *, priority: int, protocol: int) -> Request:
    """Add a filter of clsact that redirects packets with these matches to the device `to`."""
    options = rtattr.nested((_U32_SEL, _selector(matches)), (_U32_ACT | rtattr.NESTED, _redirect_to(to)))
    return _u32(f"redirection to {to}", index, 0, options, priority, protocol, parent=parent)


def delete_u32(index: int, number: int, *, priority: int, protocol: int, parent: int = handle(1)) -> Request:
    """Delete one filter of u32; no error if it is gone."""
    body = _TCMSG.pack(0, 0, index, number, parent, _info(priority, protocol)) + rtattr.attributes((_KIND, b"u32\0"))
    ignore = frozenset({_ENOENT, _EINVAL, _ENODEV})
    return Request(f"delete filter {number:x} of {index}", _DELFILTER, 0, body, ignore)


def u32_classes(rtnl: Rtnl, index: int) -> dict[int, tuple[int, int]]:
    """Return (class, value of the first match) of u32's filters on a device's HTB, by the filter's number."""
    found = {}
    for number, _, nested in _u32_filters(rtnl, index, handle(1)):
        if _U32_CLASSID in nested and len(nested[_U32_SEL]) >= _FIRST_KEY + 8:
            (value,) = struct.unpack_from("=I", nested[_U32_SEL], _FIRST_KEY + 4)
            found[number] = (rtattr.integer(nested[_U32_CLASSID]), _network(value))
    return found


def has_u32_link(rtnl: Rtnl, index: int) -> bool:
    """Return whether a filter on a device's HTB looks packets up in a hash table."""
    return any(_U32_LINK in nested for _, _, nested in _u32_filters(rtnl, index, handle(1)))


def u32_redirections(rtnl: Rtnl, index: int, parent: int, priority: int) -> list[int | None]:
    """Return the devices to which u32's filters of this priority redirect packets."""
    filters_ = _u32_filters(rtnl, index, parent)
    return [_redirected(nested[_U32_ACT]) for _, of, nested in filters_ if of == priority and _U32_ACT in nested]


def _u32_filters(rtnl: Rtnl, index: int, parent: int) -> Iterator[tuple[int, int, dict[int, bytes]]]:
    """Yield number, priority and options of each filter of u32."""
    for body in rtnl.dump(_GETFILTER, _TCMSG.pack(0, 0, index, 0, parent, 0)):
        _, _, _, number, _, info = _TCMSG.unpack_from(body)
        parts = rtattr.parse(body[_TCMSG.size :])
        if parts.get(_KIND) == b"u32\0" and _OPTIONS in parts:
            yield number, info >> 16, rtattr.parse(parts[_OPTIONS])


def _u32(
    what: str, index: int, number: int, options: bytes, priority: int, protocol: int, parent: int = handle(1)
) -> Request:
    body = _TCMSG.pack(0, 0, index, number, parent, _info(priority, protocol))
    body += rtattr.attributes((_KIND, b"u32\0"), (_OPTIONS, options))
    return Request(f"set {what} of {index}", _NEWFILTER, CREATE | REPLACE, body)


def _selector(matches: list[U32Match], *, hash_mask: int = 0, hash_offset: int = 0) -> bytes:
    """Pack a tc_u32_sel. A filter with a class ends the search (TC_U32_TERMINAL)."""
    flags = 0 if hash_mask else 1
    head = struct.pack("=BBBxHHhhI", flags, 0, len(matches), 0, 0, 0, hash_offset, _network(hash_mask))
    keys = (struct.pack("=IIii", _network(m.mask), _network(m.value), m.offset, 0) for m in matches)
    return head + b"".join(keys)


def _network(value: int) -> int:
    return int(struct.unpack("=I", struct.pack("!I", value))[0])


# -- rates --------------------------------------------------------------------------------------------------------


def _ratespec(speed: int) -> bytes:
    return _RATESPEC.pack(0, _ETHERNET if speed else 0, 0, 0, 0, min(speed, 0xFFFFFFFF))


def _rate64(speed: int) -> bytes | None:
    """Pack a rate in bytes a second that doesn't fit into a tc_ratespec."""
    return struct.pack("=Q", speed) if speed > 0xFFFFFFFF else None


def _rate_in(ratespec: bytes, rate64: bytes | None) -> int:
    """Return the bits a second of a tc_ratespec, or of the attribute for greater rates."""
    if rate64:
        return int(struct.unpack("=Q", rate64)[0]) * 8
    return int(_RATESPEC.unpack_from(ratespec)[5]) * 8


def _ticks(burst: int, speed: int) -> int:
    """Return the time in which `burst` bytes are sent, in the kernel's ticks."""
    return min(burst * 1_000_000_000 // max(speed, 1) // _TICK, 0xFFFFFFFF)


def _bytes(ticks: int, rate: int) -> int:
    return ticks * _TICK * (rate // 8) // 1_000_000_000
