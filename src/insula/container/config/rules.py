"""The rules between the fields of a config, the second step of its check: one function for each rule.

Each takes values that have the right shape already, and raises `Wrong` with the place of the field. Where the spec is
silent, the rule is what runc does; where a config would touch what is the host's, it is refused.
"""

from __future__ import annotations

import os

from insula.container.config import schema
from insula.container.config.shape import HINT, Wrong, quoted

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

    Object = dict[str, Any]
    Warn = Callable[[str], None]


def check(config: Object, bundle: str, warn: Warn) -> None:
    """All rules of a config, from the outside inward."""
    linux = config["linux"]
    root(config["root"], bundle)
    namespaces = {entry["type"]: entry.get("path") for entry in linux.get("namespaces", ())}
    namespace_types(linux.get("namespaces", ()), namespaces)
    mappings(linux, namespaces)
    host_names(config, namespaces)
    time_offsets(linux.get("timeOffsets", {}), namespaces)
    sysctls(linux.get("sysctl", {}), namespaces)
    for name in ("kernel.domainname", "kernel/domainname"):
        if config.get("domainname") and linux.get("sysctl", {}).get(name, config["domainname"]) != config["domainname"]:
            raise Wrong("is not what domainname says", "leave one out", "linux", "sysctl", name)
    check_process(config["process"], config, warn, "process")
    for index, mount in enumerate(config.get("mounts", ())):
        mounts(mount, namespaces, ("mounts", index))
    for index, device in enumerate(linux.get("devices", ())):
        devices(device, ("linux", "devices", index))
    if "resources" in linux:
        check_resources(linux["resources"], "linux", "resources")
    if "seccomp" in linux:
        seccomp(linux["seccomp"], ("linux", "seccomp"))
    if linux.get("personality", {}).get("flags"):
        raise Wrong("there are no flags", "the spec defines none so far", "linux", "personality", "flags")
    if linux.get("mountLabel"):
        selinux("linux", "mountLabel")
    memory_policy(linux.get("memoryPolicy", {}))
    net_devices(linux.get("netDevices", {}), namespaces)
    refused(config, linux)


def check_process(process: Object, config: Object, warn: Warn, *place: str | int) -> None:
    """The rules of a process: the container's first, or one that joins."""
    if not process["args"] or not process["args"][0]:
        raise Wrong("there is no program to execute", "name it as the first of args", *place, "args")
    capabilities(process.get("capabilities", {}), warn, (*place, "capabilities"))
    user(process.get("user", {}), config["linux"], (*place, "user"))
    once([entry["type"] for entry in process.get("rlimits", ())], (*place, "rlimits"))
    for index, entry in enumerate(process.get("rlimits", ())):
        if entry["soft"] > entry["hard"]:
            raise Wrong(f"{entry['soft']} is above hard", "getrlimit(2)", *place, "rlimits", index, "soft")
    if "scheduler" in process:
        scheduler(process["scheduler"], (*place, "scheduler"))
    profile = process.get("apparmorProfile")
    if profile and profile != "unconfined" and _read("/sys/module/apparmor/parameters/enabled") != "Y":
        raise Wrong("this kernel has no AppArmor", "leave it out", *place, "apparmorProfile")
    if process.get("selinuxLabel"):
        selinux(*place, "selinuxLabel")


