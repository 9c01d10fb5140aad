"""What a program finds, and how its end is told: the same bytes in a container and in a machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.images import Layout, member, tar
from tests.support.wait import until
from tests.system.instances.conftest import Kind

PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
BUSYBOX = Path("/bin/busybox")


def test_what_a_program_finds(kind: Kind) -> None:
    script = "echo $0 $# $$; env | sort; id; pwd; umask; hostname; cat /etc/hostname"
    out = kind.shell(script, "--hostname", "web", "-e", "A=two words", "-e", "B=")
    assert out.splitlines() == [
        "sh 0 1",
        "A=two words",
        "B=",
        "HOME=/root",
        "HOSTNAME=web",
        PATH,
        "PWD=/",
        "SHLVL=1",
        "uid=0(root) gid=0(root) groups=0(root)",
        "/",
        "0022",
        "web",
        "web",
    ]


def test_rights_and_limits(kind: Kind) -> None:
    script = "grep -E '^(Cap|NoNew|Groups|Umask)' /proc/self/status; ulimit -n; ulimit -Hn; ulimit -s; ulimit -c"
    script += "; cat /proc/self/oom_score_adj; mount -t tmpfs x /mnt 2>/dev/null || echo no mount"
    words = kind.shell(script).split()
    assert words[words.index("CapEff:") + 1] == words[words.index("CapBnd:") + 1] == "00000000a80425fb"
    assert words[words.index("NoNewPrivs:") + 1] == "1"
    assert words[-2:] == ["no", "mount"]
    expected = kind.cli.ok("run", "--rm", "busybox", "sh", "-c", script).split()
    assert words == expected


@pytest.mark.parametrize(
    ("user", "seen"),
    [
        ("nobody", "uid=65534(nobody) gid=65534(nogroup) groups=65534(nogroup) /nonexistent"),
        ("1000:1001", "uid=1000 gid=1001 groups=1001 /"),
        ("root:users", "uid=0(root) gid=100(users) groups=100(users) /root"),
    ],
)
def test_users(kind: Kind, user: str, seen: str) -> None:
    assert kind.shell("echo $(id) $HOME", "-u", user) == seen


def test_files_that_tell_of_the_network(kind: Kind, name: str) -> None:
    asked = (
        "--name",
        name,
        "--hostname",
        "web",
        "--add-host",
        "db:10.9.8.7",
        "--dns",
        "10.9.8.53",
        "--dns-search",
        "example.org",
    )
    out = kind.shell("cat /etc/hosts /etc/resolv.conf; ip -4 -o addr show eth0 | awk '{print $4}'", *asked).splitlines()
    own = out[-1].removesuffix("/24")
    assert out == [
        "127.0.0.1\tlocalhost",
        "::1\tlocalhost ip6-localhost ip6-loopback",
        f"{own}\tweb {name}",
        "10.9.8.7\tdb",
        "search example.org",
        "nameserver 10.9.8.53",
        f"{own}/24",
    ]


def test_options_of_the_program(kind: Kind, tmp_path: Path) -> None:
    (tmp_path / "variables").write_text("# comment\nA=1\nB=two words\n")
    script = "echo $A/$B; pwd; id -G; echo here > file; stat -c '%U %n' file"
    options = ("--env-file", tmp_path / "variables", "-e", "A=3", "-w", "/new/place", "--group-add", "1234")
    assert kind.shell(script, *options).splitlines() == ["3/two words", "/new/place", "0 1234", "root file"]
    assert kind.run("--rm", "--entrypoint", "/bin/echo", "busybox", "instead").ok() == "instead\n"


def test_mounts(kind: Kind) -> None:
    script = "touch /x /root/x 2>/dev/null || echo read-only; touch /t/x /dev/shm/x && stat -c '%a %u %g' /t"
    script += "; df -k /t /dev/shm | awk 'NR>1{print $2}'; cp /bin/busybox /t/sh; /t/sh -c : 2>/dev/null || echo noexec"
    found = kind.shell(script, "--read-only", "--tmpfs", "/t:mode=750,uid=5,gid=7,size=8m").splitlines()
    assert found == ["read-only", "750 5 7", "8192", "65536", "noexec"]
    assert kind.shell("touch /x && echo written") == "written", "the control"


@pytest.mark.parametrize("status", [0, 1, 42, 125, 126, 127, 255])
def test_exit_statuses(kind: Kind, sleeper: str, status: int) -> None:
    if status in (0, 255):  # of the first program too
        assert kind.run("--rm", "busybox", "sh", "-c", f"exit {status}").status == status
    assert kind.cli.run("exec", sleeper, "sh", "-c", f"exit {status}").status == status


@pytest.mark.parametrize("signal", ["TERM", "SEGV", "KILL", "USR1"])
def test_an_end_by_a_signal(kind: Kind, sleeper: str, signal: str) -> None:
    """128 and the signal. PID 1 gets none of itself that it does not handle (pid_namespaces(7))."""
    number = {"TERM": 15, "SEGV": 11, "KILL": 9, "USR1": 10}[signal]
    result = kind.cli.run("exec", sleeper, "sh", "-c", f"kill -{signal} $$; sleep 60")
    assert (result.status, result.out, result.err) == (128 + number, "", "")


def test_pid_1_gets_no_signal_of_itself_that_it_does_not_handle(kind: Kind) -> None:
    assert kind.shell("kill -TERM $$; kill -KILL $$; echo goes on") == "goes on"


MISSING = "cannot execute no-such: no such file in the PATH"


@pytest.mark.parametrize(
    ("words", "status", "what"),
    [
        (("busybox", "no-such"), 127, MISSING),
        (("busybox", "/etc/passwd"), 126, "cannot execute /etc/passwd: Permission denied"),
        (("busybox", "/etc"), 126, "cannot execute /etc: Permission denied: it is a directory"),
        (
            ("-w", "/etc/passwd", "busybox", "pwd"),
            125,
            "cannot enter the working directory: Not a directory /etc/passwd",
        ),
        (("-u", "nosuch", "busybox", "id"), 125, "user 'nosuch' is not in the image's /etc/passwd"),
        (
            ("--tmpfs", "/etc/passwd", "busybox", "true"),
            125,
            "cannot mount /etc/passwd: cannot mount over it /etc/passwd",
        ),
    ],
)
def test_a_program_that_can_not_be_executed(
    kind: Kind, sleeper: str, words: tuple[str, ...], status: int, what: str
) -> None:
    """One line, and nothing is left; the same for `exec`."""
    before = len(kind.cli.json("ps", "-a"))
    assert kind.fails("--rm", *words, status=status) == what
    until(lambda: len(kind.cli.json("ps", "-a")) == before, "it is removed")
    if "--tmpfs" not in words:
        at = words.index("busybox")
        assert kind.cli.fails("exec", *words[:at], sleeper, *words[at + 1 :], status=status) == what


def test_one_that_can_not_be_executed_is_kept(kind: Kind, name: str) -> None:
    for detach in ((), ("-d",)):
        assert kind.fails(*detach, "--name", name, "--restart", "always", "busybox", "no-such", status=127) == MISSING
        found = kind.status(name)
        assert (found["state"], found["error"], found["pid"]) == ("failed", MISSING, None)
        assert kind.cli.fails("wait", name) == MISSING and kind.cli.ok("logs", name) == ""
        assert kind.cli.fails("start", name) == MISSING
        kind.cli.ok("rm", name)
    assert MISSING in kind.cli.fails("exec", "-d", "sleeper", "no-such", status=127)


def test_what_an_image_says(kind: Kind) -> None:
    """Its entrypoint, environment, user, directory and signal, and what replaces them."""
    files = [member("bin"), member("bin/sh", BUSYBOX.read_bytes(), mode=0o755), member("etc"), member("srv", uid=7)]
    users = member("etc/passwd", b"web:x:7:8:Web:/srv:/bin/sh\n")
    said = {
        "Entrypoint": ["/bin/sh", "-c", 'echo "$0 $1 $A $(pwd) $HOME"; echo $A > own; exit 4'],
        "Cmd": ["zero", "one"],
        "Env": ["A=of the image", "PATH=/bin"],
        "User": "web",
        "WorkingDir": "/srv",
    }
    (layout := Layout()).image([tar(*files, users)], process=said, name="said:1")
    assert kind.cli.raw("image", "load", "-", stdin=layout.tar()).returncode == 0
    result = kind.run("--rm", "said:1")
    assert (result.status, result.out, result.err) == (4, "zero one of the image /srv /srv\n", "")
    result = kind.run("--rm", "-e", "A=ours", "said:1", "other")
    assert (result.status, result.out) == (4, "other  ours /srv /srv\n")
    result = kind.run("--rm", "-w", "/new", "-u", "0", "--entrypoint", "sh", "said:1", "-c", "pwd; echo $HOME")
    assert result.ok() == "/new\n/\n"
