"""Targets of `mounts`: dangling links, modes, a read-only /dev, `cwd`."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.support.cli import Terminal
from tests.system.oci.conftest import Box

BASE = 0x50000000
users = pytest.mark.parametrize("user", [False, True])


@pytest.fixture
def file(box: Box) -> Path:
    path = box.path / "file"
    path.write_text("of the host\n")
    return path


# -- dangling links ----------------------------------------------------------------------------------------------------


@users
@pytest.mark.parametrize(
    ("link", "made"),
    [
        ("../run/systemd/resolve/stub-resolv.conf", "/run/systemd/resolve/stub-resolv.conf"),
        ("/run/resolv.conf", "/run/resolv.conf"),
        ("../../../../../run/resolv.conf", "/run/resolv.conf"),
    ],
)
def test_a_file_at_the_end_of_a_dangling_link(box: Box, file: Path, link: str, made: str, user: bool) -> None:
    """As in an image that has systemd: every engine binds /etc/resolv.conf."""
    (box.rootfs / "etc").mkdir()
    (box.rootfs / "etc/resolv.conf").symlink_to(link)
    if user:
        box.map_ids((0, BASE, 65536))
    box.bind(file, "/etc/resolv.conf", "ro")
    outside = os.path.lexists(made)
    assert box.out(f"cat /etc/resolv.conf {made}; readlink /etc/resolv.conf") == f"of the host\nof the host\n{link}\n"
    assert (box.rootfs / made.lstrip("/")).read_text() == ""
    assert os.path.lexists(made) == outside


def test_a_dangling_component_on_the_way(box: Box, file: Path) -> None:
    (box.rootfs / "one").symlink_to("/two/./deep")
    (box.rootfs / "two").symlink_to("three")
    box.bind(file, "/one/file")
    box.mounts.append({"destination": "/one/tmpfs", "type": "tmpfs", "source": "tmpfs"})
    assert box.out("cat /three/deep/file; stat -c %a /three/deep; ls -A /one").split("\n")[:2] == ["of the host", "755"]


def test_magic_links_are_followed_nowhere(box: Box, file: Path) -> None:
    """They lead to files, not to paths, and so anywhere: openat2(2), RESOLVE_NO_MAGICLINKS."""
    (box.rootfs / "etc").mkdir()
    (box.rootfs / "etc/resolv.conf").symlink_to("/proc/self/root/run/resolv.conf")
    box.bind(file, "/etc/resolv.conf")
    assert "symbolic links" in box.refused() and not (box.rootfs / "run").exists()


def test_a_dev_that_is_a_link(box: Box) -> None:
    """Without a mount on it, devices and links would be made wherever it leads in the root."""
    box.mounts[:] = [entry for entry in box.mounts if not entry["destination"].startswith("/dev")]
    (box.rootfs / "dev").symlink_to("/elsewhere")
    (box.rootfs / "elsewhere").mkdir()
    assert "/dev" in box.refused() and os.listdir(box.rootfs / "elsewhere") == []
    (box.rootfs / "dev").unlink()
    assert "null" in box.out("ls /dev"), "the control"


def test_links_in_a_circle(box: Box, file: Path) -> None:
    (box.rootfs / "one").symlink_to("two")
    (box.rootfs / "two").symlink_to("one")
    box.bind(file, "/one/file")
    assert "cannot mount /one/file: " in box.refused() and "symbolic links" in box.refused()


# -- tmpfs -------------------------------------------------------------------------------------------------------------


@users
def test_a_tmpfs_has_the_mode_of_the_hidden_directory(box: Box, user: bool) -> None:
    for name, mode in (("kept", 0o750), ("sticky", 0o1733), ("asked", 0o750)):
        (box.rootfs / name).mkdir()
        (box.rootfs / name).chmod(mode)
    if user:
        box.map_ids((0, BASE, 65536))
    for name, options in (("kept", []), ("sticky", ["size=64k"]), ("asked", ["mode=711"]), ("missing", [])):
        box.mounts.append({"destination": f"/{name}", "type": "tmpfs", "source": "tmpfs", "options": options})
    found = box.out("stat -c '%n %a %u' /kept /sticky /asked /missing").splitlines()
    assert found == ["/kept 750 0", "/sticky 1733 0", "/asked 711 0", "/missing 1777 0"]


@users
def test_a_read_only_tmpfs_takes_mounts(box: Box, file: Path, user: bool) -> None:
    """It becomes read-only when all is mounted."""
    if user:
        box.map_ids((0, BASE, 65536))
    box.mounts.append({"destination": "/mnt", "type": "tmpfs", "source": "tmpfs", "options": ["ro"]})
    box.bind(file, "/mnt/deep/file")
    result = box.run("cat /mnt/deep/file; touch /mnt/x /mnt/deep/x")
    assert result.out == "of the host\n" and result.err.count("Read-only file system") == 2


@users
def test_a_read_only_dev(box: Box, user: bool) -> None:
    if user:
        box.map_ids((0, BASE, 65536))
    [dev] = [entry for entry in box.mounts if entry["destination"] == "/dev"]
    dev["options"].append("ro")
    box.linux["devices"] = [{"path": "/dev/deep/zero", "type": "c", "major": 1, "minor": 5}]
    result = box.run("echo x > /dev/null; echo x > /dev/shm/x; ls /dev /dev/deep; touch /dev/x; touch /dev/deep/x")
    assert {"null", "fd", "pts", "shm", "mqueue", "zero"} <= set(result.out.split())
    assert result.err.count("Read-only file system") == 2 and result.err.count("\n") == 2


@pytest.mark.parametrize("dev", ["tmpfs", "none"])
def test_a_terminal_where_nothing_is_writable(box: Box, dev: str) -> None:
    """/dev/console is a file that the terminal is bound over."""
    box.config["root"]["readonly"] = True
    for entry in list(box.mounts):
        if entry["destination"] == "/dev":
            entry["options"].append("ro") if dev == "tmpfs" else box.mounts.remove(entry)
    box.process["terminal"] = True
    box.script("touch /dev/x; test -c /dev/console && tty < /dev/console")
    command = box.oci.command("run", "--bundle", box.path, "box")
    with Terminal(command, {"PATH": os.environ["PATH"], "TERM": "xterm"}, 24, 80) as terminal:
        assert terminal.wait() == 0, terminal.seen
        assert "Read-only file system" in terminal.seen


# -- the working directory ---------------------------------------------------------------------------------------------


@users
@pytest.mark.parametrize("readonly", [False, True])
def test_a_missing_working_directory_is_made(box: Box, readonly: bool, user: bool) -> None:
    """It is made, as runc and crun do: root's, with mode 755."""
    if user:
        box.map_ids((0, BASE, 65536))
    (box.rootfs / "link").symlink_to("/gone")
    box.config["root"]["readonly"] = readonly
    box.process |= {"cwd": "/link/such", "user": {"uid": 7, "gid": 8}}
    script = "pwd; stat -c '%a %u %g' . /gone/such; touch /gone/such/x 2>/dev/null || echo refused"
    assert box.out(script).split("\n") == ["/gone/such", "755 0 0", "755 0 0", "refused", ""]