def check_resources(resources: Object, *place: str | int) -> None:
    """The rules of limits."""
    memory, cpu = resources.get("memory", {}), resources.get("cpu", {})
    swap, limit = memory.get("swap") or 0, memory.get("limit") or 0
    if swap > 0 and (limit <= 0 or swap < limit):
        complaint = f"{swap} is below limit" if limit > 0 else "there is no limit"
        raise Wrong(complaint, "swap is a limit of memory and swap together", *place, "memory", "swap")
    quota, burst = cpu.get("quota") or 0, cpu.get("burst") or 0
    if 0 < quota < burst:
        raise Wrong(f"{burst} is above quota", HINT, *place, "cpu", "burst")
    if 0 < quota < 1000:
        raise Wrong(f"{quota} is below 1000 microseconds", "the kernel takes no less", *place, "cpu", "quota")
    if cpu.get("period") and not 1000 <= cpu["period"] <= 1_000_000:
        raise Wrong(f"{cpu['period']} is not from 1000 to 1000000", "in microseconds", *place, "cpu", "period")
    for index, rule in enumerate(resources.get("devices", ())):
        if rule.get("type", "a") == "a" and max(rule.get("major", -1), rule.get("minor", -1)) >= 0:
            hint = "say c or b, or leave the numbers out"
            raise Wrong("means all devices, but there are numbers", hint, *place, "devices", index, "type")
    for index, entry in enumerate(resources.get("blockIO", {}).get("weightDevice", ())):
        if "weight" not in entry and "leafWeight" not in entry:
            raise Wrong("has neither weight nor leafWeight", HINT, *place, "blockIO", "weightDevice", index)
    once([entry["pageSize"] for entry in resources.get("hugepageLimits", ())], (*place, "hugepageLimits"))
    for name, entry in resources.get("rdma", {}).items():
        if not entry.keys() & {"hcaHandles", "hcaObjects"}:
            raise Wrong("has neither hcaHandles nor hcaObjects", HINT, *place, "rdma", name)
    for name in resources.get("unified", {}):
        if complaint := schema.cgroup_file(name):
            raise Wrong(complaint, "as in memory.high", *place, "unified", name)
        if name.startswith("cgroup."):
            raise Wrong("is no controller's file, but the group's own", HINT, *place, "unified", name)


# -- root, names, namespaces -------------------------------------------------------------------------------------------


def root(entry: Object, bundle: str) -> None:
    """The spec: a directory MUST exist at root.path, absolute or relative to the bundle."""
    path = os.path.join(bundle, entry["path"])
    if bundle and not os.path.isdir(path):
        raise Wrong(f"there is no directory {quoted(path)}", "relative paths begin at the bundle", "root", "path")


def namespace_types(entries: Iterable[Object], namespaces: Object) -> None:
    once([entry["type"] for entry in entries], ("linux", "namespaces"), "type")
    if "mount" not in namespaces or (namespaces["mount"] and _is_ours("mount", namespaces["mount"])):
        hint = 'add {"type": "mount"}'
        raise Wrong("the mount namespace would be the host's, and so the mounts", hint, "linux", "namespaces")
    if namespaces["mount"]:  # what is mounted there, as a /proc without masks, would be within the container's reach
        complaint = "a container can't join a mount namespace: only in its own it sees nothing but its root"
        raise Wrong(complaint, "leave the path out", "linux", "namespaces")


def mappings(linux: Object, namespaces: Object) -> None:
    """user_namespaces(7): a new one has both maps, or none; at most 340 lines each, in which nothing overlaps."""
    mapped = [name for name in ("uidMappings", "gidMappings") if linux.get(name)]
    for name in ("uidMappings", "gidMappings"):
        entries = linux.get(name, ())
        if entries and "user" not in namespaces:
            raise Wrong("there is no user namespace to map", 'add {"type": "user"} to namespaces', "linux", name)
        if not entries and mapped and not namespaces["user"]:
            raise Wrong(f"is missing beside {mapped[0]}", "leave out both to map every ID to itself", "linux", name)
        ranges(entries, ("linux", name))


def ranges(entries: list[Object], place: tuple[str | int, ...]) -> None:
    if len(entries) > 340:
        raise Wrong(f"{len(entries)} entries are too many", "the kernel takes 340", *place)
    for side in ("containerID", "hostID"):
        end = 0
        for first, size in sorted((entry[side], entry["size"]) for entry in entries):
            if first + size > 1 << 32:
                raise Wrong(f"{side} {first} with size {size} goes beyond 32 bits", HINT, *place)
            if first < end:
                raise Wrong(f"{side} {first} is in two ranges", "ranges may not overlap", *place)
            end = first + size


def host_names(config: Object, namespaces: Object) -> None:
    for name in ("hostname", "domainname"):
        if config.get(name) and "uts" not in namespaces:
            raise Wrong("there is no UTS namespace: it would be the host's", "add uts to linux.namespaces", name)


