"""Capabilities: root's power in forty-one pieces (capabilities(7)).

A process has five sets of them. *Effective* is what the kernel checks; *permitted* what the process may make
effective; *inheritable* and *ambient* what can pass through execve(2); *bounding* what execve may ever give back.
A container gets small sets of the first two, and the same as its bounding set, so that neither a set-uid program
nor a file capability inside can give more. Ambient stays empty: only root inside gets the capabilities at exec.

Taking them away must be done in two phases around the change of user, because each needs what the other takes:

1. `before_setuid`: the bounding set can only be lowered with CAP_SETPCAP, which setuid(2) to another user than
   root would take away; and setuid would clear the permitted set too, if PR_SET_KEEPCAPS didn't forbid it.
2. setgroups(2), setgid(2), setuid(2)
3. `after_setuid`: capset(2) to the sets asked for, which now are a part of what was kept.

The file is loaded by the process that forks containers, so it imports almost nothing.
"""

from __future__ import annotations

import struct

from insula.kernel import libc, syscalls
from insula.model.errors import Invalid

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from typing import Final

_NAMES = """
    CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE
    NET_BIND_SERVICE NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT
    SYS_PTRACE SYS_PACCT SYS_ADMIN SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE
    AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ
    PERFMON BPF CHECKPOINT_RESTORE
"""
_DEFAULT = """
    CHOWN DAC_OVERRIDE FOWNER FSETID KILL SETGID SETUID SETPCAP NET_BIND_SERVICE NET_RAW SYS_CHROOT MKNOD
    AUDIT_WRITE SETFCAP
"""

NAMES: Final = tuple(f"CAP_{name}" for name in _NAMES.split())
"""The names in the order of their numbers, as linux/capability.h has them."""

NUMBERS: Final = {name: number for number, name in enumerate(NAMES)}

ALL: Final = (1 << len(NAMES)) - 1

_PR_CAPBSET_READ: Final = 23
_PR_CAP_AMBIENT_IS_SET: Final = 1
_PR_CAP_AMBIENT_RAISE: Final = 2
_PR_CAP_AMBIENT_CLEAR_ALL: Final = 4
_EINVAL: Final = 22


def normalise(name: str) -> str:
    """``CAP_NET_ADMIN`` from ``net_admin``, ``NET_ADMIN`` or itself; `Invalid` if there is no such capability."""
    canonical = name.upper() if isinstance(name, str) else ""
    canonical = canonical if canonical.startswith("CAP_") else f"CAP_{canonical}"
    if canonical not in NUMBERS:
        raise Invalid(f"there is no capability {name!r:.60}", "capabilities(7) lists them, as in NET_ADMIN")
    return canonical


def to_mask(names: Iterable[str]) -> int:
    """The set as an integer: bit n is capability n. `Invalid` on an unknown name."""
    mask = 0
    for name in names:
        mask |= 1 << NUMBERS[normalise(name)]
    return mask


def to_names(mask: int) -> list[str]:
    """The names of a mask in the order of their numbers; bits that have no name are left out."""
    return [name for number, name in enumerate(NAMES) if mask >> number & 1]


DEFAULT: Final = to_mask(_DEFAULT.split())
"""What root inside a container has unless told otherwise: Docker's default set."""


def adjust(base: int, add: Iterable[str] = (), drop: Iterable[str] = ()) -> int:
    """`base` with names added and dropped as docker-run(1) does it, ``ALL`` included; adding wins over dropping.

    With ``ALL`` added, only what is dropped is missing; with ``ALL`` dropped, only what is added is there.
    """
    add, drop = set(add), set(drop)
    add_all = {name for name in add if isinstance(name, str) and name.upper() == "ALL"}
    drop_all = {name for name in drop if isinstance(name, str) and name.upper() == "ALL"}
    added, dropped = to_mask(add - add_all), to_mask(drop - drop_all)
    if add_all:
        return ALL & ~dropped
    return added if drop_all else base & ~dropped | added


