"""The runtime without the cloud: container/, kernel/, tree/, oci/ and a few modules of model/ work by themselves."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.cli import REPOSITORY
from tests.support.host import Host
from tests.system.oci.conftest import NAME, Box

PACKAGES = ("container", "kernel", "tree", "oci")
MODEL = ("__init__", "errors", "units", "stream", "cpython")
MODULES = ("__init__.py", "log.py", *(f"model/{name}.py" for name in MODEL))

SERVICE = """
import asyncio, json, sys
sys.path.insert(0, sys.argv[1])
from insula.container.service.client import Launch, Runtime

async def main():
    runtime = Runtime(sys.argv[2], 1)
    await runtime.open()
    for text in sys.argv[3:]:
        launch = Launch(**json.loads(text))
        await runtime.create(launch)
        await runtime.start(launch.id)
        print((await runtime.wait(launch.id)).exit_status)
        await runtime.flushed(launch.id)
        await runtime.delete(launch.id)
    await runtime.close()
    print(*sorted({name.split(".")[1] for name in sys.modules if name.startswith("insula.")}))

asyncio.run(main())
"""


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A directory with only these packages, as a wheel of their own would install them."""
    source, library = REPOSITORY / "src/insula", tmp_path / "library"
    for name in PACKAGES:
        shutil.copytree(source / name, library / "insula" / name, ignore=shutil.ignore_patterns("__pycache__"))
    (library / "insula/model").mkdir()
    for name in MODULES:
        shutil.copy(source / name, library / "insula" / name)
    return library


def test_insula_oci(box: Box, library: Path) -> None:
    """Isolated from the environment and from site-packages: besides it there is only the standard library."""
    code = f"import sys; sys.path.insert(0, {str(library)!r}); from insula.oci.main import main; sys.exit(main())"
    box.oci.program = [sys.executable, "-ISE", "-c", code]
    assert "user" in json.loads(box.oci.ok("features"))["linux"]["namespaces"]
    box.create("echo begin; exec sleep 600")
    assert box.oci.status(NAME) == "created"
    box.oci.ok("start", NAME)
    assert box.oci.status(NAME) == "running"
    assert box.oci.ok("exec", NAME, "/bin/echo", "joined") == "joined\n"
    box.oci.ok("kill", NAME, "KILL")
    box.oci.ok("delete", "--force", NAME)
    assert "begin" in box.output and box.left() == []


def test_the_service(tmp_path: Path, library: Path) -> None:
    host = Host(tmp_path)
    try:
        launches = [host.launch("sh", "-c", f"echo out; exit {status}") for status in (3, 4)]
        requests = [json.dumps(launch._asdict()) for launch in launches]
        command = [sys.executable, "-ISE", "-c", SERVICE, str(library), str(host.run), *requests]
        with (tmp_path / "out").open("w") as out:  # no pipe: the monitor keeps the streams
            subprocess.run(command, stdout=out, check=True, timeout=120)
        assert (tmp_path / "out").read_text().splitlines() == ["3", "4", "container kernel model"]
        assert [host.output(launch) for launch in launches] == ["out\n"] * 2
    finally:
        host.close()
