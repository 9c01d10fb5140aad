"""The root of an image for virtual machines: what an overlay of its layers shows, and nothing of the host."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest

from insula.image import erofs
from insula.image.job import Job
from insula.model.errors import Failed


def layer(path: Path, *files: str) -> Path:
    path.mkdir()
    for name in files:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(f"{name} of {path.name}")
    return path


def made(tmp_path: Path, *layers: Path) -> Path:
    """The files of the root that is made of layers, topmost first."""
    work = tmp_path / "work"
    work.mkdir()
    erofs.make(layers, tmp_path / "root", work, Job())
    root = tmp_path / "extracted"
    done = subprocess.run(["fsck.erofs", f"--extract={root}", tmp_path / "root"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return root


def test_layers_hide_and_delete_what_is_below(tmp_path: Path) -> None:
    lower = layer(tmp_path / "lower", "kept", "hidden", "deleted", "directory/deleted", "closed")
    upper = layer(tmp_path / "upper", "hidden", "directory/added")
    for name in ("deleted", "directory/deleted"):
        os.mknod(upper / name, stat.S_IFCHR, 0)
    (lower / "closed").chmod(0o400)
    os.chown(lower / "closed", 1000, 1001)
    root = made(tmp_path, upper, lower)
    found = {str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir()}
    assert found == {"kept", "hidden", "directory/added", "closed"}
    assert (root / "hidden").read_text() == "hidden of upper" and (root / "kept").read_text() == "kept of lower"
    status = (root / "closed").stat()
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (1000, 1001, 0o400)
    assert not list((tmp_path / "work/tree").iterdir()), "the overlay was its own"


def test_links_of_an_image_lead_nowhere(tmp_path: Path) -> None:
    only = layer(tmp_path / "only", "file")
    (only / "shadow").symlink_to("/etc/shadow")
    (only / "up").symlink_to("../../../../../etc")
    os.mkfifo(only / "fifo")
    root = made(tmp_path, only)
    assert os.readlink(root / "shadow") == "/etc/shadow" and os.readlink(root / "up") == "../../../../../etc"
    assert stat.S_ISFIFO((root / "fifo").lstat().st_mode)


def test_a_failure_says_why_and_leaves_no_root(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    with pytest.raises(Failed) as refused:
        erofs.make([tmp_path / "nowhere"], tmp_path / "root", tmp_path / "work", Job())
    assert "nowhere" in refused.value.message and refused.value.hint
    assert not (tmp_path / "root").exists()
