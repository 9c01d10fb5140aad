"""CRIU (criu(8)): a tree of processes written down as files, and made again from them.

To write it down, criu seizes every process (PTRACE_SEIZE of ptrace(2)), reads what /proc tells of it, and lets it run a
few kilobytes of code of criu's own, the parasite, which tells the rest from inside: signals, credentials, the pages of
memory. To make it again, criu forks processes with the same PIDs in new namespaces (clone3(2) with set_tid), opens
their files, and at last each maps its old memory over criu's own code and returns to where it was as from a signal
(sigreturn(2)).

What reaches over the edge of the tree is not criu's to know: file systems that are bound into it, pipes to somebody
outside, a network namespace that others share. Such things are named when they are written down, as *external*, and
when they are made again their names are given to what stands for them then.

criu must fit the kernel, because it knows its insides: Debian 12's 3.17 fails where the kernel is so new that the vDSO
(vdso(7)) has another size. So it is asked whether it works (`criu check`) before anything is stopped.
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
    """The path of criu, or of `program`; Unavailable if there is none that works on this kernel."""
    import shutil
    import subprocess

    path = shutil.which(program or "criu", path=None if program else PATH)
    if path is None:
        raise Unavailable(f"{program or 'criu'} is not installed", _HINT)
    try:
        done = subprocess.run([path, "check"], capture_output=True, text=True, timeout=_CHECK_TIMEOUT)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{path} can't be asked whether it works: {error}", _HINT) from None
    if done.returncode:
        raise Unavailable(f"{path} does not work on this kernel: {_first_error(done.stderr)}", _HINT)
    return path


def run(path: str, verb: str, arguments: Sequence[str], *, work: str, keep: Sequence[int] = ()) -> None:
    """`criu VERB ARGUMENTS`, whose log is VERB.log in directory `work`. Failed with the log's first error.

    What it makes again inherits the standard streams, and the descriptors `keep`.
    """
    import subprocess

    log = f"{work}/{verb}.log"
    command = [path, verb, *arguments, "--work-dir", work, "--log-file", f"{verb}.log", "-v4"]
    # criu serves its own directory and prints nothing; what it would print goes to the log
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
    """The first line of a log that says what went wrong; limits that criu can't raise for itself don't matter."""
    for line in text.splitlines():
        _, error, message = line.partition("Error (")
        if error and "RLIMIT_NOFILE" not in message:
            return message.partition("): ")[2].strip() or line.strip()
    return "it does not say why"
