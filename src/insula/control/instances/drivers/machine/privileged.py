"""`--privileged`: root in the guest may do with its kernel what root of a computer may.

A program in a guest has the rights that it would have in a container, so that an image does the same in both. The
guest's kernel is the machine's own, and what is done to it harms nobody else; so a machine may have all rights on it:

capabilities    all of them, and programs may gain more by execve(2): sudo(8) works
/proc, /sys     are not masked, and can be written
cgroups         the whole tree below the agent's group can be written: systemd(1) can be the first program
"""

from __future__ import annotations

from typing import Any

from insula.kernel import capabilities


def allow(config: dict[str, Any]) -> None:
    """Change the OCI config of a guest's program, whose user is known."""
    process, names = config["process"], capabilities.to_names(capabilities.ALL)
    root = process["user"]["uid"] == 0
    process["capabilities"] |= {"bounding": names} | ({"effective": names, "permitted": names} if root else {})
    process["noNewPrivileges"] = False
    config["linux"] |= {"maskedPaths": [], "readonlyPaths": []}
    for mount in config["mounts"]:
        if mount["type"] in ("sysfs", "cgroup"):
            mount["options"] = [option for option in mount["options"] if option != "ro"]
