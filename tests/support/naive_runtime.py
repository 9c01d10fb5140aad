"""A container runtime of fifty lines without user namespaces, as the target in the test of CVE-2019-5736.

    naive_runtime.py SEAL run ROOT COMMAND…     PID 1 of new PID and mount namespaces becomes COMMAND; we end before it
    naive_runtime.py SEAL join PID              joins them, waits for a line, and becomes /bin/true

SEAL is "sealed" for a runtime that first makes itself a sealed copy, as ours do, or "plain".
"""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "../../src"))

from insula.kernel import sealed

if sys.argv[1] == "sealed":
    sealed.ensure()

from insula.kernel import capabilities, syscalls

CAPABILITIES = capabilities.adjust(capabilities.DEFAULT, ["SYS_PTRACE"])


def run(root: str, command: list[str]) -> None:
    """The root is all of the host's, read-only, with a /proc and a /tmp of its own."""
    syscalls.unshare(syscalls.CLONE_NEWNS)
    syscalls.mount(None, "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
    syscalls.mount("/", root, None, syscalls.MS_BIND)
    syscalls.mount(None, root, None, syscalls.MS_REMOUNT | syscalls.MS_BIND | syscalls.MS_RDONLY)
    syscalls.mount("tmpfs", f"{root}/tmp", "tmpfs")
    with open(f"{root}/tmp/command", "w") as file:
        file.write(sys.stdin.read())
    os.chmod(f"{root}/tmp/command", 0o755)
    pid, _ = syscalls.clone3(syscalls.CLONE_NEWPID)
    if pid:
        print(pid, flush=True)
        os._exit(0)
    syscalls.mount("proc", f"{root}/proc", "proc")
    os.chdir(root)
    syscalls.pivot_root(".", ".")
    syscalls.umount2(".", syscalls.MNT_DETACH)
    become(command)


def join(target: int) -> None:
    """Twice a fork, as exec does it; undumpable, which CAP_SYS_PTRACE looks through."""
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)
    syscalls.setns(os.pidfd_open(target), syscalls.CLONE_NEWPID | syscalls.CLONE_NEWNS)
    pid, _ = syscalls.clone3(0)
    if pid:
        os.waitpid(pid, 0)
        os._exit(0)
    sys.stdin.readline()
    become(["/bin/true"])


def become(command: list[str]) -> None:
    sets = capabilities.Capabilities(CAPABILITIES, CAPABILITIES, CAPABILITIES)
    capabilities.before_setuid(sets)
    capabilities.after_setuid(sets)
    os.execv(command[0], command)


if sys.argv[2] == "run":
    run(sys.argv[3], sys.argv[4:])
else:
    join(int(sys.argv[3]))
