"""The container runtime without a daemon: a run directory and a root file system of busybox."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from insula.container.service.client import Launch, Runtime
from insula.kernel.cgroups import Cgroup
from tests.support.daemon import PID_FILES
from tests.support.logs import read_log
from tests.support.wait import patiently, until

BASE = 0x50000000
PROC = ["nosuid", "noexec", "nodev"]


class Host:
    """A run directory, and containers to launch below it. `spares`: as of `Runtime`."""

    def __init__(self, path: Path, spares: int = 2) -> None:
        self.path = path
        self.spares = spares
        self.run = path / "run"
        self.layer = path / "layer"
        self.cgroup = f"insula-test-{secrets.token_hex(4)}"
        self.run.mkdir()
        (self.layer / "bin").mkdir(parents=True)
        shutil.copy("/bin/busybox", self.layer / "bin/busybox")
        for name in ("sh", "sleep", "cat", "id", "tty", "stty", "usleep", "ls", "grep", "true", "kill", "readlink"):
            (self.layer / "bin" / name).symlink_to("busybox")

    def process(self, *args: str, **more: Any) -> dict[str, Any]:
        return {"args": list(args), "env": ["PATH=/bin"], "cwd": "/", "noNewPrivileges": True, **more}

    def launch(self, *args: str, layers: list[Path] | None = None, name: str = "", **more: Any) -> Launch:
        name = name or secrets.token_hex(8)
        home = self.path / name
        for part in ("upper", "work", "log"):
            (home / part).mkdir(parents=True)
        os.chown(home / "upper", BASE, BASE)
        config = {
            "root": {},
            "process": self.process(*args, terminal=bool(more.get("tty"))),
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc", "options": PROC},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
                {
                    "destination": "/dev/pts",
                    "type": "devpts",
                    "source": "devpts",
                    "options": ["nosuid", "noexec", "ptmxmode=0666", "mode=0620"],
                },
            ],
            "linux": {"maskedPaths": ["/proc/keys", "/proc/acpi"], "readonlyPaths": ["/proc/sys"]},
        }
        return Launch(
            id=name,
            config=config,
            lower=[str(p) for p in (layers or [self.layer])],
            upper=str(home / "upper"),
            work=str(home / "work"),
            id_base=BASE,
            cgroup=f"{self.cgroup}/{name}",
            log=str(home / "log"),
            **more,
        )

    def output(self, launch: Launch) -> str:
        """All that it printed; the monitor may have some of it left to write when it has ended."""
        assert launch.log
        until(lambda: not self._is_writing(launch.log), "the monitor has written the log")
        return b"".join(record.data for record in read_log(launch.log)).decode()

    def _is_writing(self, directory: str | None) -> bool:
        for fd in Path(f"/proc/{self.pid('monitor')}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                if os.readlink(fd).startswith(f"{directory}/"):
                    return True
        return False

    def pid(self, name: str) -> int:
        return int((self.run / PID_FILES[name]).read_text().split()[0])

    def kill(self, name: str) -> None:
        os.kill(self.pid(name), signal.SIGKILL)

    def close(self) -> None:
        for name in ("monitor", "zygote"):
            with contextlib.suppress(OSError):
                self.kill(name)
        group = Cgroup(self.cgroup)
        group.kill()
        group.remove()


def with_runtime(host: Host, body: Callable[[Runtime], Awaitable[None]]) -> None:
    async def main() -> None:
        async with opened(host) as runtime, asyncio.timeout(patiently(60)):
            await body(runtime)

    asyncio.run(main())


@contextlib.asynccontextmanager
async def opened(host: Host) -> AsyncIterator[Runtime]:
    runtime = Runtime(host.run, host.spares)
    await runtime.open()
    try:
        yield runtime
    finally:
        await runtime.close()


async def started(runtime: Runtime, launch: Launch) -> None:
    await runtime.create(launch)
    await runtime.start(launch.id)