def time_offsets(offsets: Object, namespaces: Object) -> None:
    """time_namespaces(7): offsets can be set while the namespace has no process yet."""
    if offsets and ("time" not in namespaces or namespaces["time"]):
        raise Wrong("there is no new time namespace", "add time to linux.namespaces", "linux", "timeOffsets")
    for clock in offsets:
        if clock not in ("monotonic", "boottime"):
            raise Wrong("is not a clock that has an offset", "use monotonic or boottime", "linux", "timeOffsets", clock)


# -- sysctl ------------------------------------------------------------------------------------------------------------

_IPC = {"msgmax", "msgmnb", "msgmni", "sem", "shmall", "shmmax", "shmmni", "shm_rmid_forced"}
_IPC |= {"msg_next_id", "sem_next_id", "shm_next_id"}
_OF_NAMESPACE = {"net": "network", "user": "user"}


def sysctls(values: Object, namespaces: Object) -> None:
    """Allow only sysctls of the container's own namespaces: writing any other would change the host."""
    for name in values:
        place = ("linux", "sysctl", name)
        if complaint := schema.parameter(name):
            raise Wrong(complaint, "as in net.ipv4.ip_forward", *place)
        kind = namespace_of(name)
        if not kind:
            raise Wrong("is not of any namespace: it would change the host", "set it on the host", *place)
        if kind not in namespaces:
            raise Wrong(f"there is no {kind} namespace: it would change the host", HINT, *place)
        if namespaces[kind] and _is_ours(kind, namespaces[kind]):
            raise Wrong(f"the {kind} namespace is the host's", "use another namespace", *place)


def namespace_of(name: str) -> str:
    """The type of namespace that a sysctl, ``net.ipv4.ip_forward`` or ``net/ipv4/ip_forward``, is of; "" if it is the
    host's."""
    first, _, rest = name.replace("/", ".").partition(".")
    if first == "fs":
        return "ipc" if rest.startswith("mqueue.") else ""
    if first == "kernel":
        # kernel.hostname is not among them, as in runc: it is what `hostname` says
        return "ipc" if rest in _IPC else "uts" if rest == "domainname" else ""
    return _OF_NAMESPACE.get(first, "") if rest else ""


def _is_ours(kind: str, path: str) -> bool:
    name = {"network": "net", "mount": "mnt"}.get(kind, kind)
    try:
        return os.path.samestat(os.stat(path), os.stat(f"/proc/self/ns/{name}"))
    except OSError:
        return False  # the later join will report it


def net_devices(devices: Object, namespaces: Object) -> None:
    """Devices can only be moved into a network namespace that is not the host's."""
    place = ("linux", "netDevices")
    if devices and "network" not in namespaces:
        raise Wrong("there is no network namespace to move them to", "add network to linux.namespaces", *place)
    if devices and namespaces["network"] and _is_ours("network", namespaces["network"]):
        raise Wrong("the network namespace is the host's", "use another namespace", *place)
    for name, entry in devices.items():
        if complaint := schema.device_name(name) or ("%" in name and "is no template, but the name on the host"):
            raise Wrong(complaint, "as in eth0", *place, name)
        if "lo" in (name, entry.get("name")):
            at = (*place, name) if name == "lo" else (*place, name, "name")
            raise Wrong("is the loopback device, which every namespace has", "leave it out", *at)
    names = [entry.get("name") or name for name, entry in devices.items()]
    for index, name in enumerate(names):
        if "%" not in name and name in names[:index]:
            raise Wrong(f"{quoted(name)} is the name of two", "names are unique in a namespace", *place)


# -- memory ------------------------------------------------------------------------------------------------------------

_NODES = {"MPOL_DEFAULT": False, "MPOL_LOCAL": False, "MPOL_PREFERRED": None}


def memory_policy(policy: Object) -> None:
    """set_mempolicy(2): two modes take no nodes, one takes any, the others at least one."""
    place = ("linux", "memoryPolicy")
    if not policy:
        return
    mode, nodes, flags = policy["mode"], policy.get("nodes", ""), policy.get("flags", [])
    wanted = _NODES.get(mode, True)
    if wanted is not None and bool(nodes) != wanted:
        from insula.kernel.scheduling import parse_list

        count = len(parse_list(nodes)) if nodes else 0
        complaint = f"{mode} needs nodes" if wanted else f"{mode} mode requires 0 nodes but got {count}"
        raise Wrong(complaint, "set_mempolicy(2)", *place, "nodes")
    once(flags, (*place, "flags"))
    if len({"MPOL_F_RELATIVE_NODES", "MPOL_F_STATIC_NODES"}.intersection(flags)) == 2:
        raise Wrong("nodes are relative or static, not both", "leave one out", *place, "flags")


