"""`insula cp`: files and trees in both directions; no file of the host can be reached through it."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from tests.support.cli import Cli
from tests.support.daemon import Daemon
from tests.support.wait import until


@pytest.fixture
def web(cli: Cli) -> Cli:
    cli.ok("run", "-d", "--name", "web", "busybox", "sleep", "600")
    return cli


def test_a_file_is_copied_in_and_out(web: Cli, tmp_path: Path) -> None:
    data = os.urandom(3 << 20)
    (tmp_path / "data").write_bytes(data)
    (tmp_path / "data").chmod(0o751)
    web.ok("cp", tmp_path / "data", "web:/root/copy")
    assert web.ok("exec", "web", "stat", "-c", "%a %s", "/root/copy") == f"751 {len(data)}"
    web.ok("cp", "web:/root/copy", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == data
    assert (tmp_path / "back").stat().st_mode & 0o777 == 0o751


def test_a_tree_is_copied_into_a_directory(web: Cli, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "a" / "b").mkdir(parents=True)
    (tree / "a" / "b" / "file").write_text("deep")
    (tree / "link").symlink_to("a/b/file")
    web.ok("cp", tree, "web:/tmp")
    assert web.ok("exec", "web", "cat", "/tmp/tree/link") == "deep"
    web.ok("cp", "web:/tmp/tree", tmp_path / "back")
    assert (tmp_path / "back" / "a" / "b" / "file").read_text() == "deep"
    assert (tmp_path / "back" / "link").is_symlink()


def test_files_written_arrive_as_the_users_inside(web: Cli, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    web.ok("cp", tmp_path / "file", "web:/root/file")
    assert web.ok("exec", "web", "stat", "-c", "%u:%g", "/root/file") == "0:0"


def test_a_directory_does_not_replace_a_file(web: Cli, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    web.ok("exec", "web", "sh", "-c", "echo precious > /file")
    assert "/file" in web.fails("cp", tmp_path / "tree", "web:/file")
    assert web.ok("exec", "web", "cat", "/file") == "precious"


def test_content_and_paths_from_the_root(web: Cli, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "file").write_text("x")
    web.ok("exec", "web", "mkdir", "/site")
    web.ok("cp", f"{tmp_path}/tree/.", "web:site")
    assert web.ok("exec", "web", "ls", "/site") == "file"
    (tmp_path / "back").mkdir()
    web.ok("cp", "web:site/.", tmp_path / "back")
    assert os.listdir(tmp_path / "back") == ["file"]


def test_devices_are_not_copied(web: Cli, tmp_path: Path) -> None:
    assert "/dev/null" in web.fails("cp", "web:/dev/null", tmp_path / "null")
    assert not (tmp_path / "null").exists()


def test_tar_streams(web: Cli) -> None:
    done = web.raw("cp", "web:/etc", "-")
    assert done.returncode == 0
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        assert any(name.endswith("etc/passwd") for name in archive.getnames())


@pytest.mark.parametrize("link", ["/etc", "../../../../../../etc"])
def test_links_lead_to_the_instances_own_files(web: Cli, tmp_path: Path, link: str) -> None:
    """CVE-2018-15664 and CVE-2019-14271: what a link names must be looked up with the instance's root."""
    (tmp_path / "own").write_text("from outside")
    assert Path("/etc/hostname").read_text().strip() != "web", "else this could not tell"
    web.ok("exec", "web", "ln", "-s", link, "/trap")
    web.ok("cp", tmp_path / "own", "web:/trap/insula-test-escape")
    assert web.ok("exec", "web", "cat", "/etc/insula-test-escape") == "from outside"
    assert not Path("/etc/insula-test-escape").exists()
    web.ok("cp", "web:/trap/hostname", tmp_path / "hostname")
    assert (tmp_path / "hostname").read_text().strip() == "web"


@pytest.mark.parametrize("link", ["/proc/1/root/etc", "/proc/self/root/etc", "/proc/self/cwd"])
def test_links_of_proc_are_not_followed(web: Cli, tmp_path: Path, link: str) -> None:
    """The kernel would follow them in the view of the process that opens them: for insulad, to the host's files."""
    (tmp_path / "own").write_text("from outside")
    web.ok("exec", "web", "ln", "-s", link, "/trap")
    assert "/trap/new" in web.fails("cp", tmp_path / "own", "web:/trap/new")
    assert "/trap/hostname" in web.fails("cp", "web:/trap/hostname", tmp_path / "hostname")
    assert not (tmp_path / "hostname").exists()
    web.ok("exec", "web", "sh", "-c", "rm /trap; ln -s /etc /trap")
    web.ok("cp", "web:/trap/hostname", tmp_path / "hostname")


