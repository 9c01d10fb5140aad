"""A Python interpreter that cannot be written to, as protection from CVE-2019-5736.

A process that may inspect another one can open its program through /proc/PID/exe, wherever that file is. A container
sees the runtime for a moment: as PID 1 before its execve(2), and whenever a process joins. It can even make the runtime
stay: an entrypoint of ``#!/proc/self/exe`` executes the runtime's own program, with the container's libraries. If root
inside is root outside (no user namespace), the container can write to the opened file as soon as no process runs it,
and the host's next start of that program runs the attacker's code.

So a process that a container can inspect runs a copy. memfd_create(2) makes an unnamed file in memory; once it is
sealed (F_ADD_SEALS in fcntl(2)), not even root can change it. Executed by descriptor (fexecve(3)), it is /proc/PID/exe:

    os.execve(sealed.copy(), sys.orig_argv, os.environ)

Libraries need no copies: /proc/PID/map_files needs CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE of the host, and execve
unmaps them. Python finds its modules by argv[0], so a virtual environment keeps working.

A copy takes 2.5 ms and the start of an interpreter 7.5 ms, so a command seals itself before it does anything else. The
alternative is `mount_sealed`: it mounts the interpreter's directory again as an overlay without an upper layer. Such a
file system can't be written to or made writable, and nothing is copied. runc does the same.
"""

from __future__ import annotations

import errno
import fcntl
import os
import sys

MOUNT_POINT = "/opt/insula/sealed"
"""The directory where `mount_sealed` mounts the interpreter's directory. The first line of `packaging/insula-oci` names
it. Below the mount is a link to the ordinary interpreter, made by scripts/up; started through that, the command copies
itself.
"""

_MFD_EXEC = 0x10  # since Linux 6.3; memfd_create(2) refuses it before
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
_EXE = "/proc/self/exe"


def copy(path: str = _EXE) -> int:
    """Make a sealed copy of the program `path`, by default the running one; returns its descriptor, close-on-exec."""
    source = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        made = _memfd()
        try:
            left = os.fstat(source).st_size
            while left:
                sent = os.sendfile(made, source, None, left)  # None: from the current offset
                if not sent:
                    raise OSError(5, "the program was truncated while it was copied", path)
                left -= sent
            fcntl.fcntl(made, fcntl.F_ADD_SEALS, _SEALS)
        except BaseException:
            os.close(made)
            raise
        return made
    finally:
        os.close(source)


def is_sealed() -> bool:
    """Whether this process runs a sealed copy, or a program in MOUNT_POINT."""
    try:
        fd = os.open(_EXE, os.O_RDONLY | os.O_CLOEXEC)
    except PermissionError:  # not readable by this user, so not writable by a container of this user
        return True
    try:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS == _SEALS
    except OSError:  # EINVAL: an ordinary file
        return os.readlink(_EXE).startswith(f"{MOUNT_POINT}/") and bool(os.fstatvfs(fd).f_flag & os.ST_RDONLY)
    finally:
        os.close(fd)


def ensure() -> None:
    """Execute the same command line again as a sealed copy, unless this process is sealed already. The PID is kept.

    Call it before anything is read, opened or started. A user who may not write to the program needs no copy, because a
    container of that user may not either. OSError if the copy can't be made.
    """
    if is_sealed() or (os.geteuid() != 0 and not os.access(_EXE, os.W_OK, effective_ids=True)):
        return
    os.execve(copy(), sys.orig_argv, os.environ)


def mount_sealed(program: str = "/usr/bin/python3") -> None:
    """Mount the directory of `program` at MOUNT_POINT, permanently read-only, replacing an earlier mount.

    Needs CAP_SYS_ADMIN. The mount stays until `unmount_sealed`. Call it again after the program was upgraded, because
    the mount still has the old one.
    """
    from insula.kernel import syscalls  # not needed to seal oneself

    sealed = _overlay(os.path.dirname(os.path.realpath(program)))
    try:
        unmount_sealed()
        os.makedirs(MOUNT_POINT, 0o755, exist_ok=True)
        syscalls.move_mount(sealed, syscalls.AT_FDCWD, MOUNT_POINT)
    finally:
        os.close(sealed)


