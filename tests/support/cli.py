"""The command line as users run it: the installed launcher as a process, in a pipe or a terminal."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.wait import patiently

REPOSITORY = Path(__file__).parents[2]
ERROR = re.compile(r"error: (?P<what>[^\n]+?); hint: (?P<hint>[^\n]+)\n")


@dataclass(frozen=True)
class Result:
    """The exit status and output of a command."""

    command: str
    status: int
    out: str
    err: str

    def ok(self) -> str:
        """The output of a command that must have succeeded."""
        assert self.status == 0, self
        return self.out


@dataclass(frozen=True)
class Cli:
    """`insula` against one daemon. `run` returns what happened; `ok` and `json` expect success, `fails` an error."""

    launcher: Path
    socket: Path
    tenant: str | None = None
    token: Path | None = None

    def of(self, tenant: str) -> Cli:
        """The command line for another tenant."""
        return Cli(self.launcher, self.socket, tenant, self.token)

    def by(self, token: Path) -> Cli:
        """The same by a token, which is in a file."""
        return Cli(self.launcher, self.socket, self.tenant, token)

    def command(self, *arguments: str | Path) -> list[str]:
        return [str(self.launcher), *(str(a) for a in arguments)]

    def environment(self) -> dict[str, str]:
        tenant = {"INSULA_TENANT": self.tenant} if self.tenant else {}
        if self.token:
            tenant["INSULA_TOKEN_FILE"] = str(self.token)
        return {"PATH": os.environ["PATH"], "TERM": "xterm", "INSULA_SOCKET": str(self.socket), **tenant}

    def start(self, *arguments: str | Path) -> subprocess.Popen[str]:
        """Runs beside the test; the caller waits for it."""
        return subprocess.Popen(
            self.command(*arguments),
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def raw(
        self, *arguments: str | Path, stdin: bytes = b"", timeout: float = 60.0
    ) -> subprocess.CompletedProcess[bytes]:
        """Input and output as bytes."""
        patience = patiently(timeout)
        return subprocess.run(
            self.command(*arguments), env=self.environment(), input=stdin, capture_output=True, timeout=patience
        )

    def run(self, *arguments: str | Path, stdin: str = "", timeout: float = 60.0) -> Result:
        done = self.raw(*arguments, stdin=stdin.encode(), timeout=timeout)
        out, err = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
        return Result(" ".join(["insula", *map(str, arguments)]), done.returncode, out, err)

    def ok(self, *arguments: str | Path, stdin: str = "", timeout: float = 60.0) -> str:
        return self.run(*arguments, stdin=stdin, timeout=timeout).ok().rstrip("\n")

    def json(self, *arguments: str | Path) -> Any:
        return json.loads(self.ok("--json", *arguments))

    def fails(self, *arguments: str | Path, status: int = 1, stdin: str = "") -> str:
        """The message of a command that must fail: one line with a hint, nothing else, and that exit status."""
        result = self.run(*arguments, stdin=stdin)
        assert result.status == status, result
        match = ERROR.fullmatch(result.err)
        assert match, f"not one line `error: …; hint: …`: {result}"
        return match["what"]

    def terminal(self, *arguments: str | Path, rows: int = 24, columns: int = 80) -> Terminal:
        return Terminal(self.command(*arguments), self.environment(), rows, columns)


class Terminal:
    """A command in a terminal of its own (pty(7)); the test reads, types and resizes the window."""

    def __init__(self, command: list[str], environment: dict[str, str], rows: int, columns: int) -> None:
        self.seen = ""
        self._pid, self._fd = pty.fork()
        if self._pid == 0:
            fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))  # before anybody can ask
            os.execve(command[0], command, environment)
        self._status: int | None = None

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self._fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def flags(self) -> int:
        """The local modes (c_lflag) of the terminal, termios(3)."""
        modes: list[Any] = termios.tcgetattr(self._fd)
        return int(modes[3])

    def expect(self, pattern: str, timeout: float = 15.0) -> re.Match[str]:
        """Reads until `pattern` (a regular expression) shows in what came since the last match."""
        deadline = time.monotonic() + patiently(timeout)
        while not (match := re.search(pattern, self.seen)):
            assert time.monotonic() < deadline, f"{pattern!r} did not show in {self.seen!r}"
            if select.select([self._fd], [], [], 0.1)[0] and not self._read():
                match = re.search(pattern, self.seen)
                assert match, f"the terminal closed; {pattern!r} did not show in {self.seen!r}"
                break
        self.seen = self.seen[match.end() :]
        return match

    def _read(self) -> bool:
        try:
            chunk = os.read(self._fd, 65536)
        except OSError:  # EIO: the other side closed
            chunk = b""
        self.seen += chunk.decode(errors="replace")
        return bool(chunk)

    def wait(self, timeout: float = 15.0) -> int:
        """The exit status of the command, as a shell has it."""
        deadline = time.monotonic() + patiently(timeout)
        while self._status is None:
            if select.select([self._fd], [], [], 0.02)[0]:
                self._read()
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if pid:
                code = os.waitstatus_to_exitcode(status)
                self._status = 128 - code if code < 0 else code
            assert self._status is not None or time.monotonic() < deadline, f"still runs; seen {self.seen!r}"
        return self._status

    def close(self) -> None:
        if self._status is None:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
            self._status = 137
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
