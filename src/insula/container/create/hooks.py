"""Hooks: programs that a config has run at six points of a container's life (OCI runtime-spec, config.md).

    create   prestart          in the runtime's namespaces, once the container's exist and its mounts are made
             createRuntime     the same; prestart is its old name
             createContainer   in the container's namespaces, before pivot_root(2): paths are still the host's
    start    startContainer    in the container's namespaces and in its root, right before the user's program and with
                               no more rights than it has: its path is looked up in the image
             poststart         in the runtime's namespaces, when the user's program runs
    delete   poststop          in the runtime's namespaces, when the container is gone

Each gets the container's state as JSON on standard input, and exactly the environment that its entry lists. An entry
without `env` inherits: the runtime's environment, a startContainer hook that of the user's program. The hooks of a
point run one after the other. If one fails, by its exit status or by its timeout, the operation fails and there is no
container. A failure of poststart or poststop is a warning, and the hooks after it still run.
"""

from __future__ import annotations

import errno
import os
import select
import time

from insula.container.create.steps import StepError, Steps, reset_signals
from insula.kernel import syscalls
from insula.model.cpython import dumps, signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any, NoReturn

KINDS = ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")
_LAST_WORDS = 1024  # bytes of a failed hook's standard error that are shown


def run(config: dict[str, Any], kind: str, state: dict[str, Any], environment: Mapping[str, str] | None = None) -> None:
    """Run all hooks of a kind; StepError at the first that fails.

    `environment` is for entries without `env`; by default it is that of this process.
    """
    for index, hook in enumerate((config.get("hooks") or {}).get(kind) or ()):
        try:
            _run(kind, hook, dumps(state).encode(), os.environ if environment is None else environment)
        except OSError as error:
            about = f"hooks.{kind}[{index}]: error running {kind} hook #{index}"
            raise StepError(Steps.RUN_HOOK, error, about) from None


def run_all(config: dict[str, Any], kind: str, state: dict[str, Any], warn: Callable[[str], object]) -> None:
    """Run all hooks of a kind; `warn` is called with a text for each that fails."""
    for index, hook in enumerate((config.get("hooks") or {}).get(kind) or ()):
        try:
            _run(kind, hook, dumps(state).encode(), os.environ)
        except OSError as error:
            warn(f"hooks.{kind}[{index}]: error running {kind} hook #{index}: {error.filename or ''}: {error.strerror}")


def _run(kind: str, hook: dict[str, Any], state: bytes, environment: Mapping[str, str]) -> None:
    """Run one hook to its end. OSError has its exit status or signal, and the end of its standard error."""
    # files without a name rather than pipes: no hook has to read, and none that lingers keeps us waiting
    stdin, output = os.memfd_create("state"), os.memfd_create("output")
    try:
        os.write(stdin, state)
        os.lseek(stdin, 0, os.SEEK_SET)
        pid = os.fork()  # not clone3(2), which the container's seccomp filter may forbid: engines' profiles do
        if pid == 0:
            _become(hook, environment, stdin, output)
        status = _wait(pid, hook.get("timeout"))
        if status is None:
            raise OSError(errno.ETIMEDOUT, f"it took longer than {hook['timeout']} seconds", hook["path"])
        if status:
            words = _last_words(output)
            how = f"exit code {status}" if status > 0 else _signal_name(-status)
            how = f"{kind} hook failed with {how}"
            raise OSError(errno.ECANCELED, f"{how}: {words}" if words else how, hook["path"])
    finally:
        os.close(stdin)
        os.close(output)


def _signal_name(number: int) -> str:
    return f"signal {number} ({(signal.strsignal(number) or 'unknown').lower()})"


def _wait(pid: int, timeout: int | None) -> int | None:
    """The exit status of the hook, negative for a signal; None if it was killed after `timeout` seconds."""
    if timeout is not None and not _ends(pid, timeout):
        try:
            os.kill(pid, signal.SIGKILL)  # our child, and not yet waited for: the number is still its own
        except PermissionError:  # a set-user-ID program in a rootless container; it ends with its container
            return None
        os.waitpid(pid, 0)
        return None
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def _ends(pid: int, timeout: int) -> bool:
    """Whether our child ends within `timeout` seconds."""
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:  # older profiles of engines forbid it
        deadline = time.monotonic() + timeout
        while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        return bool(poll.poll(timeout * 1000))
    finally:
        os.close(pidfd)


def _become(hook: dict[str, Any], environment: Mapping[str, str], stdin: int, output: int) -> NoReturn:
    try:
        reset_signals()
        os.dup2(stdin, 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        _close_descriptors()
        if "env" in hook:
            environment = dict(entry.partition("=")[::2] for entry in hook["env"])
        os.execve(hook["path"], hook.get("args") or [hook["path"]], environment)
    except OSError as error:
        os.write(2, f"{error.strerror}".encode())
    finally:
        os._exit(127)


def _close_descriptors() -> None:
    try:
        syscalls.close_range(3, 0x7FFFFFFF)
    except OSError:  # the container's filter forbids it; those that matter are closed by execve(2)
        return


def _last_words(output: int) -> str:
    size = os.fstat(output).st_size
    data = os.pread(output, _LAST_WORDS, max(0, size - _LAST_WORDS))
    return " ".join(data.decode("utf-8", "replace").split())
