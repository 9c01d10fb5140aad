"""Users looked up in hostile images: nothing outside the root is ever read, nothing blocks, nothing is unbounded."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from insula.control.instances.drivers.container.users import MAX_SIZE, LayeredRoot, User, resolve
from insula.model.errors import Invalid
from tests.support.descriptors import no_descriptor_left

PASSWD = """\
root:x:0:0:root:/root:/bin/sh
# a comment
broken line
web:x:33:34:the web server:/var/www:/bin/false
web:x:99:99:a later duplicate:/:/bin/false
1000:x:7:7:named as a number:/seven:/bin/sh
big:x:70000:70000::/:
nohome:x:40:40::relative:
"""
GROUP = """\
root:x:0:
www:x:34:
logs:x:50:web,other
disk:x:51:other,web
big:x:70000:
"""


def image(directory: Path, passwd: str | None = PASSWD, group: str | None = GROUP) -> Path:
    (directory / "etc").mkdir(parents=True)
    if passwd is not None:
        (directory / "etc/passwd").write_text(passwd)
    if group is not None:
        (directory / "etc/group").write_text(group)
    return directory


@pytest.mark.parametrize(
    ("user", "expected"),
    [
        ("", User(0, 0, (0,), "/root")),
        ("root", User(0, 0, (0,), "/root")),
        ("web", User(33, 34, (34, 50, 51), "/var/www")),
        ("33", User(33, 34, (34, 50, 51), "/var/www")),
        ("web:logs", User(33, 50, (50,), "/var/www")),
        ("web:51", User(33, 51, (51,), "/var/www")),
        ("web:1234", User(33, 1234, (1234,), "/var/www")),
        ("1234", User(1234, 0, (0,), "/")),
        ("1234:5", User(1234, 5, (5,), "/")),
        ("1000", User(7, 7, (7,), "/seven")),
        ("nohome", User(40, 40, (40,), "/")),
        ("65535:65535", User(65535, 65535, (65535,), "/")),
    ],
)
def test_users_are_resolved_as_in_docker(tmp_path: Path, user: str, expected: User) -> None:
    assert resolve(user, [image(tmp_path)]) == expected


@pytest.mark.parametrize(
    ("user", "more", "groups"),
    [
        ("web", ["7"], (34, 50, 51, 7)),
        ("web:logs", ["51", "7", "51"], (50, 51, 7)),
        ("1234", ["logs"], (0, 50)),
        ("web", ["34"], (34, 50, 51)),
    ],
)
def test_more_groups(tmp_path: Path, user: str, more: list[str], groups: tuple[int, ...]) -> None:
    assert resolve(user, [image(tmp_path)], more_groups=more).groups == groups


@pytest.mark.parametrize("group", ["", "nogroup", "65536", "a b", "-1", "a:b", "99999999999"])
def test_invalid_additional_groups_are_refused(tmp_path: Path, group: str) -> None:
    with pytest.raises(Invalid, match="group"):
        resolve("web", [image(tmp_path)], more_groups=[group])


@pytest.mark.parametrize(
    "user",
    [
        "nobody",
        "web:nogroup",
        "big",
        "70000",
        "65536",
        "1:65536",
        "web:big",
        "-1",
        "1.5",
        ":",
        ":web",
        "web:",
        "a:b:c",
        "a b",
        "a\nb",
        "a\x00",
        "../x",
        "99999999999999999999",
        "x" * 300,
        "٣",
    ],
)
def test_refused_in_one_line(tmp_path: Path, user: str) -> None:
    with pytest.raises(Invalid) as caught:
        resolve(user, [image(tmp_path)])
    assert caught.value.hint
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


def test_image_without_files(tmp_path: Path) -> None:
    assert resolve("", [tmp_path]) == User(0, 0, (0,), "/")
    assert resolve("5:6", [tmp_path]) == User(5, 6, (6,), "/")
    with pytest.raises(Invalid):
        resolve("web", [tmp_path])


def test_a_line_of_passwd_may_end_early(tmp_path: Path) -> None:
    """Five fields, or four: the rest is empty, as with docker; less is no line."""
    lines = "five:x:5:50:gecos\nfour:x:4:40\nthree:x:3\nsix:x:6:60::/six\n"
    root = image(tmp_path, lines)
    assert [(u.uid, u.gid, u.home) for u in (resolve(name, [root]) for name in ("five", "four", "six"))] == [
        (5, 50, "/"),
        (4, 40, "/"),
        (6, 60, "/six"),
    ]
    with pytest.raises(Invalid):
        resolve("three", [root])


def test_upper_layers_hide_lower_ones(tmp_path: Path) -> None:
    low, mid, up = image(tmp_path / "low"), image(tmp_path / "mid", "web:x:1:1::/mid:\n", None), tmp_path / "up"
    up.mkdir()
    assert resolve("web", [mid, low]).home == "/mid"
    assert resolve("web:logs", [mid, low]).gid == 50  # group shows through from below
    assert resolve("web", [mid, low], upper=str(up)).home == "/mid"
    (up / "etc").mkdir()
    (up / "etc/passwd").write_text("web:x:2:2::/up:\n")
    assert resolve("web", [mid, low], upper=str(up)).home == "/up"


def test_a_file_in_place_of_a_directory_hides_it(tmp_path: Path) -> None:
    low, up = image(tmp_path / "low"), tmp_path / "up"
    up.mkdir()
    (up / "etc").write_text("no directory")
    assert resolve("", [up, low]) == User(0, 0, (0,), "/")


@pytest.mark.parametrize("target", ["/secret", "../../../../../../../../secret", "../secret", "//secret", "/../secret"])
def test_links_stay_inside(tmp_path: Path, target: str) -> None:
    """/secret of the image is found by every link that means it, and the host's is never."""
    root = image(tmp_path / "outer/root", None)
    for outside in (tmp_path, tmp_path / "outer"):
        (outside / "secret").write_text("web:x:666:666::/outside:\n")
    (root / "etc/passwd").symlink_to(target)
    with pytest.raises(Invalid):
        resolve("web", [root])
    (root / "secret").write_text("web:x:1:1::/inside:\n")
    assert resolve("web", [root]).home == "/inside"


