"""Bad input: one line with a hint, the right exit status, and no change of the state or the host."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.cli import Cli
from tests.support.daemon import Daemon
from tests.support.snapshot import assert_unchanged
from tests.system.conftest import remove_instances

USAGE, ENGINE, ERROR = 2, 125, 1
LONG = "x" * 64
VERBS = (
    *("start", "stop", "restart", "pause", "unpause", "kill", "rm", "wait"),
    *("logs", "attach", "inspect", "explain", "top"),
)


@pytest.fixture(scope="module")
def town(tenant: Cli) -> Iterator[Cli]:
    """A tenant with an instance `web` at 10.0.0.50 that runs and one, `stopped`, that does not."""
    tenant.ok("run", "-d", "--name", "web", "--ip", "10.0.0.50", "busybox", "sleep", "3600")
    tenant.ok("run", "-d", "--name", "stopped", "busybox", "true")
    tenant.ok("wait", "stopped")
    yield tenant
    remove_instances(tenant)


def state(cli: Cli) -> dict[str, Any]:
    """All that a user can see."""
    return {
        "tenants": cli.json("tenant", "ls"),
        "networks": cli.json("network", "ls"),
        "images": cli.json("image", "ls"),
        "instances": cli.json("ps", "-a"),
    }


@contextmanager
def nothing_changes(daemon: Daemon, cli: Cli) -> Iterator[None]:
    wanted, host = state(cli), daemon.snapshot()
    yield
    assert state(cli) == wanted
    assert_unchanged(host, daemon.snapshot)


# What is typed, the exit status, and a word of the message.
CASES: list[tuple[tuple[str, ...], int, str]] = [
    # names that are no DNS labels
    *((("tenant", "create", name), ERROR, "DNS label") for name in ("Acme", "a_b", "a.b", "ümlaut", "a b", LONG)),
    (("tenant", "create", "--", "-a"), ERROR, "DNS label"),
    (("tenant", "create", ""), ERROR, "DNS label"),
    (("tenant", "create", "a\nb"), ERROR, "DNS label"),
    (("tenant", "create", "a\x1b[31mb"), ERROR, "DNS label"),
    (("network", "create", "Net", "--subnet", "10.1.0.0/24"), ERROR, "DNS label"),
    (("run", "-d", "--name", "Web", "busybox", "true"), ENGINE, "DNS label"),
    (("run", "-d", "--name", "../web", "busybox", "true"), ENGINE, "DNS label"),
    (("run", "-d", "--hostname", "a b", "busybox", "true"), ENGINE, "DNS label"),
    # names that are taken
    (("tenant", "create", "default"), ERROR, "already"),
    (("network", "create", "default", "--subnet", "10.1.0.0/24"), ERROR, "already"),
    (("run", "-d", "--name", "web", "busybox", "true"), ENGINE, "already"),
    # unknown names
    (("tenant", "show", "nobody"), ERROR, "nobody"),
    (("tenant", "rm", "nobody"), ERROR, "nobody"),
    (("-T", "nobody", "ps"), ERROR, "nobody"),
    (("-T", "nobody", "run", "busybox", "true"), ENGINE, "nobody"),
    (("network", "show", "nowhere"), ERROR, "nowhere"),
    (("network", "rm", "nowhere"), ERROR, "nowhere"),
    (("image", "rm", "nothing"), ERROR, "nothing"),
    (("run", "-d", "no-such-image", "true"), ENGINE, "no-such-image"),
    (("run", "-d", "--network", "nowhere", "busybox", "true"), ENGINE, "nowhere"),
    *(((verb, "nobody"), ERROR, "nobody") for verb in VERBS),
    (("exec", "nobody", "true"), ENGINE, "nobody"),
    (("cp", "nobody:/etc/passwd", "-"), ERROR, "nobody"),
    (("whois", "4194303"), ERROR, "4194303"),
    # addresses and networks
    *((("network", "create", "net", "--subnet", cidr), ERROR, "subnet")
      for cidr in ("10.1.0.0/33", "10.1.0.1/24", "300.0.0.0/8", "rubbish", "10.1.0.0/31", "224.0.0.0/24",
                   "127.0.0.0/8", "fd00::/64", "0.0.0.0/0", "")),
    (("network", "create", "net", "--subnet", "10.0.0.128/25"), ERROR, "overlaps"),
    (("network", "create", "net", "--subnet", "10.0.0.0/8"), ERROR, "overlaps"),
    *((("network", "create", "net", "--subnet", "10.1.0.0/24", "--subnet6", cidr), ERROR, said)
      for cidr, said in (("fe80::/64", "link-local"), ("febf::/16", "link-local"), ("2001:db8:1::/48", "outside"),
                         ("ff02::/64", "multicast"), ("::/64", "reserved"), ("fd01::1/64", "host bits"),
                         ("fd01::/127", "size"), ("fd01::/129", "CIDR"), ("10.2.0.0/24", "not an IPv6"))),
    (("network", "create", "net", "--subnet", "100.64.0.0/24"), ERROR, "uplinks"),
    (("network", "create", "net", "--subnet", "10.1.0.0/24", "--subnet6", "fd69:6e73:756c::/48"), ERROR, "uplinks"),
    (("network", "create", "net", "--subnet", "10.1.0.0/24", "--mtu", "70"), ERROR, "MTU"),
    (("run", "-d", "--ip", "10.0.0.50", "busybox", "true"), ENGINE, "taken"),
    (("run", "-d", "--ip", "10.0.0.1", "busybox", "true"), ENGINE, "gateway"),
    (("run", "-d", "--ip", "10.0.0.0", "busybox", "true"), ENGINE, "10.0.0.0"),
    (("run", "-d", "--ip", "10.0.0.255", "busybox", "true"), ENGINE, "10.0.0.255"),
    (("run", "-d", "--ip", "10.0.1.5", "busybox", "true"), ENGINE, "outside"),
    (("run", "-d", "--ip", "10.0.0.999", "busybox", "true"), ENGINE, "10.0.0.999"),
    (("run", "-d", "--ip6", "fd00::5", "busybox", "true"), ENGINE, "IPv6"),
    (("run", "-d", "--network", "none", "--ip", "10.0.0.9", "busybox", "true"), USAGE, "address"),
    # sizes and numbers
    *((("run", "-d", "--memory", size, "busybox", "true"), USAGE, "size") for size in ("12x", "-1", "", "m", "1e3")),
    (("run", "-d", "--memory", "1k", "busybox", "true"), ENGINE, "memory"),
    *((("run", "-d", "--cpus", n, "busybox", "true"), USAGE, "CPU") for n in ("many", "-1", "0.001", "nan", "inf")),
    *((("run", "-d", "--pids", pids, "busybox", "true"), USAGE, "--pids") for pids in ("0", "-1", "x")),
    (("tenant", "create", "t", "--memory", "lots"), USAGE, "size"),
    (("tenant", "create", "t", "--bandwidth", "fast"), USAGE, "rate"),
    (("stop", "--timeout", "soon", "web"), USAGE, "duration"),
    # other options of run
    (("run", "-d", "--user", "nobody-such", "busybox", "true"), ENGINE, "nobody-such"),
    (("run", "-d", "--user", "70000", "busybox", "true"), ENGINE, "70000"),
    (("run", "-d", "--workdir", "relative", "busybox", "true"), ENGINE, "relative"),
    (("run", "-d", "--tmpfs", "relative", "busybox", "true"), ENGINE, "relative"),
    (("run", "-d", "--tmpfs", "/a/../../etc", "busybox", "true"), ENGINE, "tmpfs"),
    (("run", "-d", "--tmpfs", "/a:mode=9", "busybox", "true"), USAGE, "tmpfs"),
    (("run", "-d", "--cap-add", "EVERYTHING", "busybox", "true"), ENGINE, "EVERYTHING"),
    (("run", "-d", "--sysctl", "kernel.panic=1", "busybox", "true"), ENGINE, "kernel.panic"),
    (("run", "-d", "--ulimit", "patience=1", "busybox", "true"), ENGINE, "patience"),
    (("run", "-d", "--ulimit", "nofile=9:1", "busybox", "true"), ENGINE, "nofile"),
    (("run", "-d", "--restart", "sometimes", "busybox", "true"), USAGE, "sometimes"),
    (("run", "-d", "--rm", "--restart", "always", "busybox", "true"), ENGINE, "restart"),
    (("run", "-d", "--stop-signal", "SIGNOTHING", "busybox", "true"), ENGINE, "SIGNOTHING"),
    (("run", "-d", "--env", "=x", "busybox", "true"), USAGE, "variable"),
    (("run", "-d", "Not:An:Image", "true"), ENGINE, "Not:An:Image"),
    # states
    (("rm", "web"), ERROR, "web"),
    (("exec", "stopped", "true"), ENGINE, "stopped"),
    (("kill", "stopped"), ERROR, "stopped"),
    (("attach", "stopped"), ERROR, "stopped"),
    (("network", "rm", "default"), ERROR, "default"),
    (("tenant", "rm", "default"), ERROR, "default"),
    (("image", "rm", "busybox"), ERROR, "busybox"),
    (("kill", "-s", "SIGNOTHING", "web"), USAGE, "SIGNOTHING"),
    # images that are none
    (("image", "import", "/etc/passwd", "bad"), ERROR, ""),
    (("image", "import", "/no/such/file", "bad"), ERROR, "/no/such/file"),
    (("image", "load", "/etc/passwd"), ERROR, ""),
    (("image", "load", "/etc"), ERROR, "/etc"),
    (("image", "pull", "127.0.0.1:1/nothing:latest"), ERROR, "127.0.0.1:1"),
    (("image", "save", "nothing", "-o", "/tmp/insula-test-none.tar"), ERROR, "nothing"),
    (("image", "build-base", "plan9"), ERROR, "plan9"),
    # command lines
    (("frobnicate",), USAGE, "frobnicate"),
    (("tenant", "frobnicate"), USAGE, "frobnicate"),
    (("run",), USAGE, "IMAGE"),
    (("run", "--frobnicate", "busybox"), USAGE, "--frobnicate"),
    (("run", "--name"), USAGE, "--name"),
    (("exec", "web"), USAGE, "CMD"),
    (("ps", "surplus"), USAGE, "surplus"),
    (("whois", "abc"), USAGE, "abc"),
]  # fmt: skip


def case_name(case: tuple[tuple[str, ...], int, str]) -> str:
    return " ".join(case[0]).encode("unicode_escape").decode()[:60].replace("::", ":")


def test_no_bad_input_is_listed_twice() -> None:
    commands = [case[0] for case in CASES]
    assert len(commands) == len(set(commands))


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_bad_input_is_one_line_with_a_hint(town: Cli, case: tuple[tuple[str, ...], int, str]) -> None:
    command, status, word = case
    assert word in town.fails(*command, status=status)


def test_bad_input_changes_nothing(town: Cli, daemon: Daemon) -> None:
    """Each case again, with the state and the host compared before and after them all."""
    with nothing_changes(daemon, town):
        for command, _, _ in CASES:
            assert town.run(*command).status != 0
    assert not Path("/tmp/insula-test-none.tar").exists()


def test_the_comparison_sees_a_change(town: Cli, daemon: Daemon) -> None:
    with pytest.raises(AssertionError), nothing_changes(daemon, town):
        town.ok("network", "create", "net", "--subnet", "10.1.0.0/24")
    town.ok("network", "rm", "net")


def test_without_a_daemon_the_error_is_one_line(town: Cli, tmp_path: Path) -> None:
    assert "insulad" in town.fails("--socket", tmp_path / "none.sock", "ps")
    assert "insulad" in town.fails("--socket", tmp_path / "none.sock", "run", "busybox", "true", status=ENGINE)


# -- images that try to get out ----------------------------------------------------------------------------------


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, size
    return info


HOSTILE = {
    "absolute path": [member("/tmp/insula-test-escape", size=4)],
    "parent path": [member("../../../../../../tmp/insula-test-escape", size=4)],
    "through a symlink": [member("out", tarfile.SYMTYPE, "/tmp"), member("out/insula-test-escape", size=4)],
    "hard link to the host": [member("passwd", tarfile.LNKTYPE, "../../../../../../../etc/passwd")],
    "hard link to an absolute path": [member("passwd", tarfile.LNKTYPE, "/etc/passwd")],
    "block device": [member("sda", tarfile.BLKTYPE)],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_root_file_systems(town: Cli, daemon: Daemon, tmp_path: Path, name: str) -> None:
    """Refused; or taken in a way that stays inside: a path from the root is one inside the image."""
    path = tmp_path / "rootfs.tar"
    with tarfile.open(path, "w") as archive:
        for info in HOSTILE[name]:
            archive.addfile(info, io.BytesIO(b"evil"[: info.size]))
    wanted, host = state(town), daemon.snapshot()
    result = town.run("image", "import", path, "hostile")
    assert not Path("/tmp/insula-test-escape").exists()
    if result.status == 0:
        town.ok("image", "rm", "hostile")
    else:
        assert result.err.startswith("error: ") and "; hint: " in result.err and result.err.count("\n") == 1
    assert state(town) == wanted
    assert_unchanged(host, daemon.snapshot)


def test_a_truncated_archive_is_refused(town: Cli, daemon: Daemon, tmp_path: Path) -> None:
    whole = tmp_path / "whole.tar"
    town.ok("image", "save", "busybox", "-o", whole)
    torn = tmp_path / "torn.tar"
    torn.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with nothing_changes(daemon, town):
        town.fails("image", "load", torn)


# -- a host that lacks something ---------------------------------------------------------------------------------


def test_a_full_disk(small: Daemon, tmp_path: Path) -> None:
    """The file system of /var/lib/insula has 96 MiB; the image has more."""
    path = tmp_path / "big.tar"
    with tarfile.open(path, "w") as archive:
        archive.addfile(member("big", size=128 << 20), Zeros(128 << 20))
    with nothing_changes(small, small.cli):
        assert "the disk is full" in small.cli.fails("image", "import", path, "big")
    assert small.cli.ok("run", "--rm", "busybox", "echo", "goes on") == "goes on"


class Zeros(io.RawIOBase):
    """A file of `size` zero bytes."""

    def __init__(self, size: int) -> None:
        self.left = size

    def read(self, size: int = -1) -> bytes:
        count = self.left if size < 0 else min(size, self.left)
        self.left -= count
        return bytes(count)


def test_a_missing_kernel_feature(without_cgroups: Daemon) -> None:
    """No control group file system: said by `doctor`, and by a launch; nothing is started without its limits."""
    cli = without_cgroups.cli
    report = cli.run("--json", "doctor")
    assert "cgroup" in report.out
    assert "missing" in report.out
    cli.fails("run", "--rm", "--memory", "64m", "busybox", "true", status=ENGINE)
    assert cli.json("ps", "-a") == []
