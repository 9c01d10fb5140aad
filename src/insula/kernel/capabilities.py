"""Capabilities: the forty-one privileges that Linux divides root's power into (capabilities(7)).

A thread has five sets of them:

    effective      the set that the kernel checks
    permitted      the upper bound of the effective set
    inheritable    passed through execve(2) to programs whose file has inheritable capabilities
    ambient        passed through execve(2) to any program
    bounding       the upper bound of what execve(2) can add

A container gets small effective and permitted sets, and the same as its bounding set: neither a set-uid program nor a
file capability inside can add more. Its ambient set is empty, so only root inside keeps capabilities over execve(2).

Dropping capabilities takes two phases around the change of user:

1. `before_setuid`: lowers the bounding set, which needs CAP_SETPCAP; setuid(2) to a user other than root drops that.
   It also sets PR_SET_KEEPCAPS, or setuid(2) would clear the permitted set.
2. setgroups(2), setgid(2), setuid(2)
3. `after_setuid`: sets the other sets with capset(2); they must be subsets of the kept permitted set.

The zygote loads this file before it forks containers, so it imports little.
"""

from __future__ import annotations

import struct

from insula.kernel import libc, syscalls
from insula.model.errors import Invalid
from insula.model.rules import CAPABILITIES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from typing import Final

_DEFAULT = """
    CHOWN DAC_OVERRIDE FOWNER FSETID KILL SETGID SETUID SETPCAP NET_BIND_SERVICE NET_RAW SYS_CHROOT MKNOD
    AUDIT_WRITE SETFCAP
"""

NAMES: Final = tuple(f"CAP_{name}" for name in CAPABILITIES)
"""The names in the order of their numbers, as linux/capability.h has them."""

NUMBERS: Final = {name: number for number, name in enumerate(NAMES)}

ALL: Final = (1 << len(NAMES)) - 1

_PR_CAPBSET_READ: Final = 23
_PR_CAP_AMBIENT_IS_SET: Final = 1
_PR_CAP_AMBIENT_RAISE: Final = 2
_PR_CAP_AMBIENT_CLEAR_ALL: Final = 4
_EINVAL: Final = 22


def normalise(name: str) -> str:
    """Return ``CAP_NET_ADMIN`` for ``net_admin``, ``NET_ADMIN`` or itself; `Invalid` for an unknown capability."""
    canonical = name.upper() if isinstance(name, str) else ""
    canonical = canonical if canonical.startswith("CAP_") else f"CAP_{canonical}"
    if canonical not in NUMBERS:
        raise Invalid(f"unknown capability {name!r:.60}", "use a name of capabilities(7), such as NET_ADMIN")
    return canonical


def to_mask(names: Iterable[str]) -> int:
    """Convert names to a mask, in which bit n is capability n. `Invalid` for an unknown name."""
    mask = 0
    for name in names:
        mask |= 1 << NUMBERS[normalise(name)]
    return mask


def to_names(mask: int) -> list[str]:
    """Convert a mask to names in the order of their numbers; bits without a name are left out."""
    return [name for number, name in enumerate(NAMES) if mask >> number & 1]


DEFAULT: Final = to_mask(_DEFAULT.split())
"""Docker's default set, for root inside a container."""


def adjust(base: int, add: Iterable[str] = (), drop: Iterable[str] = ()) -> int:
    """Add names to `base` and drop names from it as docker-run(1) does, ``ALL`` included; adding wins over dropping.

    With ``ALL`` added, the result is all capabilities but the dropped ones; with ``ALL`` dropped, only the added ones.
    """
    add, drop = set(add), set(drop)
    add_all = {name for name in add if isinstance(name, str) and name.upper() == "ALL"}
    drop_all = {name for name in drop if isinstance(name, str) and name.upper() == "ALL"}
    added, dropped = to_mask(add - add_all), to_mask(drop - drop_all)
    if add_all:
        return ALL & ~dropped
    return added if drop_all else base & ~dropped | added


class Capabilities:
    """The five capability sets of a thread, as masks."""

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
        """Convert `process.capabilities` of the runtime-spec; a missing set is empty. `Invalid` for an unknown name."""
        return cls(**{field: to_mask((sets or {}).get(field) or ()) for field in cls.FIELDS})

    def grantable(self) -> tuple[Capabilities, int]:
        """Reduce the sets to those that the calling thread can set; also return a mask of what is missing from any set.

        The limits are the kernel's: permitted is at most the thread's permitted set, effective and ambient are at most
        permitted, and inheritable is at most the bounding set.
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
    """Lower the bounding set, and keep the permitted set over the following setuid(2). Needs CAP_SETPCAP."""
    for number in range(64):
        if not sets.bounding >> number & 1:
            try:
                syscalls.prctl(syscalls.PR_CAPBSET_DROP, number)
            except OSError as error:
                if error.errno == _EINVAL:  # the last capability of this kernel was the one before
                    break
                if _in_bounding_set(number):  # without CAP_SETPCAP it is an error only if the capability is there
                    raise
    syscalls.prctl(syscalls.PR_SET_KEEPCAPS, 1)


def keep_sys_admin(sets: Capabilities) -> None:
    """Reduce the thread to `sets` and CAP_SYS_ADMIN, until `after_setuid`."""
    more = to_mask(["SYS_ADMIN"]) & _capget()[1]
    _capset(Capabilities(sets.bounding, sets.effective | more, sets.permitted | more, sets.inheritable, 0))


def after_setuid(sets: Capabilities) -> None:
    """Set the other four sets of the calling thread. OSError (EPERM) for capabilities that it does not have."""
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
    """Return the sets of the calling thread."""
    effective, permitted, inheritable = _capget()
    bounding = ambient = 0
    for number in range(64):
        try:
            bounding |= syscalls.prctl(_PR_CAPBSET_READ, number) << number
        except OSError:
            break
        ambient |= syscalls.prctl(syscalls.PR_CAP_AMBIENT, _PR_CAP_AMBIENT_IS_SET, number) << number
    return Capabilities(bounding, effective, permitted, inheritable, ambient)


class Lowered:
    """A context in which the calling thread lacks the effective capabilities of `mask`. Other threads keep theirs."""

    __slots__ = ("_before", "_mask")

    def __init__(self, mask: int) -> None:
        self._mask = mask
        self._before = Capabilities()

    def __enter__(self) -> None:
        effective, permitted, inheritable = _capget()
        self._before = Capabilities(0, effective, permitted, inheritable)
        _capset(Capabilities(0, effective & ~self._mask, permitted, inheritable))

    def __exit__(self, *_: object) -> None:
        _capset(self._before)


# -- capget(2) and capset(2): version 3 has two records of three 32-bit words, low halves first -------------------

_HEADER = struct.pack("Ii", 0x20080522, 0)
_DATA = struct.Struct("6I")
libc.buffer(_DATA.size)  # its type is made now, and not by each child


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
