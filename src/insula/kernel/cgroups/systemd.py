"""A control group from systemd, on hosts where it keeps the tree: `insula-oci --systemd-cgroup`.

A tree has one writer (cgroup-v2.rst, "Delegation"; systemd's CGROUP_DELEGATION). Where that is systemd, others ask it
for a *scope*: a unit that groups processes which it did not start itself. The OCI engines name it in
`linux.cgroupsPath` as ``slice:prefix:name``, which is the unit ``prefix-name.scope`` in that slice, and the directory
``a.slice/a-b.slice/prefix-name.scope`` for the slice ``a-b.slice``. With Delegate=yes what is below, and the files of
the scope itself, are the runtime's.

A scope begins with a process and ends with the last one. So a process of its own holds it open until the container
has joined, like any other group, by the descriptors of `Cgroup.open`:

    scope = Scope.parse("system.slice:insula:c1", "c1")
    with scope.held(resources):
        group = Cgroup(scope.path)
        group.limit(resources)
        … start the container, which joins …
    scope.stop()

Limits are told to systemd too, which would set its own again at the next daemon-reload. It is spoken to by busctl(1):
org.freedesktop.systemd1(5) without a D-Bus library.
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
    """A transient scope unit; `path` is that of its group for `Cgroup`."""

    def __init__(self, slice_: str, unit: str) -> None:
        self.slice = slice_
        self.unit = unit
        self.path = f"{_directory(slice_)}{unit}"

    @classmethod
    def parse(cls, cgroups_path: str | None, container: str) -> Scope:
        """From `linux.cgroupsPath`; without one the scope ``insula-oci-CONTAINER`` in ``system.slice``. Invalid."""
        parts = (cgroups_path or f":insula-oci:{container}").split(":")
        if len(parts) != 3 or not parts[2]:
            raise Invalid(
                f"linux.cgroupsPath: {cgroups_path!r} is not slice:prefix:name",
                "that is how systemd's groups are named",
            )
        slice_, prefix, name = parts
        unit = name if name.endswith((".slice", ".scope")) else f"{prefix}-{name}.scope" if prefix else f"{name}.scope"
        slice_ = slice_ or "system.slice"
        for word in (slice_, unit):
            if not set(word) <= _ALLOWED or ".." in word or len(word) > 255:
                raise Invalid(
                    f"linux.cgroupsPath: {word!r} is no name of a unit", "letters, digits and :-_.\\ make one"
                )
        if unit.endswith(".slice") or not slice_.endswith(".slice") or not _parts(slice_):
            raise Invalid(f"linux.cgroupsPath: no scope {unit} can be in {slice_}", "name a slice, as in system.slice")
        return cls(slice_, unit)

    @contextmanager
    def held(self, resources: Resources) -> Iterator[None]:
        """Start the scope, and keep it while the body runs. Failed, Unavailable; if the body raises, it is stopped."""
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
        """Start the scope with a process in it, and return when that is in the group. Failed, Unavailable."""
        if not os.path.isdir("/run/systemd/system"):
            raise Unavailable("--systemd-cgroup: systemd does not run this host", "leave it away")
        properties = [*_fixed(self.slice, pid), *properties_of(resources)]
        job = _call("StartTransientUnit", "ssa(sv)a(sa(sv))", self.unit, "fail", *_array(properties), "0").split('"')[1]
        deadline = time.monotonic() + _TIMEOUT
        while of_process(pid) != self.path:
            # a job is gone when it is done, whether well or not
            if not _exists(job) and of_process(pid) != self.path:
                raise Failed(f"systemd did not start {self.unit}", f"see `journalctl -u {self.unit}`")
            if time.monotonic() > deadline:
                raise Failed(f"systemd does not start {self.unit} in {_TIMEOUT:g} s", "see `systemctl list-jobs`")
            time.sleep(0.005)

    def update(self, resources: Resources) -> None:
        """Tell systemd about changed limits; `Cgroup.update` is what makes them hold. Failed."""
        if found := properties_of(resources):
            _call("SetUnitProperties", "sba(sv)", self.unit, "true", *_array(found))

    def stop(self) -> None:
        """End the scope and all processes in it; nothing happens if there is none. Failed."""
        try:
            _call("StopUnit", "ss", self.unit, "replace")
        except Failed as error:
            if "not loaded" not in error.message:
                raise
        _forget(self.unit)


def properties_of(resources: Resources) -> list[Property]:
    """What of the limits systemd has a property for (systemd.resource-control(5)); the rest is the group's alone."""
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
        # systemd counts in hundredths of a processor: upwards, for cpu.max may not exceed what it says
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
    """A list of ranges such as ``0-2,7`` as an array of bytes, lowest bits first: its length, and the bytes."""
    bits = 0
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        for number in range(int(first), int(last or first) + 1):
            bits |= 1 << number
    data = bits.to_bytes((bits.bit_length() + 7) // 8, "little")
    return [str(len(data)), *map(str, data)]


def _array(properties: Sequence[Property]) -> list[str]:
    """a(sv) as busctl(1) takes it: how many, and each with its name, type and value."""
    return [str(len(properties)), *(word for name, kind, value in properties for word in (name, kind, *value))]


# -- names of units -------------------------------------------------------------------------------------------------

_ALLOWED = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789:-_.\\@")


def _parts(slice_: str) -> list[str]:
    """The words of a slice's name, none if it is not one; ``-.slice`` is the root."""
    words = slice_.removesuffix(".slice").split("-")
    return words if all(words) else ["-"] if slice_ == "-.slice" else []


def _directory(slice_: str) -> str:
    """``a-b.slice`` is inside of ``a.slice`` (systemd.slice(5))."""
    words = _parts(slice_)
    if words == ["-"]:
        return ""
    return "".join(f"{'-'.join(words[: count + 1])}.slice/" for count in range(len(words)))


# -- the bus --------------------------------------------------------------------------------------------------------


def _call(method: str, signature: str, *arguments: str) -> str:
    """Call a method of the manager, and give what it answers."""
    return _busctl("call", *_MANAGER, method, signature, *arguments)


def _forget(unit: str) -> None:
    """A failed scope stays in systemd's list, and in the way of another of its name, until it is forgotten."""
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
        raise Unavailable("busctl is not installed, by which systemd is asked", "apt-get install systemd") from None
    if done.returncode:
        said = (done.stderr.strip() or "no reason given").splitlines()[-1]
        raise Failed(f"systemd refuses: {said.removeprefix('Call failed: ')}", "see `systemctl status` and the journal")
    return done.stdout