class Capabilities:
    """The five sets of a process, as masks."""

    __slots__ = FIELDS = ("bounding", "effective", "permitted", "inheritable", "ambient")

    def __init__(
        self, bounding: int = 0, effective: int = 0, permitted: int = 0, inheritable: int = 0, ambient: int = 0
    ) -> None:
        self.bounding = bounding
        self.effective = effective
        self.permitted = permitted
        self.inheritable = inheritable
        self.ambient = ambient

    def __iter__(self) -> Iterator[int]:
        return (getattr(self, field) for field in self.FIELDS)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Capabilities) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return f"Capabilities({', '.join(map(hex, self))})"

    @classmethod
    def from_oci(cls, sets: Mapping[str, Iterable[str]] | None) -> Capabilities:
        """From `process.capabilities` of the OCI runtime-spec; a missing set is empty. `Invalid` on unknown names."""
        return cls(**{field: to_mask((sets or {}).get(field) or ()) for field in cls.FIELDS})

    def grantable(self) -> tuple[Capabilities, int]:
        """What of it the calling thread can have: the sets, and a mask of all that is missing in one of them.

        Nobody gets what he has not: not more permitted than there is, not effective or ambient what is not permitted,
        nothing inheritable that is not in the bounding set.
        """
        _, have, inherits = _capget()
        permitted = self.permitted & have
        inheritable = self.inheritable & (inherits | have & self.bounding)
        sets = Capabilities(
            self.bounding,
            self.effective & permitted,
            permitted,
            inheritable,
            self.ambient & permitted & inheritable,
        )
        missing = 0
        for wanted, granted in zip(self, sets, strict=True):
            missing |= wanted & ~granted
        return sets, missing


def before_setuid(sets: Capabilities) -> None:
    """Lower the bounding set, and keep the permitted set over the coming setuid(2). Needs CAP_SETPCAP."""
    for number in range(64):
        if not sets.bounding >> number & 1:
            try:
                syscalls.prctl(syscalls.PR_CAPBSET_DROP, number)
            except OSError as error:
                if error.errno == _EINVAL:  # the kernel has no more capabilities
                    break
                if _in_bounding_set(number):  # without CAP_SETPCAP: an error only if there is something to drop
                    raise
    syscalls.prctl(syscalls.PR_SET_KEEPCAPS, 1)


def keep_one(sets: Capabilities) -> None:
    """Keep only what `sets` has, and CAP_SYS_ADMIN, until `after_setuid`."""
    more = to_mask(["SYS_ADMIN"]) & _capget()[1]
    _capset(Capabilities(sets.bounding, sets.effective | more, sets.permitted | more, sets.inheritable, 0))


def after_setuid(sets: Capabilities) -> None:
    """Set the other four sets of the calling thread. Raises OSError (EPERM) for what it did not have itself."""
    syscalls.prctl(syscalls.PR_SET_KEEPCAPS, 0)
    syscalls.prctl(syscalls.PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    _capset(sets)
    for number in range(sets.ambient.bit_length()):
        if sets.ambient >> number & 1:
            syscalls.prctl(syscalls.PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, number)


def _in_bounding_set(number: int) -> bool:
    try:
        return bool(syscalls.prctl(_PR_CAPBSET_READ, number))
    except OSError:
        return False


def current() -> Capabilities:
    """The sets of the calling thread."""
    effective, permitted, inheritable = _capget()
    bounding = ambient = 0
    for number in range(64):
        try:
            bounding |= syscalls.prctl(_PR_CAPBSET_READ, number) << number
        except OSError:
            break
        ambient |= syscalls.prctl(syscalls.PR_CAP_AMBIENT, _PR_CAP_AMBIENT_IS_SET, number) << number
    return Capabilities(bounding, effective, permitted, inheritable, ambient)


# -- capget(2) and capset(2): version 3 has two records of three 32-bit words, low halves first -------------------

_HEADER = struct.pack("Ii", 0x20080522, 0)
_DATA = struct.Struct("6I")


def _capget() -> tuple[int, int, int]:
    data = libc.buffer(_DATA.size)
    libc.check(libc.function("capget")(_HEADER, data), "capget")
    low_e, low_p, low_i, high_e, high_p, high_i = _DATA.unpack(data.raw)
    return low_e | high_e << 32, low_p | high_p << 32, low_i | high_i << 32


def _capset(sets: Capabilities) -> None:
    e, p, i = sets.effective, sets.permitted, sets.inheritable
    low = 0xFFFFFFFF
    wanted = _DATA.pack(e & low, p & low, i & low, e >> 32, p >> 32, i >> 32)
    libc.check(libc.function("capset")(_HEADER, wanted), "capset")
