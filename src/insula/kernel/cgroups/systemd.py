"""Control groups created through systemd, on hosts where it manages the tree: `insula-oci --systemd-cgroup`.

A tree has one writer (cgroup-v2.rst, "Delegation"; systemd's CGROUP_DELEGATION). If that is systemd, other programs ask
it for a *scope*: a unit for processes that systemd did not start itself. The OCI engines name it in
`linux.cgroupsPath` as ``slice:prefix:name``. That is the unit ``prefix-name.scope`` in the slice; for the slice
``a-b.slice`` its directory is ``a.slice/a-b.slice/prefix-name.scope``. With Delegate=yes the files of the scope and its
subgroups belong to the runtime.

A scope starts with a process and ends with its last one. So a helper process keeps it open until the container has
joined, like any other group, through the descriptors of `Cgroup.open`:

    scope = Scope.parse("system.slice:insula:c1", "c1")
    with scope.held(resources):
        group = Cgroup(scope.path)
        group.limit(resources)
        … start the container, which joins …
    scope.stop()

Limits are also set as properties of the unit, or systemd would reset them at the next daemon-reload. It is called with
busctl(1), which needs no D-Bus library; org.freedesktop.systemd1(5) describes the methods.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import contextmanager, suppress

from insula.kernel import syscalls
from insula.kernel.cgroups.hierarchy import of_process
from insula.kernel.cgroups.resources_v2 import PERIOD, weight_of_shares
from insula.model.errors import Failed, Invalid, Unavailable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from insula.kernel.cgroups.settings import Resources

    Property = tuple[str, str, Sequence[str]]  # name, D-Bus type, words of its value

_MANAGER = ("org.freedesktop.systemd1", "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager")
_NO_LIMIT = (1 << 64) - 1
_TIMEOUT = 30.0
_SECOND = 1_000_000


class Scope:
    """A transient scope unit; `path` is the path of its group for `Cgroup`."""

    def __init__(self, slice_: str, unit: str) -> None:
        self.slice = slice_
        self.unit = unit
        self.path = f"{_directory(slice_)}{unit}"

    @classmethod
    def parse(cls, cgroups_path: str | None, container: str) -> Scope:
        """Parse `linux.cgroupsPath`; the default is the scope ``insula-oci-CONTAINER`` in ``system.slice``. Invalid."""
        parts = (cgroups_path or f":insula-oci:{container}").split(":")
        if len(parts) != 3 or not parts[2]:
            raise Invalid(
                f"linux.cgroupsPath: {cgroups_path!r} is not slice:prefix:name",
                "name a slice and a scope, as in system.slice:insula:web",
            )
        slice_, prefix, name = parts
        unit = name if name.endswith((".slice", ".scope")) else f"{prefix}-{name}.scope" if prefix else f"{name}.scope"
        slice_ = slice_ or "system.slice"
        for word in (slice_, unit):
            if not set(word) <= _ALLOWED or ".." in word or len(word) > 255:
                raise Invalid(f"linux.cgroupsPath: {word!r} is not a name for a unit", "use letters, digits and :-_.\\")
        if unit.endswith(".slice") or not slice_.endswith(".slice") or not _parts(slice_):
            raise Invalid(
                f"linux.cgroupsPath: a scope {unit} cannot be in {slice_}", "name a slice, as in system.slice"
            )
        return cls(slice_, unit)

    @contextmanager
    def held(self, resources: Resources) -> Iterator[None]:
        """Start the scope, and keep it while the block runs; if the block raises, stop it. Failed, Unavailable."""
        holder = os.fork()
        if holder == 0:
            try:
                syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
                while True:
                    signal.pause()
            finally:
                os._exit(0)
        try:
            self.start(holder, resources)
            yield
        except BaseException:
            with suppress(Failed, Unavailable):
                self.stop()
            raise
        finally:
            os.kill(holder, signal.SIGKILL)
            os.waitpid(holder, 0)

    def start(self, pid: int, resources: Resources) -> None:
        """Start the scope with a process in it, and return when the process is in the group. Failed, Unavailable."""
        if not os.path.isdir("/run/systemd/system"):
            raise Unavailable("--systemd-cgroup: systemd does not run on this host", "omit this option")
        properties = [*_fixed(self.slice, pid), *properties_of(resources)]
        job = _call("StartTransientUnit", "ssa(sv)a(sa(sv))", self.unit, "fail", *_array(properties), "0").split('"')[1]
        deadline = time.monotonic() + _TIMEOUT
        while of_process(pid) != self.path:
            # a job disappears when it is finished, with or without success
            if not _exists(job) and of_process(pid) != self.path:
                raise Failed(f"systemd did not start {self.unit}", f"see `journalctl -u {self.unit}`")
            if time.monotonic() > deadline:
                raise Failed(f"systemd did not start {self.unit} in {_TIMEOUT:g} s", "see `systemctl list-jobs`")
            time.sleep(0.005)

    def update(self, resources: Resources) -> None:
        """Set the unit's properties to changed limits; `Cgroup.update` applies them. Failed."""
        if found := properties_of(resources):
            _call("SetUnitProperties", "sba(sv)", self.unit, "true", *_array(found))

    def stop(self) -> None:
        """Stop the scope and all processes in it; no error if there is none. Failed."""
        try:
            _call("StopUnit", "ss", self.unit, "replace")
        except Failed as error:
            if "not loaded" not in error.message:
                raise
        _forget(self.unit)