# -- the process -------------------------------------------------------------------------------------------------------


def capabilities(sets: Object, warn: Warn, place: tuple[str | int, ...]) -> None:
    """Leave out unknown capabilities with a warning, as the spec has it: a config may be newer than the kernel."""
    from insula.kernel.capabilities import NUMBERS

    for name in schema.CAPABILITY_SETS:
        unknown = [entry for entry in sets.get(name, ()) if entry not in NUMBERS]
        if unknown:
            warn(f"{'.'.join(map(str, place))}.{name}: there is no capability {quoted(unknown[0])}; it is left out")
            sets[name] = [entry for entry in sets[name] if entry in NUMBERS]


def user(entry: Object, linux: Object, place: tuple[str | int, ...]) -> None:
    """Check that the user's IDs are mapped in a new user namespace; else setuid(2) fails with EINVAL."""
    mapped = {"uid": linux.get("uidMappings"), "gid": linux.get("gidMappings")}
    wanted = [("uid", entry.get("uid", 0)), ("gid", entry.get("gid", 0))]
    for name, number in (*wanted, *(("gid", gid) for gid in entry.get("additionalGids", ()))):
        known = mapped[name]
        if known and not any(m["containerID"] <= number < m["containerID"] + m["size"] for m in known):
            raise Wrong(f"{number} is not mapped into the user namespace", f"see linux.{name}Mappings", *place, name)


def scheduler(entry: Object, place: tuple[str | int, ...]) -> None:
    """sched(7): real-time policies have priorities 1 to 99, others 0; a deadline has runtime ≤ deadline ≤ period."""
    policy, priority = entry["policy"], entry.get("priority", 0)
    if (policy in ("SCHED_FIFO", "SCHED_RR")) != (priority > 0):
        hint = "SCHED_FIFO and SCHED_RR have 1 to 99, the others 0"
        raise Wrong(f"{priority} is no priority of {policy}", hint, *place, "priority")
    if policy == "SCHED_DEADLINE":
        deadline_times(entry, place)
    elif any(entry.get(name, 0) for name in ("runtime", "deadline", "period")):
        raise Wrong(f"{policy} has no runtime, deadline and period", "SCHED_DEADLINE has", *place, "policy")


def deadline_times(entry: Object, place: tuple[str | int, ...]) -> None:
    """sched_setattr(2): 1024 ≤ runtime ≤ deadline ≤ period < 2^63, in nanoseconds; a period of 0 is the deadline."""
    runtime, deadline, period = (entry.get(name) for name in ("runtime", "deadline", "period"))

    def refuse(name: str, what: str) -> None:
        hint = "1024 ≤ runtime ≤ deadline ≤ period, in nanoseconds"
        raise Wrong(f"sched_setattr: `SCHED_DEADLINE` {what}", hint, *place, name)

    if runtime is None:
        refuse("runtime", "requires `runtime`")
    elif deadline is None:
        refuse("deadline", "requires `deadline`")
    elif not runtime:
        refuse("runtime", "runtime must be greater than 0")
    elif not 1024 <= runtime < 1 << 63:
        refuse("runtime", f"runtime {runtime} must be between 1024 and {(1 << 63) - 1}")
    elif runtime > deadline:
        refuse("runtime", f"runtime {runtime} must be <= deadline {deadline}")
    elif deadline > (period or deadline):
        refuse("deadline", f"deadline {deadline} must be <= period {period}")
    elif max(deadline, period or 0) >= 1 << 63:
        refuse("deadline", f"deadline and period must be at most {(1 << 63) - 1}")


def selinux(*place: str | int) -> None:
    if not os.path.exists("/sys/fs/selinux/enforce"):
        raise Wrong("this kernel has no SELinux", "leave it out", *place)


# -- mounts and devices ------------------------------------------------------------------------------------------------


