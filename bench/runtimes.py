"""OCI runtimes as processes, as an engine calls them: `RUNTIME run` of one bundle, from start to exit of `true`."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench.launch import real_launch
from bench.lib import Bench, Measure, Table, comparison, interleave
from bench.peers import CRUN, RUNC, Runtime, bundle_config, root_file_system
from insula.kernel import sealed
from tests.support.peers import Missing, launcher

ROUNDS = 25


def plain_config(root: Path, group: str) -> dict[str, Any]:
    """Namespaces, the usual mounts, and nothing besides: as `runc spec` has it."""
    mounts = [("/proc", "proc", []), ("/dev", "tmpfs", ["nosuid", "mode=755"]), ("/dev/pts", "devpts", ["newinstance"]),
              ("/dev/shm", "tmpfs", ["nosuid"]), ("/dev/mqueue", "mqueue", []), ("/sys", "sysfs", ["ro"])]  # fmt: skip
    capabilities = ["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"]
    return {
        "ociVersion": "1.0.2",
        "process": {
            "args": ["/bin/true"],
            "env": ["PATH=/bin"],
            "cwd": "/",
            "user": {"uid": 0, "gid": 0},
            "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), capabilities),
            "noNewPrivileges": True,
        },
        "root": {"path": str(root), "readonly": True},
        "hostname": "bench",
        "mounts": [
            {"destination": where, "type": kind, "source": kind, "options": options} for where, kind, options in mounts
        ],
        "linux": {
            "namespaces": [{"type": kind} for kind in ("pid", "network", "ipc", "uts", "mount")],
            "cgroupsPath": f"/{group}/plain",
            "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys"],
        },
    }


def measure(bench: Bench) -> list[Table]:
    root = root_file_system(bench)
    configs = {
        "a plain config": plain_config(root, f"{bench.daemon.prefix}-runtimes"),
        "Docker-like isolation": bundle_config(real_launch(bench), root),
    }
    return [_compare(bench, name, config) for name, config in configs.items()]


def _compare(bench: Bench, title: str, config: dict[str, Any]) -> Table:
    programs: dict[str, str | Path] = {
        "insula-oci run": launcher(bench.scratch, sealed.MOUNT_POINT),
        "crun run": CRUN,
        "runc run": RUNC,
    }
    with ExitStack() as stack:
        contestants: dict[str, Measure] = {}
        missing: dict[str, str] = {}
        for name, program in programs.items():
            try:
                runtime = Runtime(bench, program, config, title.split()[-1])
            except (Missing, OSError) as problem:
                missing[name] = str(problem)
                continue
            stack.callback(runtime.close)
            contestants[name] = runtime.launch
        times, dropped = interleave(contestants, bench.rounds(ROUNDS))
    table = comparison(f"OCI runtimes as processes, {title}", times, {**missing, **dropped}, "insula-oci run")
    table.notes.append("insula-oci has the interpreter that insulad mounts for it, and keeps compiled seccomp filters")
    return table