def test_a_working_directory_on_a_mount(box: Box) -> None:
    volume = box.path / "volume"
    volume.mkdir()
    box.bind(volume, "/mnt")
    box.process["cwd"] = "/mnt/deep/er"
    assert box.out("pwd") == "/mnt/deep/er\n" and (volume / "deep/er").is_dir()


@pytest.mark.parametrize("place", ["/mnt/deep", "/bin/sh", "/bin/sh/deep"])
def test_a_working_directory_that_cannot_be_made(box: Box, place: str) -> None:
    volume = box.path / "volume"
    volume.mkdir()
    box.bind(volume, "/mnt", "ro")
    box.process["cwd"] = place
    assert "working directory" in box.refused() and os.listdir(volume) == []


def test_exec_makes_no_working_directory(box: Box) -> None:
    box.start()
    assert "enter the working directory" in box.oci.fails("exec", "--cwd", "/gone", "box", "true")
    assert not (box.rootfs / "gone").exists()


def test_a_link_that_is_copied(box: Box, tmp_path: Path) -> None:
    """An option of crun: a source that is a symbolic link is made again, wherever it leads."""
    for content in ("nowhere/at/all", "/etc/shadow", "../../../../etc/passwd"):
        (link := tmp_path / "link").symlink_to(content)
        box.bind(link, "/new/directory/link", "copy-symlink")
        assert box.out("readlink /new/directory/link; grep -c new/directory /proc/mounts; :") == f"{content}\n0\n"
        assert box.out("readlink /new/directory/link") == f"{content}\n", "it is there already, and the same"
        shutil.rmtree(box.rootfs / "new")
        link.unlink()
        box.mounts.pop()
    (file := tmp_path / "file").write_text("content\n")
    box.bind(file, "/file", "copy-symlink")
    assert box.out("cat /file") == "content\n", "what is no link is mounted"


def test_a_link_that_is_copied_replaces_nothing_and_leads_nowhere_outside(box: Box, tmp_path: Path) -> None:
    (link := tmp_path / "link").symlink_to("content")
    (outside := tmp_path / "outside").mkdir()
    (box.rootfs / "out").symlink_to(outside)
    box.bind(link, "/out/link", "copy-symlink")
    assert box.out("readlink /out/link") == "content\n"
    assert list(outside.iterdir()) == []
    (box.rootfs / "there").write_text("")
    (box.rootfs / "other").symlink_to("other-content")
    for place in ("/there", "/other", "/tmp"):
        box.mounts[-1]["destination"] = place
        assert f"mount {place}: {place}: File exists" in box.refused()