def mounts(mount: Object, namespaces: Object, place: tuple[str | int, ...]) -> None:
    options = mount.get("options", ())
    bind = mount.get("type") == "bind" or "bind" in options or "rbind" in options
    if bind and not mount.get("source"):
        raise Wrong("is missing: a bind mount needs it", HINT, *place, "source")
    if not bind and not mount.get("type") and "remount" not in options and not set(options) & set(schema.PROPAGATIONS):
        raise Wrong("is missing: it is no bind mount", "as in tmpfs", *place, "type")
    mapped = [name for name in ("uidMappings", "gidMappings") if mount.get(name)]
    if len(mapped) == 1:
        raise Wrong(f"{mapped[0]} is alone", "uidMappings and gidMappings belong together", *place)
    for name in mapped:
        ranges(mount[name], (*place, name))
    wanted = "idmap" in options or "ridmap" in options
    if (mapped or wanted) and not bind:
        raise Wrong("only a bind mount can be idmapped", "add bind to options", *place, "type")
    if wanted and not mapped and "user" not in namespaces:
        hint = "add uidMappings and gidMappings, or a user namespace"
        raise Wrong("there is no mapping for idmap", hint, *place, "options")


def devices(device: Object, place: tuple[str | int, ...]) -> None:
    for name in ("major", "minor"):
        if device["type"] != "p" and name not in device:
            raise Wrong("is missing", HINT, *place, name)


# -- seccomp -----------------------------------------------------------------------------------------------------------


def seccomp(profile: Object, place: tuple[str | int, ...]) -> None:
    """Check that only SCMP_ACT_ERRNO and SCMP_ACT_TRACE have an errno, and that SCMP_ACT_NOTIFY has a listener."""
    _errno(profile, "defaultAction", "defaultErrnoRet", place)
    notifies = False
    for index, rule in enumerate(profile.get("syscalls", ())):
        at = (*place, "syscalls", index)
        if not rule["names"]:
            raise Wrong("names no system call", HINT, *at, "names")
        _errno(rule, "action", "errnoRet", at)
        notifies = notifies or rule["action"] == "SCMP_ACT_NOTIFY"
    if profile["defaultAction"] == "SCMP_ACT_NOTIFY":
        hint = "notify about named calls only: the listener itself is passed on by some"
        raise Wrong("may not be SCMP_ACT_NOTIFY", hint, *place, "defaultAction")
    if notifies and not profile.get("listenerPath"):
        raise Wrong("is missing: SCMP_ACT_NOTIFY needs it", HINT, *place, "listenerPath")
    if profile.get("listenerMetadata") and not profile.get("listenerPath"):
        raise Wrong("there is no listenerPath", HINT, *place, "listenerMetadata")


def _errno(rule: Object, action: str, errno: str, place: tuple[str | int, ...]) -> None:
    limit = {"SCMP_ACT_ERRNO": 4095, "SCMP_ACT_TRACE": 0xFFFF}.get(rule[action])
    if errno in rule and (limit is None or rule[errno] > limit):
        complaint = f"{rule[action]} has no errno" if limit is None else f"{rule[errno]} is above {limit}"
        raise Wrong(complaint, "SCMP_ACT_ERRNO and SCMP_ACT_TRACE have", *place, errno)


# -- what this runtime does not do -------------------------------------------------------------------------------------

_REFUSED = {
    "intelRdt": "Intel RDT is not supported",
}


def refused(config: Object, linux: Object) -> None:
    """Refuse fields that this runtime doesn't carry out, rather than ignoring them."""
    if "vm" in config:
        raise Wrong("virtual machines are not supported", "leave it out: a container shares the kernel", "vm")
    for name, complaint in _REFUSED.items():
        if name in linux:
            raise Wrong(complaint, "leave it out", "linux", name)


def once(values: list[str], place: tuple[str | int, ...], field: str = "type") -> None:
    """Raise Wrong at the first value that occurs twice."""
    seen: set[str] = set()
    for index, value in enumerate(values):
        if value in seen:
            name = "pageSize" if place[-1] == "hugepageLimits" else field
            raise Wrong(f"{quoted(value)} is there twice", "leave one out", *place, index, name)
        seen.add(value)


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return ""
