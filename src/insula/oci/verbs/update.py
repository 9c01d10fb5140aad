"""``update ID``: change the limits of a container, from options or from a file of `linux.resources`.

Limits that are not named stay. The new ones are checked together with those that stay. If the kernel refuses one, those
written before it are put back; else they become part of the container's config, which the next update starts from.
"""

from __future__ import annotations

import sys

from insula.container.config import check_resources, no_more_processes, since
from insula.model.cpython import loads
from insula.model.errors import Conflict, Failed, InsulaError, Invalid
from insula.oci.state import Container
from insula.oci.verbs.pause import group_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from insula.oci.options import VerbArguments

    Object = dict[str, Any]

_OPTIONS = (
    # option, section and key of linux.resources
    ("memory", "memory", "limit"),
    ("memory_reservation", "memory", "reservation"),
    ("memory_swap", "memory", "swap"),
    ("cpu_share", "cpu", "shares"),
    ("cpu_quota", "cpu", "quota"),
    ("cpu_period", "cpu", "period"),
    ("cpu_burst", "cpu", "burst"),
    ("cpu_idle", "cpu", "idle"),
    ("cpu_rt_period", "cpu", "realtimePeriod"),
    ("cpu_rt_runtime", "cpu", "realtimeRuntime"),
    ("cpuset_cpus", "cpu", "cpus"),
    ("cpuset_mems", "cpu", "mems"),
    ("blkio_weight", "blockIO", "weight"),
    ("pids_limit", "pids", "limit"),
)


def run(arguments: VerbArguments) -> int:
    container = Container(arguments.root, arguments.id)
    given = _from_file(arguments.resources) if arguments.resources else _from_options(arguments)
    wanted = check_resources(given, alone=False)
    with container:
        record = container.load()
        if container.status(record) in ("stopped", "creating"):
            raise Conflict(f"container not running: {container.id}", "only a running container can be updated")
        config = container.config()
        if arguments.pids_limit == 0 or since(config, 3):
            no_more_processes(wanted)
        wanted = without_zeros(wanted)
        linux = config.setdefault("linux", {})
        before = linux.get("resources", {})
        lift_swap(before.get("memory", {}), wanted.get("memory", {}))
        linux["resources"] = merged = check_resources(merge(before, wanted))
        # whole sections: swap can't be set without knowing the limit of memory, nor a quota without its period
        changed = {section: merged[section] for section in wanted}
        group_of(record).update(changed)
        if record["scope"]:
            try:
                _tell_systemd(linux, container.id, changed)
            except InsulaError:
                group_of(record).update({section: before[section] for section in wanted if section in before})
                raise
        container.save_config(config)
    return 0


def _tell_systemd(linux: Object, container: str, changed: Object) -> None:
    """Change the limits of the scope: else systemd's next daemon-reload would restore the old ones."""
    from insula.kernel.cgroups.systemd import Scope

    Scope.parse(linux.get("cgroupsPath"), container).update(changed)


def lift_swap(now: Object, wanted: Object) -> None:
    """Lift the limit of memory and swap where that of memory is lifted, as runc does."""
    if wanted.get("limit") == -1 and "swap" not in wanted and now.get("swap", 0) > 0:
        wanted["swap"] = -1


def without_zeros(wanted: Object) -> Object:
    """`wanted` without 0 and empty values where engines send them for "unchanged"."""
    for section in ("memory", "cpu", "blockIO", "pids"):
        for key in [key for key, value in wanted.get(section, {}).items() if value in (0, "", []) and _unset(key)]:
            del wanted[section][key]
    return {section: value for section, value in wanted.items() if value}


def _unset(key: str) -> bool:
    """Whether 0 means "unchanged" for `key`. It is a value of flags, because False equals 0."""
    return key not in ("swappiness", "disableOOMKiller", "useHierarchy", "checkBeforeUpdate", "burst", "idle")


def merge(now: Object, wanted: Object) -> Object:
    """The limits `now` with those of `wanted`. Objects are merged, arrays replaced."""
    return {
        **now,
        **{
            section: {**now.get(section, {}), **value} if isinstance(value, dict) else value
            for section, value in wanted.items()
        },
    }


def _from_file(path: str) -> object:
    try:
        if path == "-":
            return loads(sys.stdin.buffer.read())
        with open(path, "rb") as file:
            return loads(file.read())
    except ValueError as error:
        raise Invalid(f"--resources {path[:60]!r} is no JSON: {error}", "it is a linux.resources object") from None
    except OSError as error:
        raise Failed(f"--resources {path[:60]!r} can't be read: {error.strerror}", "check the path") from None


def _from_options(arguments: VerbArguments) -> Object:
    wanted: Object = {}
    for option, section, key in _OPTIONS:
        value = getattr(arguments, option)
        if value is not None:
            wanted.setdefault(section, {})[key] = value
    if not wanted:
        raise Invalid("there is nothing to update", "name a limit, or a file with --resources")
    return wanted
