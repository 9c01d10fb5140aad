"""`mounts.make_target`: missing parts of a path are made, links are followed, and all is inside of the root."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from insula.kernel import mounts, syscalls
from tests.support.descriptors import no_descriptor_left

NAMES = ("a", "b", "c")
paths = st.lists(st.sampled_from((*NAMES, "..", ".", "")), min_size=1, max_size=5).map("/".join)
links = st.tuples(paths, st.booleans()).map(lambda drawn: ("/" if drawn[1] else "") + (drawn[0] or "."))


def model(tree: dict[tuple[str, ...], str], path: str) -> tuple[str, ...]:
    """path_resolution(7) in a root whose links are `tree`, and all else directories; OSError after 40 links."""
    at: list[str] = []
    wanted, followed = path.split("/"), 0
    while wanted:
        name = wanted.pop(0)
        if name in ("", "."):
            continue
        if name == "..":
            at = at[:-1]
            continue
        if (target := tree.get((*at, name))) is None:
            at.append(name)
            continue
        followed += 1
        if followed > 40:
            raise OSError(errno.ELOOP, path)
        at = [] if target.startswith("/") else at
        wanted = target.split("/") + wanted
    return tuple(at)


@given(st.dictionaries(st.lists(st.sampled_from(NAMES), min_size=1, max_size=2).map(tuple), links, max_size=5), paths)
def test_any_links_anywhere(tree: dict[tuple[str, ...], str], path: str) -> None:
    with TemporaryDirectory() as directory:
        top = Path(os.path.realpath(directory), "root")
        top.mkdir()
        made = {}
        for place, target in sorted(tree.items()):
            if not any(place[:n] in made for n in range(1, len(place))):
                top.joinpath(*place[:-1]).mkdir(parents=True, exist_ok=True)
                if not os.path.lexists(top.joinpath(*place)):
                    top.joinpath(*place).symlink_to(target)
                    made[place] = target
        root = os.open(top, os.O_PATH)
        try:
            expected = model(made, path)
        except OSError:
            expected = None
        try:
            fd = mounts.make_target(root, path, directory=True)
        except OSError as error:
            assert (error.errno, expected) == (errno.ELOOP, None)
        else:
            assert expected is not None
            assert os.readlink(f"/proc/self/fd/{fd}") == str(top.joinpath(*expected))
            os.close(fd)
        os.close(root)
        assert os.listdir(top.parent) == ["root"]


@pytest.mark.parametrize(
    ("link", "made"),
    [
        ("../run/x/resolv.conf", "run/x/resolv.conf"),
        ("/run/x/resolv.conf", "run/x/resolv.conf"),
        ("../../../../up/resolv.conf", "up/resolv.conf"),
        ("beside", "etc/beside"),
    ],
)
def test_a_file_at_the_end_of_a_dangling_link(tmp_path: Path, link: str, made: str) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/resolv.conf").symlink_to(link)
    root = os.open(tmp_path, os.O_PATH)
    os.close(mounts.make_target(root, "/etc/resolv.conf", directory=False))
    assert (tmp_path / made).is_file() and (tmp_path / "etc/resolv.conf").is_symlink()
    os.close(mounts.make_target(root, "/etc/resolv.conf", directory=False))  # the fast way: it is there
    os.close(root)


def test_links_are_refused_where_they_must_not_be_followed(tmp_path: Path) -> None:
    (tmp_path / "proc").symlink_to("elsewhere")
    root = os.open(tmp_path, os.O_PATH)
    with pytest.raises(OSError, match="symbolic links") as caught:
        mounts.make_target(root, "/proc/sys", directory=True, links=False)
    assert caught.value.errno == errno.ELOOP and os.listdir(tmp_path) == ["proc"]
    os.close(root)


@pytest.mark.parametrize("missing", [True, False])
def test_as_many_links_as_the_kernel_follows_and_no_more(tmp_path: Path, missing: bool) -> None:
    """40, path_resolution(7), whether the kernel walks the path or we do because something is missing of it."""
    root = os.open(tmp_path, os.O_PATH)
    for number in range(41):
        (tmp_path / f"l{number}").symlink_to(f"l{number + 1}")
    if not missing:
        (tmp_path / "l41").mkdir()
    with pytest.raises(OSError, match="symbolic links") as caught:
        mounts.make_target(root, "l0", directory=True)
    assert caught.value.errno == errno.ELOOP and (tmp_path / "l41").exists() != missing
    os.close(mounts.make_target(root, "l1", directory=True))
    assert (tmp_path / "l41").is_dir()
    os.close(root)


@pytest.mark.parametrize(("path", "links"), [("new/../l0", True), ("new/../loop", True), ("new/../l41", False)])
def test_links_after_a_missing_component_are_bounded(tmp_path: Path, path: str, links: bool) -> None:
    """The kernel never sees them: it gives up at what is missing, and we walk on."""
    root = os.open(tmp_path, os.O_PATH)
    for number in range(42):
        (tmp_path / f"l{number}").symlink_to(f"l{number + 1}")
    (tmp_path / "l42").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="symbolic links") as caught:
        mounts.make_target(root, path, directory=True, links=links)
    assert caught.value.errno == errno.ELOOP
    os.close(mounts.make_target(root, "more/../l2", directory=True))
    os.close(root)


def test_made_directories_belong_to_the_caller_and_others_may_not_write(tmp_path: Path) -> None:
    root = os.open(tmp_path, os.O_PATH)
    old = os.umask(0)
    try:
        with no_descriptor_left():
            for _ in range(2):  # the second time all is there
                os.close(mounts.make_target(root, "/a/b//./file", directory=False))
                os.close(mounts.make_target(root, "c/../d/.", directory=True))
    finally:
        os.umask(old)
    modes = {str(path.relative_to(tmp_path)): path.stat().st_mode & 0o7777 for path in tmp_path.rglob("*")}
    assert modes == {"a": 0o755, "a/b": 0o755, "a/b/file": 0o644, "c": 0o755, "d": 0o755}
    for path in ("", "/", ".", "//", "a/.."):
        fd = mounts.make_target(root, path, directory=True)
        assert os.path.samestat(os.fstat(fd), os.fstat(root))
        os.close(fd)
    os.close(root)


@pytest.mark.parametrize("link", ["../outside", "/outside", "../../../outside"])
def test_opened_files_are_inside_the_root(tmp_path: Path, link: str) -> None:
    top = tmp_path / "root"
    top.mkdir()
    for place in (tmp_path, top):
        (place / "outside").write_text(place.name)
    (top / "link").symlink_to(link)
    root = os.open(top, os.O_PATH)
    with open(mounts.open_beneath(root, "link", flags=os.O_RDONLY)) as file:
        assert file.read() == "root"
    with pytest.raises(OSError, match="symbolic links") as caught:
        mounts.open_beneath(root, "/link", links=False)
    assert caught.value.errno == errno.ELOOP
    os.close(mounts.open_beneath(root, "/outside", links=False))
    (top / "magic").symlink_to("/proc/self/fd/0")
    with pytest.raises(OSError, match="No such file"):
        mounts.open_beneath(root, "magic")
    os.close(root)


def test_a_refusal_leaves_no_descriptor(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop/x")
    root = os.open(tmp_path, os.O_PATH)
    for path, directory, links in (
        *(("file", True, True), ("/", False, True), ("a/b/../../..", False, True)),
        *(("loop", True, True), ("loop/y", False, False), ("file/x", False, True)),
    ):
        with no_descriptor_left(), pytest.raises(OSError, match=r"directory|mount|symbolic") as caught:
            mounts.make_target(root, path, directory=directory, links=links)
        assert caught.value.errno in (errno.ENOTDIR, errno.EISDIR, errno.ELOOP)
    os.close(root)


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    root = os.open(tmp_path, os.O_PATH)
    for path, directory in (("file/x", True), ("file", True), ("file/../x", False)):
        with pytest.raises(NotADirectoryError):
            mounts.make_target(root, path, directory=directory)
    with pytest.raises(IsADirectoryError):
        mounts.make_target(root, "/", directory=False)
    os.close(root)


def test_while_files_are_renamed(tmp_path: Path) -> None:
    """The kernel answers EAGAIN at `..` then, wherever on the host they are: openat2(2)."""
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/link").symlink_to("../" * 30 + "a/b")
    over = threading.Event()

    def rename(number: int) -> None:
        names = [tmp_path / f"{number}{side}" for side in "xy"]
        names[0].mkdir()
        while not over.is_set():
            os.rename(*names)
            names.reverse()

    threads = [threading.Thread(target=rename, args=[number]) for number in range(2)]
    root = os.open(tmp_path, os.O_PATH)
    for thread in threads:
        thread.start()
    try:
        refused = 0
        while not refused:  # the control: a single attempt is refused now and then
            try:
                os.close(syscalls.openat2_once(root, "a/link", os.O_PATH, resolve=syscalls.RESOLVE_IN_ROOT))
            except BlockingIOError:
                refused += 1
        for _ in range(3000):
            os.close(mounts.open_beneath(root, "a/link"))
    finally:
        over.set()
        for thread in threads:
            thread.join()
    os.close(root)
