"""A private insulad with its own directories, names and network, isolated from all others."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from insula.container.service.protocol import MONITOR_PID, ZYGOTE_PID
from tests.support.cli import REPOSITORY, Cli
from tests.support.launcher import Insulad
from tests.support.machine import CGROUPS, NETNS, Namespaces, Run, put_back_terminals, remove_tree
from tests.support.snapshot import Snapshot
from tests.support.wait import patiently, until

PROCESSES = ("insulad", "monitor", "zygote")
PID_FILES = {"monitor": MONITOR_PID, "zygote": ZYGOTE_PID}
START_TIMEOUT = 30.0


def start_time(pid: int) -> int | None:
    """Field 22 of proc_pid_stat(5) of a process that runs; None for none and for a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] == "Z" else int(fields[19])


class Daemon:
    """insulad on a private host. `cli` talks to it; `kill` and `start` play a crash; `remove` leaves nothing."""

    def __init__(self, run: Run) -> None:
        self.prefix = run.next_prefix()
        self._launcher = run.launcher()
        self.path = run.path / self.prefix
        self.root, self.run, self.log = self.path / "root", self.path / "run", self.path / "insulad.log"
        self.settings, self.audit = self.path / "insulad.toml", self.path / "audit.log"
        self.path.mkdir()
        self.configure()
        self.namespaces = Namespaces()
        self.environment = {
            "PATH": os.environ["PATH"],
            "INSULA_ROOT": str(self.root),
            "INSULA_RUN": str(self.run),
            "INSULA_PREFIX": self.prefix,
            "INSULA_CONFIG": str(self.settings),
        }
        self.cli = Cli(self._command(), self.run / "insulad.sock")
        self.wrapper: tuple[str, ...] = ()  # put before insulad's command line
        self._process: subprocess.Popen[bytes] | Insulad | None = None

    def _command(self) -> Path:
        """The launcher that scripts/up installs, for the package under test."""
        target = self.path / "insula"
        text = (REPOSITORY / "packaging" / "insula").read_text()
        target.write_text(text.replace("@LIBRARY@", str(REPOSITORY / "src")))
        target.chmod(target.stat().st_mode | stat.S_IXUSR)
        return target

    def configure(self, text: str = "", audit: str = "") -> None:
        """Writes insulad.toml, for the next start: `text` before its table [audit], `audit` in that. No template of
        machines is made in advance, which takes seconds of a processor, unless `text` has `[machines]`."""
        none = "" if "[machines]" in text else '[machines]\ntemplate = "0"\n'
        self.settings.write_text(f'{text}\n{none}[audit]\npath = "{self.audit}"\n{audit}\n')
        self.settings.chmod(0o600)  # whatever the umask

    # -- life ------------------------------------------------------------------------------------------------

    def launch(self) -> None:
        """Starts insulad without waiting until it answers."""
        with self.log.open("ab") as log:
            if not self.wrapper:
                self._process = self._launcher.launch(self.environment, self.namespaces.host, log.fileno())
                return
            daemon = (sys.executable, "-I", "-m", "insula.api.daemon")
            command = Namespaces.wrap(self.namespaces.host, *self.wrapper, *daemon)
            self._process = subprocess.Popen(
                command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def start(self) -> None:
        """Starts insulad, as an init system does, and waits until everything is as it is wanted."""
        self.launch()
        self.wait_until_it_answers()
        self.wait_until_it_is_reconciled()

    def wait_until_it_is_reconciled(self) -> None:
        """It has looked at every instance, and has a monitor and a zygote."""

        def ready() -> bool:
            return self.cli.json("status")["reconciling"] == 0 and all(self.pid(name) for name in PROCESSES)

        until(ready, "every instance was looked at", START_TIMEOUT, interval=0.02)

    def wait_until_it_answers(self) -> None:
        def answers() -> bool:
            if self._process is not None and (status := self._process.poll()) is not None:
                raise RuntimeError(f"insulad ended with {status}:\n{self.last_lines()}")
            assert self._listens(), self.last_lines()  # to look is cheaper than a command that fails
            result = self.cli.run("status")
            assert result.status == 0, f"{result}\n{self.last_lines()}"
            return True

        until(answers, "insulad answers", START_TIMEOUT, interval=0.02)

    def _listens(self) -> bool:
        with socket.socket(socket.AF_UNIX) as client:
            try:
                client.connect(str(self.cli.socket))
            except (FileNotFoundError, ConnectionRefusedError):
                return False
        return True

    def last_lines(self, count: int = 25) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-count:])

    def stop(self) -> None:
        """SIGTERM, as an init system stops it: instances keep running."""
        assert self._process is not None
        self._process.terminate()
        assert self._process.wait(patiently(20)) == 0

    def reap(self) -> None:
        """After a kill: waits for the end of our child, so that no zombie stays."""
        if self._process is not None:
            self._process.wait(patiently(20))
            self._process = None

    # -- its processes ---------------------------------------------------------------------------------------

    def pid(self, name: str) -> int | None:
        """The PID of insulad, the monitor or the zygote, if it runs."""
        if name == "insulad":
            return self._process.pid if self._process and self._process.poll() is None else None
        try:
            pid, started = (self.run / PID_FILES[name]).read_text().split()
        except (FileNotFoundError, ValueError):
            return None
        return int(pid) if start_time(int(pid)) == int(started) else None

    def kill(self, name: str) -> bool:
        """kill -9; whether there was something to kill."""
        pid = self.pid(name)
        if pid is None:
            return False
        os.kill(pid, signal.SIGKILL)
        if name == "insulad":
            self.reap()
        return True

    def killed_during(self, cli: Cli, *words: str | Path, after: float) -> int:
        """Run a command, kill insulad so many seconds after its beginning, and start it again. Returns the command's
        exit status when the new one has looked at every instance."""
        with cli.start(*words) as command:
            time.sleep(after)
            until(lambda: self.pid("insulad"), "insulad runs")
            self.kill("insulad")
            self.launch()
            command.communicate(timeout=patiently(60))
        self.wait_until_it_answers()
        self.wait_until_it_is_reconciled()
        return command.returncode

    def descriptors(self, name: str) -> int:
        """How many files it has open."""
        return len(os.listdir(f"/proc/{self.pid(name)}/fd"))

    # -- observation -----------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        return Snapshot.take(self.prefix, self.namespaces.host, self.root, self.run)

    # -- the end ---------------------------------------------------------------------------------------------

    def down(self) -> None:
        """`insula down`, then the end of the three processes, as scripts/down does it."""
        self.cli.ok("down", timeout=120)
        assert self._process is not None and self._process.wait(patiently(20)) == 0
        for name in PROCESSES[1:]:
            if pid := self.pid(name):
                os.kill(pid, signal.SIGTERM)
            until(lambda name=name: self.pid(name) is None, f"the {name} ends")  # type: ignore[misc]

    def remove(self) -> None:
        """Whatever state it is in: kills its processes, and removes what it has on this machine."""
        for name in PROCESSES:
            self.kill(name)
        self._thaw()
        for _ in range(50):
            pids = self._pids_in_cgroups()
            if not pids:
                break
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        put_back_terminals(self.run)
        for line in reversed(Path("/proc/self/mountinfo").read_text().splitlines()):
            target = line.split()[4]
            if target.startswith((f"{self.path}/", f"/run/netns/{self.prefix}-")):
                subprocess.run(["umount", "--lazy", target], check=False, capture_output=True)
        for path in NETNS.glob(f"{self.prefix}-*"):
            path.unlink()
        self.namespaces.close()
        remove_tree(self.path)

    def _thaw(self) -> None:
        """In version 1, processes of paused instances do not even die."""
        for file in CGROUPS.glob(f"freezer/{self.prefix}/*/*/freezer.state"):
            with suppress(OSError):
                file.write_text("THAWED")

    def _pids_in_cgroups(self) -> list[int]:
        found = []
        for top in [CGROUPS / self.prefix, *CGROUPS.glob(f"*/{self.prefix}")]:
            for path, _, _ in os.walk(top):
                with suppress(OSError):  # ENODEV: it is being removed
                    found += [int(word) for word in Path(path, "cgroup.procs").read_text().split()]
        return found
