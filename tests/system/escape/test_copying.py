"""`insula cp`: the host's root reads and writes files by paths that the container may change at any moment.

CVE-2018-15664: Docker resolved the path in the container's root and then used it from the host's; a symbolic link that
came in between led anywhere. Here each component is opened inside of the container's mount namespace, after a chroot,
so that whenever a link is met it is met inside.

Who may mount in a container, with CAP_SYS_ADMIN, can make a name mean another inode while a file is written under it.
So copies are made with the IDs of the container, to which that inode, were it the host's, is a stranger's.
"""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from insula.kernel import mounts, syscalls
from tests.forked import forked
from tests.support.cli import Cli
from tests.support.wait import patiently, until
from tests.system.escape.attacks import races
from tests.system.escape.cell import Cell
from tests.system.escape.conftest import CellFactory

TRIES = 5


def test_copying_while_links_come_and_go(cell: Cell, tmp_path: Path) -> None:
    """The container swaps a directory with a link to one of the host's, all the while files are copied in and out."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("the host's")
    (tmp_path / "file").write_text("x")
    cell.gets(races.prepare, "/root", str(outside))
    racer = cell.start(races.exchange, "/root/box", "/root/link", patiently(30), "/root/ready")
    until(lambda: cell.cli.run("exec", cell.name, "test", "-e", "/root/ready").status == 0, "it races")
    seen: set[str] = set()
    number = 0
    while number < TRIES or (not seen and racer.poll() is None):
        number += 1
        cell.cli.run("cp", tmp_path / "file", f"{cell.name}:/root/box/in{number}")
        if cell.cli.run("cp", f"{cell.name}:/root/box/secret", tmp_path / "got").status == 0:
            seen.add((tmp_path / "got").read_text())
        cell.cli.run("cp", f"{cell.name}:/root/box", tmp_path / f"tree{number}")
        tree = tmp_path / f"tree{number}"
        if tree.is_dir() and not tree.is_symlink():  # a link is copied as a link
            seen |= {path.read_text() for path in tree.rglob("secret")}
    assert racer.poll() is None, "it has raced all the time"
    cell.cli.ok("exec", cell.name, "touch", "/root/ready.stop")
    assert cell.finish(racer).value > 1000
    assert os.listdir(outside) == ["secret"], "nothing came out"
    assert seen == {"the container's own"}, "and that is the control: copies do succeed meanwhile"


def test_the_race_succeeds_without_the_barrier(tmp_path: Path) -> None:
    """The control: a program that checks first and opens later, as docker-cp did, is soon led outside."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("the host's")
    races.prepare(str(tmp_path), str(outside))
    box, link = tmp_path / "box", tmp_path / "link"
    racer = os.fork()
    if racer == 0:
        races.exchange(str(box), str(link), patiently(15))
        os._exit(0)
    won = False
    while not won and os.waitpid(racer, os.WNOHANG)[0] == 0:
        if not box.is_symlink():  # the look
            try:
                shutil.copyfile(box / "secret", tmp_path / "got")  # the use
            except OSError:
                continue
            won = (tmp_path / "got").read_text() == "the host's"
    assert won
    os.kill(racer, signal.SIGKILL)
    os.waitpid(racer, 0)


# -- a name that comes to mean another inode ---------------------------------------------------------------------------

State = tuple[int, int, int, float, object]


def state(path: Path) -> State:
    """Whatever a copy could change."""
    found = path.stat()
    inside = path.read_text() if path.is_file() else sorted(os.listdir(path))
    return found.st_uid, found.st_gid, found.st_mode, found.st_mtime, inside


@pytest.fixture(params=["--nesting", "--cap-add=SYS_ADMIN"])
def mounting(cells: CellFactory, tenant: Cli, request: pytest.FixtureRequest) -> Cell:
    """A container that may mount."""
    return cells(tenant, request.param)


