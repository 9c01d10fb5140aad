"""CRIU (criu(8)): checkpoint a tree of processes to files, and restore it from them.

To dump a process, criu stops it (PTRACE_SEIZE of ptrace(2)), reads its state from /proc, and makes it run a few
kilobytes of criu's own code, the *parasite*, which reports the rest from inside: signals, credentials and the pages of
memory. To restore, criu forks processes with the same PIDs in new namespaces (clone3(2) with set_tid) and opens their
files. Then each maps its old memory over criu's code, and continues where it was with sigreturn(2).

*External* resources are those that the tree shares with processes outside: bind-mounted file systems, pipes to others,
a shared network namespace. They are given names at the dump, and at the restore each name is mapped to a replacement.

criu depends on internals of the kernel: version 3.17 of Debian 12 fails on newer kernels, whose vDSO (vdso(7)) has
another size. So `criu check` is run before any process is stopped.
"""

from __future__ import annotations

from insula.model.errors import Failed, Unavailable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_CHECK_TIMEOUT = 10
_HINT = "install a criu that fits the kernel, or name one with --criu"


def find(program: str | None = None) -> str:
    """Return the path of criu, or of `program`; Unavailable if it is missing or does not work on this kernel."""
    import shutil
    import subprocess

    path = shutil.which(program or "criu", path=None if program else PATH)
    if path is None:
        raise Unavailable(f"{program or 'criu'} is not installed", _HINT)
    try:
        done = subprocess.run([path, "check"], capture_output=True, text=True, timeout=_CHECK_TIMEOUT)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"`{path} check` can't be run: {error}", _HINT) from None
    if done.returncode:
        raise Unavailable(f"{path} does not work on this kernel: {_first_error(done.stderr)}", _HINT)
    return path


def run(path: str, verb: str, arguments: Sequence[str], *, work: str, keep: Sequence[int] = ()) -> None:
    """Run `criu VERB ARGUMENTS`, which logs to VERB.log in the directory `work`. Failed with the log's first error.

    Restored processes inherit the standard streams and the descriptors `keep`.
    """
    import subprocess

    log = f"{work}/{verb}.log"
    command = [path, verb, *arguments, "--work-dir", work, "--log-file", f"{verb}.log", "-v4"]
    # criu works in its own directory; what it would print goes to the log
    status = subprocess.run(command, pass_fds=keep, check=False).returncode
    if status == 0:
        return
    try:
        with open(log, errors="replace") as file:
            reason = _first_error(file.read())
    except OSError:
        reason = f"it ended with {status}"
    raise Failed(f"criu {verb} failed: {reason}", f"see {log}")


def _first_error(text: str) -> str:
    """Return the first error in a log, without those about limits that criu can't raise for itself."""
    for line in text.splitlines():
        _, error, message = line.partition("Error (")
        if error and "RLIMIT_NOFILE" not in message:
            return message.partition("): ")[2].strip() or line.strip()
    return "its log has no error"