def test_link_to_the_hosts_own_files(tmp_path: Path) -> None:
    root = image(tmp_path, None)
    (root / "etc/passwd").symlink_to("/proc/self/root/etc/passwd")
    assert Path("/proc/self/root/etc/passwd").read_bytes()  # where it would lead on the host
    with LayeredRoot([root]) as layers:
        assert layers.read("/etc/passwd") == b""


def test_links_to_directories_and_over_layers(tmp_path: Path) -> None:
    low, up = tmp_path / "low", tmp_path / "up"
    image(low / "usr/share")
    up.mkdir()
    (up / "etc").symlink_to("usr/../usr/./share/etc/../etc")
    assert resolve("web", [up, low]).uid == 33


@pytest.mark.parametrize("how", ["fifo", "socket", "directory", "loop", "self", "deep", "longname", "huge", "sparse"])
def test_hostile_passwd(tmp_path: Path, how: str) -> None:
    root = image(tmp_path, None)
    passwd = root / "etc/passwd"
    match how:
        case "fifo":
            os.mkfifo(passwd)
        case "socket":
            cwd = Path.cwd()
            os.chdir(passwd.parent)  # sun_path is short
            with socket.socket(socket.AF_UNIX) as sock:
                sock.bind("passwd")
            os.chdir(cwd)
        case "directory":
            passwd.mkdir()
        case "loop":
            passwd.symlink_to("/etc/other")
            (root / "etc/other").symlink_to("passwd")
        case "self":
            passwd.symlink_to("passwd")
        case "deep":
            passwd.symlink_to("/etc/" + "../etc/" * 500 + "shadow")
        case "longname":
            passwd.symlink_to("n" * 300)
        case "huge":
            passwd.write_bytes(b"x:x:1:1::/:\n" * (MAX_SIZE // 12 + 1))
        case "sparse":
            with passwd.open("wb") as file:
                file.truncate(1 << 40)
    for user in ("web", "0", ""):
        with no_descriptor_left(), pytest.raises(Invalid) as caught:
            resolve(user, [root])
        assert caught.value.hint


def test_a_missing_layer_leaks_no_descriptor(tmp_path: Path) -> None:
    with no_descriptor_left(), pytest.raises(FileNotFoundError):
        resolve("", [tmp_path, tmp_path / "none"])


LINES = st.lists(
    st.one_of(
        st.binary(max_size=40),
        st.lists(
            st.sampled_from([b"a", b"b", b"0", b"7", b"-1", b"70000", b"/h", b"a,b", b"", b"\xff"]), max_size=8
        ).map(b":".join),
    ),
    max_size=12,
).map(b"\n".join)


@given(
    passwd=LINES, group=LINES, user=st.one_of(st.text(max_size=12), st.sampled_from(["a", "b", "7", "a:a", "7:b", ""]))
)
@settings(max_examples=300, deadline=None)
def test_any_bytes(tmp_path_factory: pytest.TempPathFactory, passwd: bytes, group: bytes, user: str) -> None:
    """Whatever the files hold, the answer is a user within the tenant's range or `Invalid`."""
    root = image(tmp_path_factory.mktemp("image"), None, None)
    (root / "etc/passwd").write_bytes(passwd)
    (root / "etc/group").write_bytes(group)
    try:
        found = resolve(user, [root])
    except Invalid:
        return
    assert all(0 <= n < 65536 for n in (found.uid, found.gid, *found.groups))
    assert found.gid in found.groups
    assert found.home.startswith("/")
    assert "\0" not in found.home


NAMES = st.sampled_from(["etc", "passwd", "x", "y"])


@given(
    tree=st.lists(
        st.tuples(
            st.integers(0, 2),
            st.lists(NAMES, min_size=1, max_size=3),
            st.sampled_from(["file", "dir", "/etc", "..", "../..", "/x/y", "/", "passwd", "../../../../../../.."]),
        ),
        max_size=15,
    )
)
@settings(max_examples=200, deadline=None)
def test_any_tree_of_links(tmp_path_factory: pytest.TempPathFactory, tree: list[tuple[int, list[str], str]]) -> None:
    """Random directories and links in three layers: what is read was written inside them."""
    base = tmp_path_factory.mktemp("host")
    for name in ("passwd", "x", "y"):
        (base / name).write_text("outside")
    layers = [base / "etc" / str(n) for n in range(3)]
    for layer in layers:
        layer.mkdir(parents=True)
    for number, parts, what in tree:
        path = layers[number].joinpath(*parts)
        try:
            if any(p.is_symlink() for p in (path, *path.parents)):
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            if what == "file":
                path.write_text("inside")
            elif what == "dir":
                path.mkdir()
            else:
                path.symlink_to(what)
        except OSError:
            continue
    with LayeredRoot(layers) as root, contextlib.suppress(Invalid):
        assert root.read("/etc/passwd") in (b"", b"inside")
