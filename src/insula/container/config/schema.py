"""The Linux config of the OCI runtime-spec 1.3 as a table (config.md, config-linux.md), read by `config.shape`.

How to read it, field by field as in the spec:

    {"name": …, "name!": …}   an object; ! marks what is required; names that are not in it are ignored, as in the spec
    {str: …}                  an object with keys of the user's choice
    […]                       an array
    range(…)                  a whole number within it
    ("A", "B")                one of these words
    bool, str                 true or false; text without NUL, in UTF-8
    a function                text that it returns no complaint about

A field that is null is a field that is not there. What one field says about another is in `config.rules`.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    Text = Callable[[str], str]
    Kind = type[bool] | type[str] | range | tuple[str, ...] | list["Kind"] | dict[str | type[str], "Kind"] | Text


# -- texts that are more than texts: each function returns what is wrong, or "" ----------------------------------------


def absolute(text: str) -> str:
    return "" if text.startswith("/") else "is not an absolute path"


def absolute_or_empty(text: str) -> str:
    return absolute(text) if text else ""


def not_empty(text: str) -> str:
    return "" if text else "is empty"


def variable(text: str) -> str:
    return "has no name before its =" if not text or text.startswith("=") else ""


def host_name(text: str) -> str:
    return "" if len(text.encode()) <= 64 else "is longer than 64 bytes"


def version(text: str) -> str:
    parts = text.split("-")[0].split("+")[0].split(".")
    if len(parts) != 3 or not all(part.isascii() and part.isdigit() for part in parts):
        return "is not a version as in 1.2.0"
    return "" if parts[0] == "1" else "is not version 1 of the runtime-spec"


def number_list(text: str) -> str:
    """Check a list of numbers as in ``0-3,7`` (cpuset(7), list format); empty means unset."""
    for part in text.split(",") if text else ():
        first, dash, last = part.strip().partition("-")
        numbers = [first, last] if dash else [first]
        if not all(n.isascii() and n.isdecimal() and len(n) <= 5 for n in numbers) or int(first) > int(numbers[-1]):
            return "is not a list as in 0-3,7"
    return ""


def page_size(text: str) -> str:
    digits = text[:-2]
    good = text[-2:] in ("KB", "MB", "GB") and digits.isascii() and digits.isdigit() and not digits.startswith("0")
    return "" if good else "is not a page size as in 64KB, 2MB or 1GB"


def device_access(text: str) -> str:
    return "" if set(text) <= set("rwm") else "is not made of r, w and m"


def parameter(text: str) -> str:
    """Check the name of a sysctl: with dots, or with slashes."""
    bad = "/" in (text[:1], text[-1:]) or any(part in ("", "..") for part in text.replace(".", "/").split("/"))
    return "is not the name of a sysctl" if bad or not text.isprintable() else ""


def device_name(text: str) -> str:
    """Check the name of a network interface as dev_valid_name() of Linux does; it may have one ``%d``, for a number."""
    bad = text in ("", ".", "..") or len(text.encode()) > 15 or any(c in "/:" or c.isspace() for c in text)
    bad = bad or (text.count("%") > 0 and (text.count("%") > 1 or "%d" not in text))
    return "is not the name of a network device" if bad else ""


def cgroup_file(text: str) -> str:
    return "" if "." in text[1:] and "/" not in text else "is not a file of a control group, as in memory.high"


def cgroup_path(text: str) -> str:
    return "may not lead upward by .." if ".." in text.split("/") else ""


# -- numbers -----------------------------------------------------------------------------------------------------------

UINT16 = range(1 << 16)
UINT32 = range(1 << 32)
UINT64 = range(1 << 64)
INT64 = range(-(1 << 63), 1 << 63)
LIMIT = range(-1, 1 << 63)  # -1 is "no limit"
ID = range((1 << 32) - 1)  # 4294967295 is (uid_t) -1, "no user"
MAJOR, MINOR = range(1 << 12), range(1 << 20)  # makedev(3), as the kernel has it

# -- config.md ---------------------------------------------------------------------------------------------------------

RLIMITS = tuple(
    f"RLIMIT_{name}"
    for name in (
        "AS CORE CPU DATA FSIZE LOCKS MEMLOCK MSGQUEUE NICE NOFILE NPROC RSS RTPRIO RTTIME SIGPENDING STACK".split()  # noqa: SIM905
    )
)
SCHEDULERS = ("SCHED_OTHER", "SCHED_FIFO", "SCHED_RR", "SCHED_BATCH", "SCHED_IDLE", "SCHED_DEADLINE")
SCHEDULER_FLAGS = (
    "SCHED_FLAG_RESET_ON_FORK",
    "SCHED_FLAG_RECLAIM",
    "SCHED_FLAG_DL_OVERRUN",
    "SCHED_FLAG_KEEP_POLICY",
    "SCHED_FLAG_KEEP_PARAMS",
    "SCHED_FLAG_UTIL_CLAMP_MIN",
    "SCHED_FLAG_UTIL_CLAMP_MAX",
)
CAPABILITY_SETS = ("bounding", "effective", "permitted", "inheritable", "ambient")

PROCESS: Kind = {
    "terminal": bool,
    "consoleSize": {"height!": UINT16, "width!": UINT16},
    "user": {"uid": ID, "gid": ID, "umask": range(0o1000), "additionalGids": [ID]},
    "args!": [str],
    "env": [variable],
    "cwd!": absolute,
    "capabilities": {name: [str] for name in CAPABILITY_SETS},
    "rlimits": [{"type!": RLIMITS, "soft!": UINT64, "hard!": UINT64}],
    "noNewPrivileges": bool,
    "apparmorProfile": str,
    "selinuxLabel": str,
    "oomScoreAdj": range(-1000, 1001),
    "scheduler": {
        "policy!": SCHEDULERS,
        "nice": range(-20, 20),
        "priority": range(100),
        "flags": [SCHEDULER_FLAGS],
        "runtime": UINT64,
        "deadline": UINT64,
        "period": UINT64,
    },
    "ioPriority": {
        "class!": ("IOPRIO_CLASS_RT", "IOPRIO_CLASS_BE", "IOPRIO_CLASS_IDLE"),
        "priority": range(8),  # the class of idle ones has none
    },
    "execCPUAffinity": {"initial": number_list, "final": number_list},
}

MAPPINGS: Kind = [{"containerID!": UINT32, "hostID!": UINT32, "size!": range(1, 1 << 32)}]
MOUNT: Kind = {
    "destination!": not_empty,
    "type": str,
    "source": str,
    "options": [str],
    "uidMappings": MAPPINGS,
    "gidMappings": MAPPINGS,
}
HOOK: Kind = {"path!": absolute, "args": [str], "env": [variable], "timeout": range(1, 1 << 31)}
HOOKS = ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")

# -- config-linux.md ---------------------------------------------------------------------------------------------------

NAMESPACES = ("pid", "network", "mount", "ipc", "uts", "user", "cgroup", "time")
PROPAGATIONS = ("private", "slave", "shared", "unbindable", "rprivate", "rslave", "rshared", "runbindable")
DEVICE: Kind = {
    "type!": ("c", "b", "u", "p"),
    "path!": absolute,
    "major": MAJOR,
    "minor": MINOR,
    "fileMode": UINT32,
    "uid": ID,
    "gid": ID,
}

RATES: Kind = [{"major!": MAJOR, "minor!": MINOR, "rate!": UINT64}]
RESOURCES: Kind = {
    "devices": [
        {
            "allow!": bool,
            "type": ("a", "b", "c"),
            "major": range(-1, MAJOR.stop),
            "minor": range(-1, MINOR.stop),
            "access": device_access,
        }
    ],
    "memory": {
        "limit": LIMIT,
        "reservation": LIMIT,
        "swap": LIMIT,
        "kernel": LIMIT,
        "kernelTCP": LIMIT,
        "swappiness": range(101),
        "disableOOMKiller": bool,
        "useHierarchy": bool,
        "checkBeforeUpdate": bool,
    },
    "cpu": {
        "shares": UINT64,
        "quota": LIMIT,
        "burst": UINT64,
        "period": UINT64,
        "realtimeRuntime": LIMIT,
        "realtimePeriod": UINT64,
        "cpus": number_list,
        "mems": number_list,
        "idle": range(2),
    },
    "pids": {"limit": LIMIT},
    "blockIO": {
        "weight": range(1001),
        "leafWeight": range(1001),
        "weightDevice": [{"major!": MAJOR, "minor!": MINOR, "weight": range(1001), "leafWeight": range(1001)}],
        "throttleReadBpsDevice": RATES,
        "throttleWriteBpsDevice": RATES,
        "throttleReadIOPSDevice": RATES,
        "throttleWriteIOPSDevice": RATES,
    },
    "hugepageLimits": [{"pageSize!": page_size, "limit!": UINT64}],
    "network": {"classID": UINT32, "priorities": [{"name!": not_empty, "priority!": UINT32}]},
    "rdma": {str: {"hcaHandles": UINT32, "hcaObjects": UINT32}},
    "unified": {str: str},
}

ACTIONS = tuple(
    f"SCMP_ACT_{name}"
    for name in ("KILL", "KILL_PROCESS", "KILL_THREAD", "TRAP", "ERRNO", "TRACE", "ALLOW", "LOG", "NOTIFY")
)
OPERATORS = tuple(f"SCMP_CMP_{name}" for name in ("NE", "LT", "LE", "EQ", "GE", "GT", "MASKED_EQ"))
ARCHITECTURES = tuple(
    f"SCMP_ARCH_{name}"
    for name in (
        *("X86_64", "X86", "X32", "AARCH64", "ARM", "RISCV64", "PPC64LE", "PPC64", "PPC", "S390X", "S390"),
        *("LOONGARCH64", "MIPS", "MIPS64", "MIPS64N32", "MIPSEL", "MIPSEL64", "MIPSEL64N32"),
        *("PARISC", "PARISC64", "M68K", "SH", "SHEB"),
    )
)
FILTER_FLAGS = tuple(f"SECCOMP_FILTER_FLAG_{name}" for name in ("TSYNC", "LOG", "SPEC_ALLOW", "WAIT_KILLABLE_RECV"))
SECCOMP: Kind = {
    "defaultAction!": ACTIONS,
    "defaultErrnoRet": UINT16,
    "architectures": [ARCHITECTURES],
    "flags": [FILTER_FLAGS],
    "listenerPath": str,
    "listenerMetadata": str,
    "syscalls": [
        {
            "names!": [not_empty],
            "action!": ACTIONS,
            "errnoRet": UINT16,
            "args": [{"index!": range(6), "value": UINT64, "valueTwo": UINT64, "op!": OPERATORS}],
        }
    ],
}

MEMORY_POLICIES = tuple(
    f"MPOL_{name}"
    for name in ("DEFAULT", "BIND", "INTERLEAVE", "WEIGHTED_INTERLEAVE", "PREFERRED", "PREFERRED_MANY", "LOCAL")
)
MEMORY_FLAGS = ("MPOL_F_NUMA_BALANCING", "MPOL_F_RELATIVE_NODES", "MPOL_F_STATIC_NODES")

LINUX: Kind = {
    "namespaces": [{"type!": NAMESPACES, "path": absolute_or_empty}],
    "uidMappings": MAPPINGS,
    "gidMappings": MAPPINGS,
    "timeOffsets": {str: {"secs": INT64, "nanosecs": range(10**9)}},
    "devices": [DEVICE],
    "cgroupsPath": cgroup_path,
    "resources": RESOURCES,
    "sysctl": {str: str},
    "seccomp": SECCOMP,
    "rootfsPropagation": PROPAGATIONS,
    "maskedPaths": [absolute],
    "readonlyPaths": [absolute],
    "mountLabel": str,
    "personality": {"domain!": ("LINUX", "LINUX32"), "flags": [str]},
    "memoryPolicy": {"mode!": MEMORY_POLICIES, "nodes": number_list, "flags": [MEMORY_FLAGS]},
    "netDevices": {str: {"name": device_name}},
}

CONFIG: Kind = {
    "ociVersion!": version,
    "root!": {"path!": not_empty, "readonly": bool},
    "process!": PROCESS,
    "hostname": host_name,
    "domainname": host_name,
    "mounts": [MOUNT],
    "hooks": {name: [HOOK] for name in HOOKS},
    "annotations": {str: str},
    "linux!": LINUX,
}
