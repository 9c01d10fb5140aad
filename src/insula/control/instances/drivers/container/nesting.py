"""Containers inside a container, `--nesting`: what a runtime needs that a container otherwise has not, and no more.

A container runtime makes namespaces and mounts. The kernel lets every user make a user namespace, and root of one
all the others in it (user_namespaces(7)): so nothing here is a right of the host. What stands in the way is what
keeps a container in by default, and each obstacle has its own way around:

seccomp     clone(2) with new namespaces, mount(2), pivot_root(2) and their kin are refused. With nesting they are
            allowed (rules of ``"with": "nesting"`` in profiles/seccomp.json). They reach what belongs to the
            container's user namespace, but they are more of the kernel than others can call: that is the price.
capabilities    a runtime that makes no user namespace of its own needs the container's root to be allowed what root
            of a new one would be: CAP_SYS_ADMIN to mount, CAP_NET_ADMIN to set up an interface. The system calls
            that Docker's profile ties to CAP_SYS_ADMIN, as bpf(2), stay refused.
/proc, /sys the kernel lets a user namespace mount a new proc or sysfs only if one can be seen whole already, so that
            no mount that hides something is got around (mount_too_revealing in fs/namespace.c). In a container
            masks lie over both. As Incus does, one more of each is mounted out of the way, without masks; the usual
            ones stay masked, for everything that is not a runtime.
cgroups     on version 2 the container's group is writable inside, and given to its root, who can make groups below
            but not change its own limits (delegation in cgroups(7)). Version 1 has no safe delegation, not even a
            bound on the number of groups: it stays read-only, and nested runtimes go without.
keyctl(2)   keys are not namespaced. It is answered with ENOSYS, which runtimes take for a kernel without it.
"""

from __future__ import annotations

from typing import Any, Final

from insula.kernel import capabilities, cgroups

CAPABILITIES: Final = capabilities.to_mask(["SYS_ADMIN", "NET_ADMIN"])
GROUPS: Final = 1024
"""Control groups below the container's own, at most: each takes memory of the kernel."""

WHOLE: Final = "/dev/.insula"
"""Where the unmasked proc and sysfs are: in /dev, which is not the image's."""

_MOUNTS: Final = tuple(
    {
        "destination": f"{WHOLE}/{name}",
        "type": fstype,
        "source": fstype,
        # flags of these become the least that a new one must have: so not read-only (mount_namespaces(7))
        "options": ["nosuid", "noexec", "nodev"],
    }
    for name, fstype in (("proc", "proc"), ("sys", "sysfs"))
)


def allow(config: dict[str, Any]) -> None:
    """Changes an OCI config.json so that containers may run inside. `seccomp` and capabilities are not its business."""
    config["mounts"] += [dict(mount) for mount in _MOUNTS]
    if cgroups.hierarchy().unified:
        [own] = [mount for mount in config["mounts"] if mount["type"] == "cgroup"]
        own["options"] = [option for option in own["options"] if option != "ro"]
        config["linux"]["resources"]["unified"] = {"cgroup.max.descendants": str(GROUPS)}