def properties_of(resources: Resources) -> list[Property]:
    """Convert the limits for which systemd has properties (systemd.resource-control(5))."""
    memory, cpu = resources.get("memory") or {}, resources.get("cpu") or {}
    limit, swap = memory.get("limit") or 0, memory.get("swap") or 0
    found: list[Property] = []
    if limit:
        found.append(_number("MemoryMax", limit))
    if reservation := memory.get("reservation"):
        found.append(_number("MemoryLow", reservation))
    if swap and (swap < 0 or 0 < limit <= swap):
        found.append(_number("MemorySwapMax", swap - limit if swap > 0 else swap))
    if shares := cpu.get("shares"):
        found.append(_number("CPUWeight", weight_of_shares(shares)))
    if quota := cpu.get("quota"):
        period = cpu.get("period") or PERIOD
        # systemd has a resolution of 1 % of a processor; rounded up, because cpu.max may not exceed it
        rate = -(-quota * _SECOND // (period * 10_000)) * 10_000 if quota > 0 else -1
        found += [_number("CPUQuotaPeriodUSec", period), _number("CPUQuotaPerSecUSec", rate)]
    for key, name in (("cpus", "AllowedCPUs"), ("mems", "AllowedMemoryNodes")):
        if cpu.get(key):
            found.append((name, "ay", _bitmap(cpu[key])))
    if tasks := (resources.get("pids") or {}).get("limit"):
        found.append(_number("TasksMax", tasks))
    return found


def _fixed(slice_: str, pid: int) -> list[Property]:
    switches = ("Delegate", "CPUAccounting", "MemoryAccounting", "IOAccounting", "TasksAccounting")
    return [
        ("Description", "s", ["Insula container"]),
        ("Slice", "s", [slice_]),
        ("PIDs", "au", ["1", str(pid)]),
        ("DefaultDependencies", "b", ["false"]),
        ("CollectMode", "s", ["inactive-or-failed"]),
        *((name, "b", ["true"]) for name in switches),
    ]


def _number(name: str, value: int) -> Property:
    return name, "t", [str(value if value >= 0 else _NO_LIMIT)]


def _bitmap(ranges: str) -> list[str]:
    """Convert ranges such as ``0-2,7`` to a bitmap, lowest bits first, as busctl's words: its length, and the bytes."""
    bits = 0
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        for number in range(int(first), int(last or first) + 1):
            bits |= 1 << number
    data = bits.to_bytes((bits.bit_length() + 7) // 8, "little")
    return [str(len(data)), *map(str, data)]


def _array(properties: Sequence[Property]) -> list[str]:
    """Convert properties to a(sv) for busctl(1): their number, and each one's name, type and value."""
    return [str(len(properties)), *(word for name, kind, value in properties for word in (name, kind, *value))]


# -- names of units -------------------------------------------------------------------------------------------------

_ALLOWED = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789:-_.\\@")


def _parts(slice_: str) -> list[str]:
    """Split a slice's name into its parts, none if it is malformed; ``-.slice`` is the root."""
    words = slice_.removesuffix(".slice").split("-")
    return words if all(words) else ["-"] if slice_ == "-.slice" else []


def _directory(slice_: str) -> str:
    """Return the directory of a slice; ``a-b.slice`` is in ``a.slice`` (systemd.slice(5))."""
    words = _parts(slice_)
    if words == ["-"]:
        return ""
    return "".join(f"{'-'.join(words[: count + 1])}.slice/" for count in range(len(words)))


# -- the bus --------------------------------------------------------------------------------------------------------


def _call(method: str, signature: str, *arguments: str) -> str:
    """Call a method of the manager, and return its reply."""
    return _busctl("call", *_MANAGER, method, signature, *arguments)


def _forget(unit: str) -> None:
    """Reset a failed scope: it stays loaded until then, and another of its name can't be started."""
    try:
        _call("ResetFailedUnit", "s", unit)
    except Failed:
        return  # there is none any more, which is the usual case


def _exists(job: str) -> bool:
    try:
        _busctl("get-property", _MANAGER[0], job, "org.freedesktop.systemd1.Job", "State")
    except Failed:
        return False
    return True


def _busctl(*arguments: str) -> str:
    import subprocess

    command = ("busctl", "--system", f"--timeout={_TIMEOUT:g}", *arguments)
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise Unavailable("busctl, which talks to systemd, is not installed", "apt-get install systemd") from None
    if done.returncode:
        said = (done.stderr.strip() or "no reason given").splitlines()[-1]
        raise Failed(f"systemd refuses: {said.removeprefix('Call failed: ')}", "see `systemctl status` and the journal")
    return done.stdout