@pytest.mark.parametrize("name", ["../../../../../../tmp/insula-test-escape", "a/../../../tmp/insula-test-escape"])
def test_hostile_archives_stay_inside(web: Cli, name: str) -> None:
    data = archive_of((name, b"evil"))
    done = web.raw("cp", "-", "web:/tmp", stdin=data)
    assert done.returncode == 1 and b"leads out of the target" in done.stderr
    assert not Path("/tmp/insula-test-escape").exists()
    web.raw("cp", "-", "web:/", stdin=archive_of(("/tmp/insula-test-escape", b"mine"))).check_returncode()
    assert web.ok("exec", "web", "cat", "/tmp/insula-test-escape") == "mine", "absolute names are below the target"
    assert not Path("/tmp/insula-test-escape").exists()


def archive_of(*members: tuple[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return stream.getvalue()


def test_bad_paths(web: Cli, tmp_path: Path) -> None:
    assert "no-such" in web.fails("cp", "web:/no-such", tmp_path / "x")
    assert "no-such" in web.fails("cp", tmp_path / "no-such", "web:/tmp")
    assert "no-such" in web.fails("cp", "no-such:/etc/passwd", tmp_path / "x")
    web.fails("cp", "a", "b", status=2)
    assert list(tmp_path.iterdir()) == []


# -- as cp(1) and docker cp --------------------------------------------------------------------------------------------


def test_links_to_directories_are_followed_at_the_target(web: Cli, tmp_path: Path) -> None:
    """`cp tool m:/bin` where /bin is a link to usr/bin must not replace the link."""
    web.ok("exec", "web", "sh", "-c", "mkdir -p /usr/tools; ln -s usr/tools /tools; echo old > /usr/f; ln -s usr/f /f")
    (tmp_path / "tool").write_text("new")
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "file").write_text("x")
    web.ok("cp", tmp_path / "tool", "web:/tools")
    web.ok("cp", tmp_path / "tree", "web:/tools")
    web.ok("cp", f"{tmp_path}/tree/.", "web:/tools")
    web.ok("cp", tmp_path / "tool", "web:/f")
    assert web.ok(
        "exec", "web", "sh", "-c", "readlink /tools; readlink /f; cat /usr/f; ls /usr/tools /usr/tools/tree"
    ) == ("usr/tools\nusr/f\nnew/usr/tools:\nfile\ntool\ntree\n\n/usr/tools/tree:\nfile")


@pytest.mark.parametrize("place", ["/t", "/dev/shm"])
def test_files_are_copied_onto_a_tmpfs(cli: Cli, tmp_path: Path, place: str) -> None:
    """Its user namespace is the instance's: a process without an ID there can't make files in it (EOVERFLOW)."""
    (tmp_path / "file").write_text("in memory")
    cli.ok("run", "-d", "--name", "web", "--read-only", "--tmpfs", "/t", "busybox", "sleep", "600")
    cli.ok("cp", tmp_path / "file", f"web:{place}/file")
    assert cli.ok("exec", "web", "stat", "-c", "%u:%g", f"{place}/file") == "0:0"
    cli.ok("cp", f"web:{place}/file", tmp_path / "back")
    assert (tmp_path / "back").read_text() == "in memory"
    assert cli.fails("cp", tmp_path / "file", "web:/root/file") == "'/root/file' is read-only"


def test_a_full_disk_is_named_and_changes_nothing(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "small").write_text("small")
    (tmp_path / "large").write_bytes(os.urandom(1 << 20))
    cli.ok("run", "-d", "--name", "web", "--tmpfs", "/t:size=256k", "busybox", "sleep", "600")
    cli.ok("cp", tmp_path / "small", "web:/t/file")
    assert cli.fails("cp", tmp_path / "large", "web:/t/file") == "copying '/t/file' failed: No space left on device"
    assert cli.ok("exec", "web", "sh", "-c", "ls -A /t; cat /t/file") == "file\nsmall"


@pytest.mark.parametrize("source", ["web:/", "web:/.", "web:."])
def test_the_whole_instance(web: Cli, tmp_path: Path, source: str) -> None:
    web.ok("exec", "web", "sh", "-c", "echo mine > /root/file")
    for target in ("new", "there"):
        (tmp_path / "there").mkdir(exist_ok=True)
        web.ok("cp", source, tmp_path / target)
        assert (tmp_path / target / "root" / "file").read_text() == "mine\n"
        assert (tmp_path / target / "etc" / "hostname").read_text() == "web\n"
        assert os.listdir(tmp_path / target / "proc") == os.listdir(tmp_path / target / "sys") == []


def test_conflicts_are_refused_and_nothing_is_lost(web: Cli, tmp_path: Path) -> None:
    (tmp_path / "tree" / "y").mkdir(parents=True)
    (tmp_path / "file").touch()
    web.ok("exec", "web", "sh", "-c", "mkdir -p /m /empty/file; echo precious > /m/y")
    assert web.fails("cp", f"{tmp_path}/tree/.", "web:/m") == "'/m/y' is a directory in the archive, but not here"
    assert web.ok("exec", "web", "cat", "/m/y") == "precious"
    assert (
        web.fails("cp", tmp_path / "file", "web:/empty") == "'/empty/file' is a directory here, but not in the archive"
    )
    assert web.ok("exec", "web", "ls", "-d", "/empty/file") == "/empty/file"
    assert web.fails("cp", tmp_path / "file", "web:/dev/null") == "'/dev/null' is a device"
    assert f"{tmp_path}/nodir/" in web.fails("cp", "web:/etc/hostname", f"{tmp_path}/nodir/")
    assert "/nodir/" in web.fails("cp", tmp_path / "file", "web:/nodir/")
    assert f"{tmp_path}/file" in web.fails("cp", "web:/etc", tmp_path / "file")
    assert sorted(os.listdir(tmp_path)) == ["file", "tree"]


def test_mounted_files_are_written_in_place(web: Cli, tmp_path: Path) -> None:
    """/etc/hosts is a file of the host's disk that is mounted there: replaced, the mount would be gone."""
    (tmp_path / "hosts").write_text("10.9.8.7 elsewhere\n")
    web.ok("cp", tmp_path / "hosts", "web:/etc/hosts")
    assert (
        web.ok("exec", "web", "sh", "-c", "cat /etc/hosts; grep -c ' /etc/hosts ' /proc/mounts")
        == "10.9.8.7 elsewhere\n1"
    )


def test_owners_are_kept_with_archive(web: Cli, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    os.chown(tmp_path / "file", 1234, 5678)
    for options, expected in (([], "0:0"), (["-a"], "1234:5678")):
        web.ok("cp", *options, tmp_path / "file", "web:/file")
        assert web.ok("exec", "web", "stat", "-c", "%u:%g", "/file") == expected
    for options, owner in ((["-a"], (1234, 5678)), ([], (os.geteuid(), os.getegid()))):
        web.ok("cp", *options, "web:/file", tmp_path / "back")
        assert ((tmp_path / "back").stat().st_uid, (tmp_path / "back").stat().st_gid) == owner


def test_holes_stay_holes_both_ways(web: Cli, tmp_path: Path) -> None:
    """A file of 1 TiB with a few bytes of data: only these are copied."""
    with (tmp_path / "sparse").open("wb") as file:
        file.seek(1 << 39)
        file.write(b"in the middle")
        file.truncate(1 << 40)
    web.ok("cp", tmp_path / "sparse", "web:/sparse")
    shown = web.ok("exec", "web", "stat", "-c", "%s %b", "/sparse").split()
    assert int(shown[0]) == 1 << 40 and int(shown[1]) < 100
    web.ok("cp", "web:/sparse", tmp_path / "back")
    found = (tmp_path / "back").stat()
    assert (found.st_size, found.st_blocks < 100) == (1 << 40, True)
    with (tmp_path / "back").open("rb") as file:
        file.seek(1 << 39)
        assert file.read(20) == b"in the middle" + bytes(7)
    assert len(web.raw("cp", "web:/sparse", "-").stdout) < 20_000


def test_deep_directories_and_odd_names(web: Cli, tmp_path: Path) -> None:
    deep = "i=0; while [ $i -lt 1500 ]; do mkdir d && cd -P d; i=$((i+1)); done; echo bottom > file"
    web.ok("exec", "web", "sh", "-c", f"mkdir /dev/shm/deep && cd /dev/shm/deep && {deep}")
    odd = os.fsdecode(b"\xff\n\x1b[31m -rf 'x")
    (tmp_path / odd).mkdir()
    (tmp_path / odd / odd).write_text("odd")
    try:
        web.ok("cp", "web:/dev/shm/deep", tmp_path / "deep")
        web.ok("cp", tmp_path / "deep", "web:/dev/shm/again")
        bottom = "i=0; while [ $i -lt 1500 ]; do cd -P d; i=$((i+1)); done; cat file"
        assert web.ok("exec", "web", "sh", "-c", f"cd /dev/shm/again && {bottom}") == "bottom"
        web.ok("cp", tmp_path / odd, "web:/odd")
        web.ok("cp", "web:/odd", tmp_path / "odd")
        assert (tmp_path / "odd" / odd).read_text() == "odd"
    finally:
        subprocess.run(["rm", "-rf", tmp_path / "deep"], check=True)


def test_files_of_a_stopped_instance_are_copied(cli: Cli, tmp_path: Path) -> None:
    cli.ok("run", "--name", "web", "busybox", "sh", "-c", "echo mine > /root/file")
    (tmp_path / "file").write_text("sent")
    cli.ok("cp", tmp_path / "file", "web:/root/sent")
    cli.ok("cp", "web:/root", tmp_path / "back")
    assert sorted(path.read_text() for path in (tmp_path / "back").iterdir()) == ["mine\n", "sent"]


def test_an_interrupted_copy_gives_the_reason(web: Cli, tmp_path: Path) -> None:
    """After its answer has begun: a path that no archive takes, in a tree that else is copied."""
    web.ok(
        "exec",
        "web",
        "sh",
        "-c",
        "mkdir /dev/shm/t; echo x > /dev/shm/t/0; cd /dev/shm/t; for i in $(seq 300); do "
        "mkdir $(printf %0250d 0) && cd -P 00* || exit; done",
    )
    assert "is too deep in directories" in web.fails("cp", "web:/dev/shm/t", tmp_path / "t")
    assert (tmp_path / "t" / "0").read_text() == "x\n"
    subprocess.run(["rm", "-rf", tmp_path / "t"], check=True)


def workers(daemon: Daemon) -> list[str]:
    """The processes of insulad that copy."""
    children = Path(f"/proc/{daemon.pid('insulad')}/task").glob("*/children")
    pids = [pid for file in children for pid in file.read_text().split()]
    lines = []
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            lines.append(Path(f"/proc/{pid}/cmdline").read_bytes().decode())
    return [line for line in lines if "archive" in line]


def test_a_copy_ends_with_its_client(daemon: Daemon, web: Cli, tmp_path: Path) -> None:
    """And what was begun is gone: a file that was there is as it was."""
    web.ok(
        "exec",
        "web",
        "sh",
        "-c",
        "mkdir /in; echo old > /in/file; dd if=/dev/zero of=/large bs=1M count=32 2> /dev/null",
    )
    data = archive_of(("file", bytes(4 << 20)))
    command = [web.command("cp", "-", "web:/in"), web.command("cp", "web:/large", "-")]
    for words in command:
        with subprocess.Popen(
            words, env=web.environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as client:
            assert client.stdin and client.stdout
            if words[-1] == "-":
                client.stdout.read(1000)
            else:
                client.stdin.write(data[: 2 << 20])
                client.stdin.flush()
                until(lambda: web.ok("exec", "web", "ls", "-A", "/in") != "file", "something is being written")
            assert len(workers(daemon)) == 1, "the control"
            client.kill()
        until(lambda: not workers(daemon), "the process that copies has ended")
    assert web.ok("exec", "web", "sh", "-c", "ls -A /in; cat /in/file") == "file\nold"


def test_a_copy_does_not_delay_the_end_of_insulad(fresh: Daemon) -> None:
    cli = fresh.cli
    cli.ok("run", "-d", "--network", "none", "--name", "web", "busybox", "sleep", "600")
    with subprocess.Popen(
        cli.command("cp", "-", "web:/root"), env=cli.environment(), stdin=subprocess.PIPE, stderr=subprocess.PIPE
    ) as client:
        assert client.stdin and client.stderr
        client.stdin.write(archive_of(("file", bytes(4 << 20)))[: 2 << 20])
        client.stdin.flush()
        until(lambda: cli.ok("exec", "web", "ls", "-A", "/root") != "", "something is being written")
        fresh.stop()
        client.stdin.close()
        assert client.stderr.read().startswith(b"error: ")
    fresh.start()
    assert cli.ok("exec", "web", "ls", "-A", "/root") == "", "what was begun is gone"
    cli.ok("rm", "-f", "web")


# -- export -----------------------------------------------------------------------------------------------------------


def test_export_makes_an_image(web: Cli, tmp_path: Path) -> None:
    web.ok(
        "exec", "web", "sh", "-c", "echo mine > /root/file; ln /root/file /root/hard; chown 5:6 /root/file; mkfifo /p"
    )
    web.ok("export", "-o", tmp_path / "out.tar", "web")
    with tarfile.open(tmp_path / "out.tar") as archive:
        members = {member.name: member for member in archive.getmembers()}
    assert (members["root/file"].uid, members["root/file"].gid) == (5, 6)
    assert members["root/hard"].islnk() and members["p"].isfifo()
    assert members["proc"].isdir() and not [name for name in members if name.startswith(("proc/", "dev/", "sys/"))]
    assert web.raw("export", "web").stdout == (tmp_path / "out.tar").read_bytes()
    web.ok("image", "import", tmp_path / "out.tar", "again:1")
    assert web.ok("run", "--rm", "again:1", "cat", "/root/hard") == "mine"
    assert "no-such" in web.fails("export", "no-such")
    assert "no-such" in web.fails("export", "-o", tmp_path / "no-such" / "x", "web")
    assert os.listdir(tmp_path) == ["out.tar"]
