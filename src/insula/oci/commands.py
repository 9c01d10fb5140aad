"""The options and arguments of `insula-oci` and its verbs, as tables. They are those of runc(8) and crun(1).

An option whose text begins with "(ignored)" is accepted because engines pass it, and has no effect.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from insula.oci.options import Table

GLOBAL: Table = (
    ("--root DIR", "where the containers' states are (/run/insula-oci)"),
    ("--log FILE", "where errors are written too"),
    ("--log-format text|json", "how"),
    ("--log-level LEVEL", "debug: as --debug; any other means nothing here"),
    ("--cgroup-manager cgroupfs|systemd|disabled", "what makes the control group: insula-oci, systemd, or nothing"),
    ("--systemd-cgroup", "as --cgroup-manager=systemd: cgroupsPath is then slice:prefix:name"),
    ("--rootless true|false|auto", "(ignored) what we may do is tried, not guessed"),
    ("--criu FILE", "the criu that checkpoint and restore use (criu, where programs are)"),
    ("--debug", "log the steps of create, run, exec and start, too"),
    ("-v --version", "show which version this is, and of which runtime-spec"),
    ("-h --help", "show this help"),
)

_HELP = ("-h --help", "show this help")
_BUNDLE = ("-b --bundle DIR", "the bundle's directory (.)")
_CONSOLE = ("--console-socket FILE", "the unix socket that gets the terminal's other end")
_PID_FILE = ("--pid-file FILE", "where the process's ID is written")
_PIDFD_SOCKET = ("--pidfd-socket FILE", "the unix socket that gets a pidfd of the process")
_PRESERVE = ("--preserve-fds N", "how many descriptors after the standard ones to pass on (0)")
_NEW: Table = (
    _BUNDLE,
    ("-f --config FILE", "the config instead of the bundle's config.json"),
    _CONSOLE,
    _PID_FILE,
    _PIDFD_SOCKET,
    _PRESERVE,
    ("--no-pivot", "change the root by moving it, where pivot_root(2) can't: on a ramdisk"),
    ("--no-new-keyring", "keep the caller's session keyring"),
    ("--no-subreaper", "(ignored) insula-oci reaps its own children only"),
)

_IMAGES: Table = (
    ("--image-path DIR", "where the files are (./checkpoint)"),
    ("--work-path DIR", "where criu's logs go (--image-path)"),
    ("--tcp-established", "with connections that are established"),
    ("--ext-unix-sk", "with unix sockets to the outside"),
    ("--shell-job", "with a session leader outside"),
    ("--file-locks", "with file locks"),
    ("--auto-dedup", "drop memory from the parent images that newer ones have"),
    ("--manage-cgroups-mode soft|full|strict|ignore", "what criu does with control groups (soft)"),
    ("--empty-ns KIND...", "network: leave out what is in its network namespace"),
)

COMMANDS: dict[str, tuple[str, str, Table]] = {
    # verb: (arguments, one line of help, options)
    "create": ("ID", "make a container; its process waits for start", _NEW),
    "start": ("ID", "let the process of a created container become the user's program", ()),
    "run": (
        "ID",
        "create and start a container, wait for it and delete it",
        (*_NEW, ("-d --detach", "do not wait"), ("--keep", "do not delete it when it ends")),
    ),
    "exec": (
        "ID [COMMAND...]",
        "run one more process in a running container",
        (
            ("-p --process FILE", "the process, as process of a config; else it is COMMAND"),
            _CONSOLE,
            _PID_FILE,
            _PIDFD_SOCKET,
            _PRESERVE,
            ("-d --detach", "do not wait"),
            ("-t --tty", "give it a terminal"),
            ("--cwd DIR", "its working directory"),
            ("-e --env NAME=VALUE...", "add to its environment"),
            ("-u --user UID[:GID]", "its user"),
            ("-g --additional-gids GID...", "more groups of its user"),
            ("-c --cap NAME...", "add a capability"),
            ("--no-new-privs", "let it gain no privileges by execve(2)"),
            ("--apparmor PROFILE", "its AppArmor profile"),
            ("--process-label LABEL", "its SELinux label"),
            ("--cgroup [CONTROLLER,...:]PATH...", "its control group below the container's"),
            ("--ignore-paused", "do so although the container is paused"),
            ("--no-subreaper", "(ignored) insula-oci reaps its own children only"),
        ),
    ),
    "state": ("ID", "print the state of a container, as the runtime-spec has it", ()),
    "kill": (
        "ID [SIGNAL]",
        "send a signal, TERM by default, to the container's first process",
        (("-a --all", "to all of its processes"),),
    ),
    "delete": (
        "ID",
        "remove a stopped container",
        (
            ("-f --force", "kill it first if it runs; nothing happens if it is not there"),
            ("--regex", "ID is a regular expression: all containers in whose IDs it is found"),
        ),
    ),
    "list": (
        "",
        "list the containers below --root",
        (("-f --format table|json", "how"), ("-q --quiet", "IDs only")),
    ),
    "ps": (
        "ID [OPTIONS...]",
        "the processes of a container, with the options of ps(1)",
        (("-f --format table|json", "json: their IDs only"),),
    ),
    "pause": ("ID", "stop all processes of a container where they are", ()),
    "resume": ("ID", "let them go on", ()),
    "update": (
        "ID",
        "change the limits of a container",
        (
            ("-r --resources FILE", "linux.resources as JSON; - is the standard input"),
            ("--memory SIZE", "memory"),
            ("--memory-reservation SIZE", "memory that is left to it when there is too little for all"),
            ("--memory-swap SIZE", "memory and swap together; -1: any"),
            ("--kernel-memory SIZE", "(ignored) the kernel no longer has it"),
            ("--kernel-memory-tcp SIZE", "(ignored) the kernel no longer has it"),
            ("--cpu-shares --cpu-share N", "its part of the processors when there is too little for all"),
            ("--cpu-quota N", "microseconds of a processor in each period; -1: any"),
            ("--cpu-period N", "microseconds"),
            ("--cpu-burst N", "microseconds that it may save up"),
            ("--cpu-idle N", "1: run only when the CPU is idle otherwise"),
            ("--cpu-rt-period N", "the same for real-time scheduling"),
            ("--cpu-rt-runtime N", "the same for real-time scheduling"),
            ("--cpuset-cpus LIST", "the processors it may use, as in 0-3"),
            ("--cpuset-mems LIST", "the memory nodes it may use"),
            ("--blkio-weight N", "its part of the disks, 10 to 1000"),
            ("--pids-limit N", "processes and threads; -1: any"),
        ),
    ),
    "events": (
        "ID",
        "print events: out of memory, and statistics every interval",
        (("--stats", "print the statistics once and end"), ("--interval DURATION", "between statistics (5s)")),
    ),
    "checkpoint": (
        "ID",
        "write a running container down as files, by criu, and delete it",
        (
            *_IMAGES,
            ("--leave-running", "let it run on"),
            ("--pre-dump", "write its memory only, and let it run on"),
            ("--parent-path DIR", "an earlier --pre-dump: write only what has changed since"),
            ("--page-server ADDRESS:PORT", "send memory to a `criu page-server` there"),
        ),
    ),
    "restore": (
        "ID",
        "make a container again as checkpoint wrote it down, and let it run on",
        (
            _BUNDLE,
            ("-f --config FILE", "the config instead of the bundle's config.json"),
            *_IMAGES,
            _PID_FILE,
            ("-d --detach", "do not wait for its end"),
            ("--no-pivot", "(ignored) criu changes the root"),
            ("--no-subreaper", "(ignored) without --detach, what criu leaves is ours to wait for"),
        ),
    ),
    "spec": (
        "",
        "write a config.json to start from",
        (_BUNDLE, ("--rootless", "for a user who is not root")),
    ),
    "features": ("", "print what this runtime can do, as the runtime-spec has it", ()),
}
IN_ORDER = frozenset({"exec", "ps"})
"""Verbs whose options end at the first argument."""


def table(verb: str) -> Table:
    """The options of `verb`."""
    return (*COMMANDS[verb][2], _HELP)
