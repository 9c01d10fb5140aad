"""insula cp: the host's root reads and writes files by paths that the container may change at any moment.

CVE-2018-15664: Docker resolved the path in the container's root and then used it from the host's; a symbolic link that
came in between led anywhere. Here each component is opened inside of the container's mount namespace, after a chroot,
so that whenever a link is met it is met inside.
"""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

from tests.support.wait import until
from tests.system.escape.attacks import races
from tests.system.escape.cell import Cell

SECONDS = 2.0


def test_copying_while_links_come_and_go(cell: Cell, tmp_path: Path) -> None:
    """The container swaps a directory with a link to one of the host's, all the while files are copied in and out."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("the host's")
    (tmp_path / "file").write_text("x")
    cell.gets(races.prepare, "/root", str(outside))
    racer = cell.start(races.exchange, "/root/box", "/root/link", SECONDS, "/root/ready")
    until(lambda: cell.cli.run("exec", cell.name, "test", "-e", "/root/ready").status == 0, "it races")
    seen: set[str] = set()
    number = 0
    while racer.poll() is None:
        number += 1
        cell.cli.run("cp", tmp_path / "file", f"{cell.name}:/root/box/in{number}")
        if cell.cli.run("cp", f"{cell.name}:/root/box/secret", tmp_path / "got").status == 0:
            seen.add((tmp_path / "got").read_text())
        cell.cli.run("cp", f"{cell.name}:/root/box", tmp_path / f"tree{number}")
        tree = tmp_path / f"tree{number}"
        if tree.is_dir() and not tree.is_symlink():  # a link is copied as a link
            seen |= {path.read_text() for path in tree.rglob("secret")}
    assert cell.finish(racer).value > 1000
    assert os.listdir(outside) == ["secret"], "nothing came out"
    assert seen == {"the container's own"}, "and that is the control: copies do succeed meanwhile"


def test_the_race_is_won_where_nobody_guards(tmp_path: Path) -> None:
    """The control: who looks first and opens then, as docker-cp did, is led out soon."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("the host's")
    races.prepare(str(tmp_path), str(outside))
    box, link = tmp_path / "box", tmp_path / "link"
    racer = os.fork()
    if racer == 0:
        races.exchange(str(box), str(link), 2 * SECONDS)
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
