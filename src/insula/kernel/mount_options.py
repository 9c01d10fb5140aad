"""Mount options, with the names of mount(8) and the OCI runtime-spec (config.md, "Linux mount options").

There are four kinds of options, and the kernel has a call for each:

    ro, nosuid, noexec, noatime, …    attributes of one mount: mount_setattr(2)
    rro, rnosuid, …                   attributes of a mount and all below it: mount_setattr(2) with AT_RECURSIVE
    private, rshared, …               propagation of later mounts to other namespaces: mount_namespaces(7)
    size=1g, mode=755, …              parameters of the file system: fsconfig(2)

Only named attributes are set or cleared: a bind mount keeps the other attributes of its source.
"""

from __future__ import annotations

from insula.kernel import syscalls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

_ATIME = syscalls.MOUNT_ATTR__ATIME
_ATTRIBUTES = {
    # option: (bits to clear, bits to set)
    "ro": (0, syscalls.MOUNT_ATTR_RDONLY),
    "rw": (syscalls.MOUNT_ATTR_RDONLY, 0),
    "nosuid": (0, syscalls.MOUNT_ATTR_NOSUID),
    "suid": (syscalls.MOUNT_ATTR_NOSUID, 0),
    "nodev": (0, syscalls.MOUNT_ATTR_NODEV),
    "dev": (syscalls.MOUNT_ATTR_NODEV, 0),
    "noexec": (0, syscalls.MOUNT_ATTR_NOEXEC),
    "exec": (syscalls.MOUNT_ATTR_NOEXEC, 0),
    "nodiratime": (0, syscalls.MOUNT_ATTR_NODIRATIME),
    "diratime": (syscalls.MOUNT_ATTR_NODIRATIME, 0),
    "nosymfollow": (0, syscalls.MOUNT_ATTR_NOSYMFOLLOW),
    "symfollow": (syscalls.MOUNT_ATTR_NOSYMFOLLOW, 0),
    # the access time is one field: setting one value clears the others
    "noatime": (_ATIME, syscalls.MOUNT_ATTR_NOATIME),
    "strictatime": (_ATIME, syscalls.MOUNT_ATTR_STRICTATIME),
    "relatime": (_ATIME, 0),
    "atime": (_ATIME, 0),
    "nostrictatime": (_ATIME, 0),
    "norelatime": (0, 0),
}
_PROPAGATION = {
    "private": syscalls.MS_PRIVATE,
    "slave": syscalls.MS_SLAVE,
    "shared": syscalls.MS_SHARED,
    "unbindable": syscalls.MS_UNBINDABLE,
}
_SUPERBLOCK = ("sync", "dirsync", "lazytime", "nolazytime", "mand", "nomand")
_WITHOUT_EFFECT = ("defaults", "async", "silent", "loud", "iversion", "noiversion", "acl", "noacl")
_OURS = ("bind", "rbind", "remount", "idmap", "ridmap", "tmpcopyup", "copy-symlink", "sealed")

NAMES = (
    *_ATTRIBUTES,
    *(f"r{name}" for name in _ATTRIBUTES),
    *_PROPAGATION,
    *(f"r{name}" for name in _PROPAGATION),
    *_SUPERBLOCK,
    *_WITHOUT_EFFECT,
    *_OURS,
)
"""Every option that is not a parameter of a file system, for `insula-oci features`."""


class Attributes:
    """Bits of MOUNT_ATTR_* to set and to clear."""

    __slots__ = ("clear", "set")

    def __init__(self) -> None:
        self.set = self.clear = 0

    def add(self, name: str) -> None:
        """Add an option; the last of two contradicting options applies."""
        clear, set_ = _ATTRIBUTES[name]
        self.clear = self.clear & ~set_ | clear
        self.set = self.set & ~clear | set_
        if set_ & _ATIME:
            self.clear |= _ATIME

    def __bool__(self) -> bool:
        return bool(self.set or self.clear)


class MountOptions:
    """Parsed options. `data` has the file system's parameters; `propagation` has MS_REC for the recursive kinds."""

    __slots__ = (
        *("all_below", "bind", "copy_link", "copy_up", "data", "idmap", "own", "propagation", "recursive"),
        *("remount", "sealed"),
    )

    def __init__(self, options: Iterable[str] = ()) -> None:
        self.own = Attributes()  # of this mount only
        self.all_below = Attributes()  # of this mount and every mount below
        self.propagation = 0
        self.bind = self.recursive = False
        self.remount = False
        self.copy_up = False
        self.copy_link = False  # if the source of a bind mount is a symbolic link, copy the link instead of mounting
        self.sealed = False  # a bind mount of a file that can't be remounted writable
        self.idmap = ""  # idmap, ridmap, or empty
        self.data: list[str] = []
        for option in options:
            self._add(option)

    def _add(self, option: str) -> None:
        if option in _ATTRIBUTES:
            self.own.add(option)
        elif option in _PROPAGATION:
            self.propagation = _PROPAGATION[option]
        elif option in ("bind", "rbind"):
            self.bind, self.recursive = True, self.recursive or option == "rbind"
        elif option == "remount":
            self.remount = True
        elif option == "tmpcopyup":
            self.copy_up = True
        elif option == "copy-symlink":
            self.copy_link = True
        elif option == "sealed":
            self.sealed = True
        elif option in ("idmap", "ridmap"):
            self.idmap = option
        elif option[:1] == "r" and option[1:] in _ATTRIBUTES:
            self.all_below.add(option[1:])
        elif option[:1] == "r" and option[1:] in _PROPAGATION:
            self.propagation = _PROPAGATION[option[1:]] | syscalls.MS_REC
        elif option not in _WITHOUT_EFFECT and not option.startswith("x-"):
            self.data.append(option)

    @property
    def attributes(self) -> int:
        """The attributes of a new mount, for fsmount(2)."""
        return self.own.set | self.all_below.set
