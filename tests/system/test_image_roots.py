"""Root file systems of images with missing parts or dangling links: parts are made, inside the root."""

from __future__ import annotations

import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.cli import Cli
from tests.support.daemon import Daemon
from tests.support.images import Layout, member, tar

BUSYBOX = member("bin/sh", Path("/bin/busybox").read_bytes(), mode=0o755)
APPLETS = [member(f"bin/{name}", linkname="sh") for name in ("cat", "readlink", "stat", "true", "touch", "id")]
ManagedInstance = tuple[tarfile.TarInfo, bytes]
Load = Callable[..., None]
TWICE = (1, 2)
"""The first launch after another one takes a container that was made ahead, or not: both ways are the same."""


@pytest.fixture
def load(cli: Cli, tmp_path: Path) -> Iterator[Load]:
    def load_(*members: ManagedInstance, **process: str) -> None:
        layout = Layout()
        layer = tar(member("bin"), BUSYBOX, *APPLETS, *members)
        layout.image([layer], name="odd:latest", process=process)
        path = tmp_path / "odd.tar"
        path.write_bytes(layout.tar())
        cli.ok("image", "load", str(path))

    yield load_
    cli.ok("image", "rm", "odd")


@pytest.mark.parametrize("target", ["../run/systemd/resolve/stub.conf", "/gone/x", "../../../../gone", "beside"])
def test_files_of_etc_that_are_dangling_links(cli: Cli, load: Load, target: str) -> None:
    names = ("resolv.conf", "hosts", "hostname")
    load(member("etc"), *(member(f"etc/{name}", linkname=f"{target}.{name}") for name in names))
    for _ in TWICE:
        script = "cat /etc/hostname /etc/hosts /etc/resolv.conf; readlink /etc/hosts"
        out = cli.ok("run", "--rm", "--hostname", "named", "odd", "sh", "-c", script).splitlines()
        assert out[0] == "named" and out[-1] == f"{target}.hosts"
        assert any(line.split()[-1:] == ["localhost"] for line in out) and any("nameserver" in line for line in out)
    assert not Path("/gone").exists() and not Path(f"{target}.hosts").exists()


def test_while_files_are_renamed(cli: Cli, load: Load, tmp_path: Path) -> None:
    """Anywhere on the host; openat2(2) then answers EAGAIN where a link of the image has ``..``."""
    load(member("etc"), member("run/a/real", b""), member("etc/resolv.conf", linkname="../run/a/real"))
    (tmp_path / "x").mkdir()
    script = "import os, sys\nwhile True: os.rename('x', 'y'); os.rename('y', 'x')"
    with subprocess.Popen(["python3", "-ISc", script], cwd=tmp_path) as renaming:
        try:
            for _ in range(6):
                assert "nameserver" in cli.ok("run", "--rm", "odd", "cat", "/etc/resolv.conf")
        finally:
            renaming.kill()


def test_a_working_directory_that_is_not_there(cli: Cli, load: Load) -> None:
    load(User="7:8", WorkingDir="/srv/not/there")
    show = ("odd", "sh", "-c", "readlink /proc/self/cwd; stat -c '%u %g %a' .; touch x")
    for _ in TWICE:
        assert cli.ok("run", "--rm", *show) == "/srv/not/there\n7 8 755"
        assert cli.ok("run", "--rm", "-w", "/none/such", *show) == "/none/such\n7 8 755"
        assert cli.ok("run", "--rm", "-u", "0", "-w", "/none/such", *show) == "/none/such\n0 0 755"


def test_what_is_mounted_on_is_not_made_in_each_instance(daemon: Daemon, cli: Cli, load: Load) -> None:
    """It comes from a layer below the image's, or is made in the instance's own directory if there is none."""
    load()  # without /etc, /proc, /sys and /dev
    layer = daemon.root / "mountpoints"
    made: list[list[str]] = []
    for path in (layer, layer.with_name("elsewhere")):
        layer.rename(path)
        try:
            cli.ok("run", "-d", "--name", "own", "odd", "sh", "-c", "touch /etc/own; exec cat /etc/hostname")
            upper = daemon.root / "instances" / cli.json("inspect", "own")[0]["instance"]["id"] / "upper"
            assert cli.ok("wait", "own") == "0" and cli.ok("logs", "own") == "own"
            made.append(sorted(str(each.relative_to(upper)) for each in upper.rglob("*")))
        finally:
            path.rename(layer)
            cli.ok("rm", "-f", "own")
    etc = ["etc/hostname", "etc/hosts", "etc/own", "etc/resolv.conf"]
    assert made == [["etc", "etc/own"], ["dev", "etc", *etc, "proc", "sys"]]