def bind(path: str) -> int:
    """Make a detached mount of the file at `path` that can't be written to, not even after a remount.

    It is for files of the host in containers. A process that may mount there can clear the "ro" of an ordinary mount;
    here the file system itself is read-only, an overlay without an upper layer. Needs CAP_SYS_ADMIN.
    """
    directory, name = os.path.split(os.path.realpath(path))
    try:
        return _file_of_overlay(directory, name)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    return _bind_in_child(directory, name)


def _file_of_overlay(directory: str, name: str) -> int:
    """Do `bind` on Linux 6.15 or later, where detached mounts can be overlaid and copied."""
    from insula.kernel import syscalls

    overlay = _overlay(directory)
    try:
        return syscalls.open_tree(overlay, name, syscalls.OPEN_TREE_CLONE | syscalls.AT_SYMLINK_NOFOLLOW)
    finally:
        os.close(overlay)


def _bind_in_child(directory: str, name: str) -> int:
    """Do `bind` on older kernels: a child attaches the overlay in its own mount namespace, and sends a copy back."""
    import socket

    ours, theirs = socket.socketpair()
    with ours, theirs:
        pid = os.fork()
        if pid == 0:
            failure = 0
            try:
                socket.send_fds(theirs, [b"ok"], [_file_of_attached_overlay(directory, name)])
            except OSError as error:
                failure = error.errno or errno.EIO
            finally:
                os._exit(failure)
        _, status = os.waitpid(pid, 0)
        if failure := os.waitstatus_to_exitcode(status):
            raise OSError(abs(failure), os.strerror(abs(failure)), f"{directory}/{name}")
        _, [fd], _, _ = socket.recv_fds(ours, 2, 1)
        return fd


def _file_of_attached_overlay(directory: str, name: str) -> int:
    from insula.kernel import syscalls

    syscalls.unshare(syscalls.CLONE_NEWNS)
    syscalls.mount(None, "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
    place = "/proc"  # exists on every host, and nothing is opened in it here
    syscalls.mount("tmpfs", place, "tmpfs")
    syscalls.move_mount(_read_only_overlay(directory, place), syscalls.AT_FDCWD, place)
    return syscalls.open_tree(
        syscalls.AT_FDCWD, f"{place}/{name}", syscalls.OPEN_TREE_CLONE | syscalls.AT_SYMLINK_NOFOLLOW
    )


def _overlay(directory: str) -> int:
    """Make a detached mount of a directory as a read-only file system."""
    empty = _mounted("tmpfs", {})
    try:
        return _read_only_overlay(directory, f"/proc/self/fd/{empty}")
    finally:
        os.close(empty)


def _read_only_overlay(directory: str, empty: str) -> int:
    """Make an overlay of a directory and an empty one: without an upper layer it needs at least two lower ones."""
    escaped = directory.replace("\\", "\\\\").replace(":", "\\:")
    return _mounted("overlay", {"lowerdir": f"{escaped}:{empty}"})


def unmount_sealed() -> None:
    """Undo `mount_sealed`; no error if there is no mount. Processes that run the program from there keep running.

    The directory stays: removing it would detach mounts on it in other mount namespaces.
    """
    from insula.kernel import syscalls

    try:
        while True:
            syscalls.umount2(MOUNT_POINT, syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW)
    except OSError:  # EINVAL: no mount is left
        pass


def _mounted(fstype: str, options: dict[str, str]) -> int:
    """Make a detached, read-only mount of a new file system."""
    from insula.kernel import syscalls

    context = syscalls.fsopen(fstype)
    try:
        for name, value in options.items():
            syscalls.fsconfig(context, syscalls.FSCONFIG_SET_STRING, name, value)
        syscalls.fsconfig(context, syscalls.FSCONFIG_CMD_CREATE)
        return syscalls.fsmount(
            context, syscalls.MOUNT_ATTR_RDONLY | syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NODEV
        )
    finally:
        os.close(context)


def _memfd() -> int:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        return os.memfd_create("insula", flags | _MFD_EXEC)
    except OSError:
        return os.memfd_create("insula", flags)
