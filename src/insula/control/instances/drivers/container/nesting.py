"""`--nesting`: the additional rights that a container runtime needs inside a container.

A container runtime makes namespaces and mounts. The kernel lets every user make a user namespace, and its root all
other namespaces in it (user_namespaces(7)). So `--nesting` gives no right over the host. It relaxes the following
defaults of containers:

seccomp     clone(2) with new namespaces, mount(2), pivot_root(2) and their kin are refused. With nesting they are
            allowed (rules of ``"with": "nesting"`` in profiles/seccomp.json). They affect only objects of the
            container's user namespace, but expose more of the kernel's code to the container.
capabilities    a runtime that makes no user namespace of its own needs capabilities that root of a new one would have:
            CAP_SYS_ADMIN to mount, CAP_NET_ADMIN to set up an interface. The system calls that Docker's profile ties
            to CAP_SYS_ADMIN, such as bpf(2), stay refused.
/proc, /sys the kernel lets a user namespace mount a new proc or sysfs only if an existing one is fully visible, so that
            mounts that hide parts of it can't be bypassed (mount_too_revealing in fs/namespace.c). In a container
            both are partly masked. As Incus does, one more of each is mounted below `WHOLE`, without masks. The usual
            ones stay masked.
cgroups     on version 2 the container's group is writable inside, and delegated to its root, which can make groups
            below it but can't change its own limits (delegation in cgroups(7)). Version 1 has no safe delegation, not
            even a limit on the number of groups: it stays read-only, and nested runtimes do without.
keyctl(2)   keys are not namespaced. It fails with ENOSYS, so that runtimes do without it.
"""

from __future__ import annotations

from typing import Any, Final

from insula.kernel import capabilities, cgroups

CAPABILITIES: Final = capabilities.to_mask(["SYS_ADMIN", "NET_ADMIN"])
GROUPS: Final = 1024
"""The most control groups below the container's own, since each takes memory of the kernel."""

WHOLE: Final = "/dev/.insula"
"""The directory of the unmasked proc and sysfs. It is in /dev, which the image does not provide."""

_MOUNTS: Final = tuple(
    {
        "destination": f"{WHOLE}/{name}",
        "type": fstype,
        "source": fstype,
        # a new mount must have all flags of this one, so it is not read-only (mount_namespaces(7))
        "options": ["nosuid", "noexec", "nodev"],
    }
    for name, fstype in (("proc", "proc"), ("sys", "sysfs"))
)


def allow(config: dict[str, Any]) -> None:
    """Change an OCI config.json so that containers can run inside. Seccomp and capabilities are set elsewhere."""
    config["mounts"] += [dict(mount) for mount in _MOUNTS]
    if cgroups.hierarchy().unified:
        [own] = [mount for mount in config["mounts"] if mount["type"] == "cgroup"]
        own["options"] = [option for option in own["options"] if option != "ro"]
        config["linux"]["resources"]["unified"] = {"cgroup.max.descendants": str(GROUPS)}
