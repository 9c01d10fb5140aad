"""``features``: print what this runtime supports, on any kernel (features.md and features-linux.md).

It is made from the tables that configs are checked with, so that both agree.
"""

from __future__ import annotations

from insula import __version__
from insula.container.config import schema
from insula.kernel import capabilities, mount_options, syscall_numbers
from insula.oci.state import OCI_VERSION

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from insula.oci.options import VerbArguments


def run(arguments: VerbArguments) -> int:
    import json

    print(json.dumps(features(), indent=2))
    return 0


def features() -> dict[str, Any]:
    """The Features structure."""
    return {
        "ociVersionMin": "1.0.0",
        "ociVersionMax": OCI_VERSION,
        "hooks": list(schema.HOOKS),
        "mountOptions": sorted(mount_options.NAMES),
        "linux": {
            "namespaces": sorted(schema.NAMESPACES),
            "capabilities": list(capabilities.NAMES),
            "cgroup": {"v1": True, "v2": True, "systemd": True, "systemdUser": False, "rdma": True},
            "seccomp": {
                "enabled": True,
                "actions": sorted(schema.ACTIONS),
                "operators": sorted(schema.OPERATORS),
                "archs": sorted(syscall_numbers.ARCHS),
                "knownFlags": sorted(schema.FILTER_FLAGS),
                "supportedFlags": sorted(schema.FILTER_FLAGS),
            },
            "apparmor": {"enabled": True},
            "selinux": {"enabled": True},
            "intelRdt": {"enabled": False, "schemata": False, "monitoring": False},
            "memoryPolicy": {"modes": list(schema.MEMORY_POLICIES), "flags": list(schema.MEMORY_FLAGS)},
            "netDevices": {"enabled": True},
            "mountExtensions": {"idmap": {"enabled": True}},
        },
        "annotations": {"net.insula.version": __version__},
        "potentiallyUnsafeConfigAnnotations": [],
    }
