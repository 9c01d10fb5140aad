"""Options of `run` and `exec` known from Docker, and related verbs, on a real daemon."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cli import Cli
from tests.support.daemon import Daemon
from tests.support.images import Layout, member, tar
from tests.support.wait import until

BUSYBOX = Path("/bin/busybox")


def shell(cli: Cli, script: str, *options: str, image: str = "busybox") -> str:
    return cli.ok("run", "--rm", *options, image, "sh", "-c", script)


def test_the_size_of_shared_memory(cli: Cli) -> None:
    script = "df -k /dev/shm | awk 'NR==2{print $2}'; dd if=/dev/zero of=/dev/shm/x bs=1M count=3 2>/dev/null; "
    script += "stat -c %s /dev/shm/x"
    assert shell(cli, script, "--shm-size", "2m").split() == ["2048", str(2 << 20)]
    assert shell(cli, script).split() == ["65536", str(3 << 20)], "the default, and the positive control"


def test_options_of_a_tmpfs(cli: Cli) -> None:
    script = (
        "cp /bin/busybox /t/sh 2>/dev/null; /t/sh -c 'echo ran' 2>/dev/null; stat -c '%a %u %g' /t; "
        "grep -c ' /t tmpfs .*noexec' /proc/mounts; df -k /t | awk 'NR==2{print $2}'"
    )
    asked = "/t:exec,mode=750,uid=5,gid=7,size=8m"
    assert shell(cli, script, "--tmpfs", asked).split() == ["ran", "750", "5", "7", "0", "8192"]
    assert shell(cli, script, "--tmpfs", "/t").split() == ["1777", "0", "0", "1", "65536"], "the defaults"
    assert shell(cli, "touch /t/x 2>/dev/null || echo refused", "--tmpfs", "/t:ro") == "refused"
    assert "nosuid,nodev" in shell(cli, "grep ' /t ' /proc/mounts", "--tmpfs", "/t:exec")


def test_hosts_and_name_servers(cli: Cli) -> None:
    options = [
        "--add-host",
        "db:10.9.8.7",
        "--add-host",
        "db=fd00::7",
        "--dns",
        "10.9.8.53",
        "--dns-search",
        "example.org",
    ]
    out = shell(cli, "tail -2 /etc/hosts; cat /etc/resolv.conf; ping -c1 -W1 db | head -1", *options)
    assert out.splitlines() == [
        "10.9.8.7\tdb",
        "fd00::7\tdb",
        "search example.org",
        "nameserver 10.9.8.53",
        "PING db (10.9.8.7): 56 data bytes",
    ]
    assert "nameserver 10.0.0.1" in shell(cli, "cat /etc/resolv.conf"), "the default"
    assert (
        cli.fails("run", "--add-host", "db:nowhere", "busybox", "true", status=125) == "'nowhere' is not an IP address"
    )


def test_groups(cli: Cli) -> None:
    assert shell(cli, "id -G", "-u", "1000", "--group-add", "1234", "--group-add", "users") == "0 100 1234"
    assert shell(cli, "id -G", "-u", "1000") == "0", "the default"
    cli.ok("run", "-d", "--name", "grouped", "--group-add", "1234", "busybox", "sleep", "600")
    assert "1234" in cli.ok("exec", "grouped", "id", "-G").split()
    assert "nogroup" in cli.fails("run", "--group-add", "nogroup-x", "busybox", "true", status=125)


def test_variables_from_files(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "variables"
    file.write_text("# comment\nA=1\nB=two words\n")
    assert shell(cli, "echo $A/$B", "--env-file", str(file), "-e", "A=3") == "3/two words"
    cli.ok("run", "-d", "--name", "plain", "busybox", "sleep", "600")
    assert cli.ok("exec", "--env-file", str(file), "plain", "sh", "-c", "echo $A/$B") == "1/two words"


def test_a_file_with_the_name(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "cid"
    name = cli.ok("run", "-d", "--cidfile", str(file), "busybox", "sleep", "600")
    assert file.read_text() == name
    assert [view["instance"]["name"] for view in cli.json("ps")] == [name]
    assert "already" in cli.fails("run", "-d", "--cidfile", str(file), "busybox", "sleep", "600", status=125)
    assert len(cli.json("ps", "-a")) == 1
    other = tmp_path / "other"
    cli.fails("run", "-d", "--cidfile", str(other), "no-such-image", status=125)
    assert not other.exists()


def test_a_detached_exec_goes_on(cli: Cli) -> None:
    cli.ok("run", "-d", "--name", "busy", "busybox", "sleep", "600")
    script = "yes | head -c 300000; echo $A $(id -u) > /tmp/mark; exec sleep 601"  # more output than a pipe holds
    assert cli.ok("exec", "-d", "-e", "A=x", "-u", "0", "busy", "sh", "-c", script) == ""
    until(lambda: cli.run("exec", "busy", "cat", "/tmp/mark").out == "x 0\n", "it got past its output")
    until(lambda: any(p["command"] == "sleep 601" for p in cli.json("top", "busy")), "it has become the next program")
    assert set(cli.json("exec", "-dit", "busy", "--", "sleep", "602")) == {"id"}
    until(lambda: any(p["command"] == "sleep 602" for p in cli.json("top", "busy")), "one with a terminal runs, too")
    assert cli.run("exec", "-d", "busy", "/no/such").status in (125, 127)
    cli.ok("stop", "-t", "0", "busy")
    cli.fails("exec", "-d", "busy", "true", status=125)


def test_all_lines_of_a_log(cli: Cli) -> None:
    cli.ok("run", "--name", "talker", "busybox", "seq", "30")
    everything = [str(n) for n in range(1, 31)]
    assert cli.ok("logs", "--tail", "all", "talker").split() == everything
    assert cli.ok("logs", "-n", "2", "talker").split() == everything[-2:]


# -- rename ----------------------------------------------------------------------------------------------------------


def test_rename(cli: Cli) -> None:
    cli.ok("run", "-d", "--name", "old", "busybox", "sleep", "600")
    cli.ok("run", "-d", "--name", "other", "busybox", "sleep", "600")
    before = cli.json("inspect", "old")[0]
    assert cli.ok("rename", "old", "new") == "new"
    after = cli.json("inspect", "new")[0]
    assert after["instance"]["id"] == before["instance"]["id"]
    assert after["status"]["pid"] == before["status"]["pid"]
    assert after["instance"]["ports"][0]["address"] == before["instance"]["ports"][0]["address"]
    assert cli.ok("exec", "new", "hostname") == "old", "until the next start"
    address = after["instance"]["ports"][0]["address"]
    assert address in cli.ok("exec", "other", "nslookup", f"new.{cli.tenant}.internal")
    assert cli.run("exec", "other", "nslookup", f"old.{cli.tenant}.internal").status != 0
    assert "no instance old" in cli.fails("stop", "old")
    assert "already" in cli.fails("rename", "new", "other")
    assert "DNS label" in cli.fails("rename", "new", "No")
    assert "already" in cli.fails("rename", "new", "new")
    cli.ok("restart", "-t", "0", "new")
    assert cli.ok("exec", "new", "hostname") == "new"
    cli.ok("run", "-d", "--name", "old", "busybox", "sleep", "600")  # the name is free
    cli.ok("rm", "-f", "new")
    assert {view["instance"]["name"] for view in cli.json("ps")} == {"old", "other"}


def test_a_rename_of_a_joined_instance_is_refused(cli: Cli) -> None:
    cli.ok("run", "-d", "--name", "first", "busybox", "sleep", "600")
    cli.ok("run", "-d", "--name", "guest", "--pid", "container:first", "busybox", "sleep", "600")
    assert "guest" in cli.fails("rename", "first", "second")
    cli.ok("rename", "guest", "visitor")
    cli.ok("rm", "-f", "visitor")
    cli.ok("rename", "first", "second")


def test_a_new_name_outlives_the_daemon(fresh: Daemon) -> None:
    cli = fresh.cli
    cli.ok("run", "-d", "--name", "old", "busybox", "sleep", "600")
    cli.run("run", "--name", "ended", "busybox", "sh", "-c", "exit 3")
    cli.ok("rename", "old", "new")
    cli.ok("rename", "ended", "over")
    fresh.kill("insulad")
    fresh.start()
    views = {view["instance"]["name"]: view for view in cli.json("ps", "-a")}
    assert set(views) == {"new", "over"}
    assert views["new"]["status"]["state"] == "running"
    assert views["over"]["status"]["exit"]["exit_status"] == 3
    assert cli.json("verify")["passed"]
    cli.ok("rm", "-f", "new", "over")
    cli.ok("run", "-d", "--name", "new", "busybox", "sleep", "600")  # nothing of it is in the way
    cli.ok("rm", "-f", "new")


# -- tenant rm --force -----------------------------------------------------------------------------------------------


def test_a_tenant_is_removed_with_all_that_it_has(daemon: Daemon, tmp_path: Path) -> None:
    daemon.cli.ok("tenant", "create", "doomed")
    cli = daemon.cli.of("doomed")
    for number, name in enumerate(("default", "lab")):
        cli.ok("network", "create", name, "--subnet", f"10.{number}.0.0/24")
    cli.ok("run", "-d", "--name", "one", "busybox", "sleep", "600")
    cli.ok("run", "-d", "--name", "two", "--network", "lab", "--restart", "always", "busybox", "sleep", "600")
    cli.ok("run", "-d", "--name", "three", "--pid", "container:one", "busybox", "sleep", "600")
    (tmp_path / "root.tar").write_bytes(tar(member("bin"), member("bin/sh", BUSYBOX.read_bytes(), mode=0o755)))
    cli.ok("image", "import", str(tmp_path / "root.tar"), "mine:1")
    cli.ok("pause", "one")
    shared = {image["name"] for image in daemon.cli.json("image", "ls")}
    assert "still has instances" in daemon.cli.fails("tenant", "rm", "doomed")
    assert len(cli.json("ps")) == 3
    assert daemon.cli.ok("tenant", "rm", "--force", "doomed") == "doomed"
    assert "doomed" not in {view["tenant"]["name"] for view in daemon.cli.json("tenant", "ls")}
    assert {image["name"] for image in daemon.cli.json("image", "ls")} == shared
    daemon.cli.ok("tenant", "create", "doomed")  # nothing of it is in the way
    assert daemon.cli.of("doomed").json("ps", "-a") == []
    daemon.cli.ok("tenant", "rm", "doomed")


def test_the_default_tenant_keeps_all_that_it_has(daemon: Daemon) -> None:
    daemon.cli.ok("run", "-d", "--name", "kept", "busybox", "sleep", "600")
    try:
        assert "can't be removed" in daemon.cli.fails("tenant", "rm", "--force", "default")
        assert "kept" in daemon.cli.ok("ps", "-q").split()
    finally:
        daemon.cli.ok("rm", "-f", "kept")
    assert "no tenant" in daemon.cli.fails("tenant", "rm", "--force", "nobody")


# -- volumes of an image ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def volumes(tenants_cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> str:
    layer = tar(
        member("bin"),
        member("bin/sh", BUSYBOX.read_bytes(), mode=0o755),
        *(member(f"bin/{name}", linkname="sh") for name in ("cat", "touch", "ls", "sleep", "stat", "mkdir", "grep")),
        member("data", uid=5, mode=0o750),
        member("data/seed", b"from the image\n"),
        member("var"),
        member("link", linkname="/var"),
    )
    layout = Layout()
    layout.image([layer], process={"Volumes": {"/data": {}, "/link/new": {}, "/proc/1": {}}}, name="volumes:1")
    path = tmp_path_factory.mktemp("volumes") / "image.tar"
    path.write_bytes(layout.tar())
    tenants_cli.ok("image", "load", str(path))
    return "volumes:1"


@pytest.fixture(scope="module")
def tenants_cli(tenant: Cli) -> Iterator[Cli]:
    yield tenant


@pytest.mark.parametrize("options", [(), ("--read-only",)])
def test_directories_that_the_image_declares(cli: Cli, volumes: str, options: tuple[str, ...]) -> None:
    """They are there, with what the image has in them, and can be written to whatever the root is."""
    script = "cat /data/seed; stat -c '%a %u' /data; touch /data/own /var/new/own && ls /data /link/new; "
    script += "touch /x 2>/dev/null && echo root; true"
    out = shell(cli, script, *options, image=volumes).split("\n")
    expected = ["from the image", "750 5", "/data:", "own", "seed", "", "/link/new:", "own"]
    assert out == (expected if options else [*expected, "root"])


def test_files_in_a_volume_live_as_long_as_the_instance(cli: Cli, volumes: str, tmp_path: Path) -> None:
    cli.ok("run", "-d", "--read-only", "--name", "keeper", volumes, "sleep", "600")
    cli.ok("exec", "keeper", "sh", "-c", "echo mine > /data/own")
    cli.ok("restart", "-t", "0", "keeper")
    assert cli.ok("exec", "keeper", "cat", "/data/own") == "mine"
    cli.ok("stop", "-t", "0", "keeper")
    cli.ok("cp", "keeper:/data/own", str(tmp_path / "own"))
    assert (tmp_path / "own").read_text() == "mine\n"
    cli.ok("rm", "keeper")
    assert shell(cli, "ls /data", image=volumes) == "seed", "another instance has its own"
    assert os.listdir(tmp_path) == ["own"]


def test_a_volume_behind_a_link_removes_no_mask(tenant: Cli, tmp_path: Path) -> None:
    """A directory that is bound onto itself would lie over what masks /proc, and be writable."""
    layer = tar(
        member("bin"),
        member("bin/sh", BUSYBOX.read_bytes(), mode=0o755),
        *(member(f"bin/{name}", linkname="sh") for name in ("cat", "ls", "grep", "touch")),
        *(member(name, linkname=target) for name, target in (("p", "/proc"), ("k", "/proc/sys"), ("s", "/sys"))),
    )
    layout = Layout()
    declared: dict[str, object] = {"/p": {}, "/k/kernel": {}, "/s": {}, "/data": {}}
    layout.image([layer], process={"Volumes": declared}, name="links:1")
    (tmp_path / "image.tar").write_bytes(layout.tar())
    tenant.ok("image", "load", str(tmp_path / "image.tar"))
    script = "cat /proc/keys; ls /proc/acpi /proc/sys/kernel/pty | grep -v :; grep -c ' /proc ' /proc/mounts; "
    script += "for path in '/proc/sys[/ ]' '/sys '; do grep \" $path\" /proc/mounts | grep -c rw,; done; touch /data/x"
    assert shell(tenant, script, "--read-only", image="links:1").split() == ["1", "0", "0"]


def test_a_tmpfs_goes_over_a_volume(cli: Cli, volumes: str) -> None:
    assert shell(cli, "ls /data; grep ' /data ' /proc/mounts", "--tmpfs", "/data", image=volumes).startswith(
        "tmpfs /data"
    )