@pytest.fixture
def victims(mounting: Cell, tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """A file and a directory of the host's root, which the container can see as a bound one."""
    file, directory = tmp_path / "victim", tmp_path / "victims"
    file.write_text("the host's")
    directory.mkdir()
    for path in (file, directory):
        path.chmod(0o600 if path.is_file() else 0o755)
    mounting.show(file=lambda: mounts.bind(str(file)), directory=lambda: mounts.bind(str(directory)))
    yield file, directory


def streamed(data: bytes) -> tuple[bytes, bytes]:
    """An archive with a file ``big``, in two parts, cut in its data."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        info = tarfile.TarInfo("big")
        info.size, info.mode = len(data), 0o4777
        tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()[: len(data) // 2], stream.getvalue()[len(data) // 2 :]


def test_another_inode_at_the_name_while_a_file_is_written(mounting: Cell, victims: tuple[Path, Path]) -> None:
    cli, name = mounting.cli, mounting.name
    cli.ok("exec", name, "mkdir", "/drop")
    before = state(victims[0])
    attacker = mounting.start(races.cover, "/seen/file", "/drop")
    first, rest = streamed(b"x" * (4 << 20))
    with subprocess.Popen(
        cli.command("cp", "-", f"{name}:/drop"),
        env=cli.environment(),
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as copying:
        assert copying.stdin and copying.stderr
        copying.stdin.write(first)
        copying.stdin.flush()
        until(lambda: cli.run("exec", name, "test", "-e", "/drop.covered").status == 0, "something is mounted on it")
        copying.stdin.write(rest)
        copying.stdin.close()
        copying.stderr.read()
    cli.ok("exec", name, "touch", "/drop.stop")
    assert mounting.finish(attacker).value, "it has mounted the host's file over what was written"
    assert state(victims[0]) == before
    cli.ok("exec", name, "mkdir", "/quiet")
    assert cli.raw("cp", "-", f"{name}:/quiet", stdin=first + rest).returncode == 0
    assert cli.ok("exec", name, "stat", "-c", "%u:%g %a %s", "/quiet/big") == f"0:0 4777 {4 << 20}", "the control"


def test_another_inode_at_the_name_from_the_beginning(mounting: Cell, victims: tuple[Path, Path]) -> None:
    """Directories stay where they are, and are given the owner and the mode that the archive says."""
    cli, name = mounting.cli, mounting.name
    before = [state(path) for path in victims]
    cli.ok("exec", name, "mkdir", "-p", "/place/victims", "/place/own")
    cli.ok("exec", name, "touch", "/place/victim")
    mounting.gets(races.bind, "/seen/directory", "/place/victims")
    mounting.gets(races.bind, "/seen/file", "/place/victim")
    for members in (
        [("victims", tarfile.DIRTYPE)],
        [("victims", tarfile.DIRTYPE), ("victims/file", tarfile.REGTYPE)],
        [("victims/made/file", tarfile.REGTYPE)],
        [("victims/link", tarfile.SYMTYPE)],
        [("victim", tarfile.REGTYPE)],
    ):
        result = cli.raw("cp", "-", f"{name}:/place", stdin=archive_of(members))
        assert result.returncode == 1 and b"'/place/victim" in result.stderr, result
        assert b"Permission denied" in result.stderr or b"not permitted" in result.stderr
        assert [state(path) for path in victims] == before
    archive = archive_of([("own", tarfile.DIRTYPE), ("own/file", tarfile.REGTYPE), ("file", tarfile.REGTYPE)])
    assert cli.raw("cp", "-", f"{name}:/place", stdin=archive).returncode == 0
    shown = cli.ok("exec", name, "stat", "-c", "%n %u:%g %a", "/place/own", "/place/own/file", "/place/file")
    assert shown.split("\n") == ["/place/own 7:8 777", "/place/own/file 7:8 777", "/place/file 7:8 777"], "the control"
    for path in ("/place/victim", "/place/victims", "/seen/file"):
        assert cli.run("cp", f"{name}:{path}", "-").status == (0 if path.endswith("s") else 1), "what it may not read"


def archive_of(members: list[tuple[str, bytes]]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, kind in members:
            info = tarfile.TarInfo(name)
            info.type, info.mode, info.uid, info.gid, info.linkname = kind, 0o777, 7, 8, "nowhere"
            tar.addfile(info)
    return stream.getvalue()


def test_copying_by_name_as_host_root_exposes_the_inode(tmp_path: Path) -> None:
    """The control: what `cp` was, by a process in a mount namespace of its own."""
    victim, name = tmp_path / "victim", tmp_path / "name"
    victim.write_text("the host's")

    def copy() -> None:
        syscalls.unshare(syscalls.CLONE_NEWNS)
        syscalls.mount(None, "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
        name.write_text("written")
        races.bind(str(victim), str(name))  # meanwhile
        os.chown(name, 100_000, 100_000)

    forked(copy)
    assert victim.stat().st_uid == 100_000
