"""The lookup of users in layers agrees with overlayfs, with whiteouts and opaque directories too."""

from __future__ import annotations

import contextlib
import os
import random
import stat
from pathlib import Path

import pytest

from insula.control.instances.drivers.container.users import LayeredRoot, resolve
from insula.kernel import syscalls
from insula.model.errors import Invalid
from tests.forked import forked

PATHS = ("/etc/passwd", "/etc/group", "/etc/sub/passwd")


def whiteout(path: Path) -> None:
    os.mknod(path, stat.S_IFCHR, os.makedev(0, 0))


def random_layer(layer: Path, rng: random.Random) -> None:
    layer.mkdir()
    for directory in ("etc", "etc/sub"):
        with contextlib.suppress(OSError):
            match rng.randrange(6):
                case 0 | 1 | 2:
                    (layer / directory).mkdir()
                case 3:
                    (layer / directory).mkdir()
                    os.setxattr(layer / directory, "trusted.overlay.opaque", b"y")
                case 4:
                    whiteout(layer / directory)
    for name in PATHS:
        path = layer / name[1:]
        with contextlib.suppress(OSError):
            match rng.randrange(5):
                case 0 | 1:
                    path.write_text(f"{layer.name}{name}")
                case 2:
                    whiteout(path)
                case 3:
                    path.symlink_to(rng.choice(["group", "sub/passwd", "../etc/passwd", "/etc/sub/passwd"]))


def test_the_same_as_overlayfs(tmp_path: Path) -> None:
    def child() -> int:
        syscalls.unshare(syscalls.CLONE_NEWNS)
        syscalls.mount(None, "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
        syscalls.mount("tmpfs", tmp_path, "tmpfs")
        rng = random.Random(42)
        readable = 0
        for attempt in range(200):
            base = tmp_path / str(attempt)
            base.mkdir()
            layers = [base / f"layer{n}" for n in range(3)]
            for layer in layers:
                random_layer(layer, rng)
            merged = base / "merged"
            merged.mkdir()
            syscalls.mount("overlay", merged, "overlay", syscalls.MS_RDONLY, "lowerdir=" + ":".join(map(str, layers)))
            for path in PATHS:
                with LayeredRoot(layers) as split, LayeredRoot([merged]) as whole:
                    answers = []
                    for root in (split, whole):
                        try:
                            answers.append(root.read(path))
                        except Invalid as error:
                            answers.append(str(error).encode())
                assert answers[0] == answers[1], (attempt, path, answers)
                readable += answers[0].startswith(b"layer")
            syscalls.umount2(merged)
        return readable

    assert forked(child) > 100  # or else nothing was compared


def test_a_device_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    os.mknod(tmp_path / "etc/passwd", stat.S_IFCHR | 0o666, os.makedev(1, 5))  # /dev/zero, which never ends
    with pytest.raises(Invalid, match="regular"):
        resolve("root", [tmp_path])


def test_whiteout_in_the_upper_layer(tmp_path: Path) -> None:
    low, up = tmp_path / "low", tmp_path / "up"
    for layer in (low, up):
        (layer / "etc").mkdir(parents=True)
    (low / "etc/passwd").write_text("web:x:33:33::/:\n")
    assert resolve("web", [low], upper=str(up)).uid == 33
    whiteout(up / "etc/passwd")
    with pytest.raises(Invalid):
        resolve("web", [low], upper=str(up))
