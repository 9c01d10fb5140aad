"""The runtime without the cloud, from its own wheel: container/, kernel/, tree/, oci/ and a few modules of model/."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.cli import REPOSITORY
from tests.support.host import Host
from tests.support.wait import patiently, until
from tests.system.oci.conftest import NAME, Box

SERVICE = """
import asyncio, json, sys
from insula.container.service.client import Launch, Runtime

async def main():
    runtime = Runtime(sys.argv[1], 1)
    await runtime.open()
    for text in sys.argv[2:]:
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


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment that has the wheel of packaging/oci and nothing else, made without a network."""
    path = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(path)]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(path / "bin/python")]
    run(build, cwd=REPOSITORY / "packaging/oci")
    [wheel] = path.glob("insula_oci-*.whl")
    run([sys.executable, "-m", "venv", "--without-pip", str(path)])
    run([*pip, "install", "--quiet", "--no-index", "--no-compile", str(wheel)])
    [library] = path.glob("lib/python3*/site-packages")
    assert sorted(each.name.partition("-")[0] for each in library.iterdir()) == ["insula", "insula_oci"]
    found = {each.name for each in (library / "insula").iterdir()}
    assert found == {"__init__.py", "log.py", "model", "container", "kernel", "oci", "tree"}
    return path


def run(command: list[str], cwd: Path | None = None) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=patiently(120))
    assert done.returncode == 0, done


def test_insula_oci(box: Box, environment: Path) -> None:
    """The installed command, and no environment variable that finds modules elsewhere."""
    box.oci.program = ["env", "-u", "PYTHONPATH", str(environment / "bin/insula-oci")]
    assert "user" in json.loads(box.oci.ok("features"))["linux"]["namespaces"]
    box.create("echo begin; exec sleep 600")
    assert box.oci.status(NAME) == "created"
    box.oci.ok("start", NAME)
    assert box.oci.status(NAME) == "running"
    assert box.oci.ok("exec", NAME, "/bin/echo", "joined") == "joined\n"
    until(lambda: "begin" in box.output, "it has begun")
    box.oci.ok("kill", NAME, "KILL")
    box.oci.ok("delete", "--force", NAME)
    assert box.left() == []


def test_the_service(tmp_path: Path, environment: Path) -> None:
    host = Host(tmp_path)
    try:
        launches = [host.launch("sh", "-c", f"echo out; exit {status}") for status in (3, 4)]
        requests = [json.dumps(launch._asdict()) for launch in launches]
        command = [str(environment / "bin/python"), "-IE", "-c", SERVICE, str(host.run), *requests]
        with (tmp_path / "out").open("w") as out:  # no pipe: the monitor keeps the streams
            subprocess.run(command, stdout=out, check=True, timeout=patiently(120))
        assert (tmp_path / "out").read_text().splitlines() == ["3", "4", "container kernel model"]
        assert [host.output(launch) for launch in launches] == ["out\n"] * 2
    finally:
        host.close()
