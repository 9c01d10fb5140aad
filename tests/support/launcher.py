"""Starts many insulads from one interpreter that has imported it: to import is half of the work of a start.

An insulad of the tests is a fork of this process instead of a new interpreter; nothing of insulad has run before. It
is a child of the tests, as if they had executed it (CLONE_PARENT of clone(2)). What insulad itself starts is executed.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import NoReturn

_LONGEST = 65536  # bytes of a request


class Insulad:
    """One that was started: what the tests need of subprocess.Popen."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._pidfd = os.pidfd_open(pid)
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit status, as subprocess.Popen has it, or None while it runs."""
        return self._reap(os.WNOHANG)

    def wait(self, timeout: float) -> int:
        """The exit status; subprocess.TimeoutExpired after `timeout` seconds."""
        if self.returncode is None and not select.select([self._pidfd], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired("insulad", timeout)
        status = self._reap(0)
        assert status is not None
        return status

    def terminate(self) -> None:
        if self.poll() is None:
            signal.pidfd_send_signal(self._pidfd, signal.SIGTERM)

    def _reap(self, options: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
                os.close(self._pidfd)
        return self.returncode


class Launcher:
    """The process that has imported insulad, seen from the tests."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-I", __file__],
                env={"PATH": os.environ["PATH"]},
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
            )

    def launch(self, environment: Mapping[str, str], network: str, log: int) -> Insulad:
        """An insulad in the network namespace of the file `network`; its output goes to the descriptor `log`."""
        request = json.dumps({"environment": dict(environment), "network": network}).encode()
        with self._lock:
            socket.send_fds(self._socket, [request], [log])
            return Insulad(int(self._socket.recv(_LONGEST)))

    def close(self) -> None:
        self._socket.close()
        self._process.wait()


def _serve() -> None:
    """Serve requests at standard input until nobody can send one."""
    import insula.api.daemon  # noqa: F401
    from insula.kernel import syscalls

    requests = socket.socket(fileno=0)
    while True:
        data, descriptors, _, _ = socket.recv_fds(requests, _LONGEST, 1)
        if not data:
            return
        pid, pidfd = syscalls.clone3(syscalls.CLONE_PARENT)
        if pid == 0:
            _become_insulad(**json.loads(data), log=descriptors[0])
        os.close(pidfd)
        os.close(descriptors[0])
        requests.send(str(pid).encode())


def _become_insulad(environment: Mapping[str, str], network: str, log: int) -> NoReturn:
    """In the fork: what a new process would have, and then insulad's program."""
    from insula.api import daemon
    from insula.kernel import syscalls

    os.setsid()
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.closerange(3, max(null, log) + 1)
    namespace = os.open(network, os.O_RDONLY)
    syscalls.setns(namespace, syscalls.CLONE_NEWNET)
    os.close(namespace)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["insulad"]
    sys.exit(daemon.main())


if __name__ == "__main__":
    _serve()
