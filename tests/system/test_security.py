"""The isolation of an instance, seen from inside and from the host."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest

from insula.control.instances.drivers.groups import no_huge_pages
from insula.kernel.cgroups import hierarchy
from tests.forked import forked
from tests.support.cli import Cli
from tests.support.daemon import Daemon
from tests.system.conftest import TenantFactory

NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "user", "uts")
MASKED = ("/proc/acpi", "/proc/asound", "/proc/cmdline", "/proc/diskstats", "/proc/interrupts", "/proc/kcore",
          "/proc/keys", "/proc/latency_stats", "/proc/locks", "/proc/sched_debug", "/proc/scsi", "/proc/sys/kernel/pty",
          "/proc/timer_list", "/proc/timer_stats", "/sys/devices/virtual/powercap", "/sys/firmware")  # fmt: skip
READ_ONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sys/kernel/panic", "/proc/sysrq-trigger", "/sys",
             "/sys/fs/cgroup")  # fmt: skip
DEVICES = {"console", "core", "fd", "full", "mqueue", "null", "ptmx", "pts", "random", "shm", "stderr", "stdin",
           "stdout", "tty", "urandom", "zero"}  # fmt: skip


@pytest.fixture(scope="module")
def web(tenant: Cli) -> Cli:
    """With an instance `web` that only sleeps."""
    tenant.ok("run", "-d", "--name", "web", "busybox", "sleep", "600")
    return tenant


def pid_of(cli: Cli, name: str) -> int:
    [view] = [v for v in cli.json("ps") if v["instance"]["name"] == name]
    return int(view["status"]["pid"])


def status(pid: int) -> dict[str, str]:
    """proc_pid_status(5)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def inside(cli: Cli, script: str) -> str:
    return cli.ok("exec", "web", "sh", "-c", script)


def test_every_namespace_is_its_own(web: Cli, tenants: TenantFactory) -> None:
    web.ok("run", "-d", "--name", "second", "busybox", "sleep", "600")
    other = tenants()
    other.ok("run", "-d", "--name", "web", "busybox", "sleep", "600")
    pids = [os.getpid(), pid_of(web, "web"), pid_of(web, "second"), pid_of(other, "web")]
    for kind in NAMESPACES:
        assert len({os.readlink(f"/proc/{pid}/ns/{kind}") for pid in pids}) == len(pids), kind
    web.ok("rm", "-f", "second")


def test_ids_of_tenants_are_disjoint(web: Cli, tenants: TenantFactory) -> None:
    other = tenants()
    other.ok("run", "-d", "--name", "web", "busybox", "sleep", "600")
    ranges = []
    for cli in (web, other):
        pid = pid_of(cli, "web")
        for name in ("uid_map", "gid_map"):
            [line] = Path(f"/proc/{pid}/{name}").read_text().splitlines()
            first, base, count = (int(word) for word in line.split())
            assert (first, count) == (0, 65536)
        ranges.append((base, base + count))
        assert int(status(pid)["Uid"].split()[0]) == base, "root inside is the tenant's first ID outside"
    (a, a_end), (b, b_end) = sorted(ranges)
    assert 65536 <= a < a_end <= b < b_end


def test_kernel_guards_are_on(web: Cli) -> None:
    fields = status(pid_of(web, "web"))
    assert fields["Seccomp"] == "2", "SECCOMP_MODE_FILTER"
    assert fields["NoNewPrivs"] == "1"
    for name in ("CapEff", "CapPrm", "CapBnd"):
        assert int(fields[name], 16) == 0xA80425FB, f"{name} is Docker's default set"
    for name in ("CapInh", "CapAmb"):
        assert int(fields[name], 16) == 0, name


def test_a_process_that_joins_has_the_same_guards(web: Cli) -> None:
    names = ("Seccomp", "NoNewPrivs", "CapEff", "CapPrm", "CapBnd", "CapInh", "CapAmb")
    lines = inside(web, "cat /proc/self/status").splitlines()
    joined = {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
    first = status(pid_of(web, "web"))
    assert {name: joined[name] for name in names} == {name: first[name] for name in names}


@pytest.mark.parametrize(
    "script",
    [
        "unshare -U true",
        "unshare -m true",
        "mount -t tmpfs none /mnt",
        "umount /proc",
        "mknod /tmp/sda b 8 0 && cat /tmp/sda",
        "chroot / true && setpriv --nnp true && nsenter -t 1 -m true",
        "hostname other",
        "ip link set eth0 down",
        "! date -s 2020-01-01 2>&1 | grep -q 'not permitted'",
        "echo 1 > /proc/sys/kernel/panic",
        "reboot -f",
        "swapoff -a; insmod /etc/passwd",
    ],
)
def test_refused_system_calls(web: Cli, script: str) -> None:
    assert web.run("exec", "web", "sh", "-c", f"mkdir -p /mnt; {script}").status != 0


def test_masked_paths_are_empty(web: Cli) -> None:
    """A masked file is the null device, a masked directory an empty file system; and both can be read."""
    there = [path for path in MASKED if Path(path).exists()]
    telling = {path for path in there if _tells(Path(path))}
    assert {"/proc/cmdline", "/proc/interrupts", "/proc/sys/kernel/pty"} <= telling, (
        "the control: on the host they tell"
    )
    for path in there:
        if Path(path).is_dir():
            assert inside(web, f"ls -A {path} && stat -f -c %T {path}") == "tmpfs", path
        else:
            assert inside(web, f"cat {path} && stat -c %t:%T {path}") == "1:3", path
    assert inside(web, "stat -c %F /proc/uptime") != "character special file", "the control: what is not masked"


def _tells(path: Path) -> bool:
    if path.is_dir():
        return any(path.iterdir())
    with path.open("rb") as file:
        return bool(file.read(1))


def test_read_only_paths(web: Cli) -> None:
    """As the kernel has it: statvfs(3) of the same files, seen from the host. Root inside owns the last one."""
    root = Path(f"/proc/{pid_of(web, 'web')}/root")
    assert {"/proc/sys", "/proc/sys/kernel/panic", "/sys"} <= {path for path in READ_ONLY if Path(path).exists()}
    for path in READ_ONLY:
        if Path(path).exists():
            assert os.statvfs(f"{root}{path}").f_flag & os.ST_RDONLY, path
    for path in ("/", "/proc", "/dev", "/dev/shm", "/dev/mqueue", "/etc/hosts"):
        assert not os.statvfs(f"{root}{path}").f_flag & os.ST_RDONLY, f"the control: {path}"
    for script in ("echo 1 > /proc/sys/net/ipv4/ip_forward", "mkdir /sys/fs/cgroup/mine"):
        assert "Read-only file system" in web.run("exec", "web", "sh", "-c", script).err, script


def test_other_users_of_the_host_can_read_nothing(web: Cli, daemon: Daemon) -> None:
    """Nothing of tenants, instances and addresses in the run directory and below the root directory."""
    [view] = web.json("inspect", "web")
    address = view["instance"]["ports"][0]["address"].encode()

    def told() -> list[str]:
        """Directories that can be listed, and files that can be read."""
        found = []
        for top in (daemon.run, daemon.root):
            for path, _, files in os.walk(top, onerror=lambda _: None):
                found.append(path) if os.access(path, os.R_OK) else None
                found += [f"{path}/{file}" for file in files if os.access(f"{path}/{file}", os.R_OK)]
        # the names of directories that may be entered are known
        dns = daemon.run / "dns" / str(web.tenant)
        known = [daemon.run / "network", daemon.run / "containers", dns, dns / "hosts"]
        return found + [str(path) for path in known if os.access(path, os.R_OK)]

    def as_user(uid: int, gid: int) -> list[str]:
        def child() -> list[str]:
            os.setgroups([])
            os.setresgid(gid, gid, gid)
            os.setresuid(uid, uid, uid)
            return told()

        return forked(child)

    everything = [path for path in told() if "/dns/" in path and os.path.isfile(path)]
    assert any(address in Path(path).read_bytes() for path in everything), "the control: root finds its address"
    daemons = pwd.getpwnam("daemon")
    assert as_user(daemons.pw_uid, daemons.pw_gid) == []
    own = os.stat(daemon.run / "dns" / str(web.tenant)).st_gid
    resolver = as_user(own, own)
    assert any(path.endswith("/hosts") for path in resolver), "the control: the resolver can read them"
    assert all("/dns/" in path for path in resolver)


def test_huge_pages_that_the_host_has_set_aside(web: Cli) -> None:
    """Whoever maps some takes them from the pool of the host (hugetlbpage.rst)."""
    limits = no_huge_pages()
    names = {path.name for path in Path("/sys/kernel/mm/hugepages").glob("*")}
    assert len(limits) == len(names) and all(limit["limit"] == 0 for limit in limits)
    group = Path(str(web.json("explain", "web")["cgroups"].popitem()[1])).parent
    if hierarchy().version == 1:
        pytest.skip("version 1: a tenant has no group for huge pages")
    files = [group / f"hugetlb.{limit['pageSize']}.max" for limit in limits]
    if not files or not files[0].exists():
        pytest.skip("this kernel has no huge pages, or doesn't limit them")
    assert [file.read_text().strip() for file in files] == ["0"] * len(files)


def test_devices(web: Cli) -> None:
    names = set(inside(web, "ls /dev").split())
    assert {"null", "zero", "full", "random", "urandom", "tty", "ptmx", "pts", "shm"} <= names
    assert names <= DEVICES, names - DEVICES
    assert inside(web, "echo x > /dev/null; head -c 4 /dev/zero | wc -c") == "4"


def test_no_file_of_the_host_is_open_inside(web: Cli) -> None:
    descriptors = os.listdir(f"/proc/{pid_of(web, 'web')}/fd")
    assert sorted(descriptors) == ["0", "1", "2"]
    names = inside(web, "ls /proc/self/fd").split()
    assert set(names) <= {"0", "1", "2", "3"}, "3 is the directory that ls reads"


def test_the_hosts_programs_are_out_of_reach(web: Cli) -> None:
    """CVE-2019-5736: /proc/PID/exe of what made the container must not name the host's interpreter."""
    for line in inside(web, "ls -l /proc/[0-9]*/exe /proc/self/exe").splitlines():
        assert line.endswith("/bin/busybox"), line
    assert "python" not in inside(web, "cat /proc/[0-9]*/maps")


def test_the_root_cannot_be_left(web: Cli) -> None:
    assert inside(web, "cd ../../../..; ls -d /proc/1/root/opt/insula /opt/insula 2>/dev/null | wc -l") == "0"
    assert inside(web, "ls -di / | awk '{print $1}'") == inside(web, "ls -di /.. | awk '{print $1}'")
    for line in inside(web, "cat /proc/self/mountinfo").splitlines():
        if line.split()[4] == "/":
            assert " overlay " in line
            assert "nodev" in line.split()[5].split(","), "a device node in a layer would be none"
            assert "shared:" not in line and "master:" not in line, "no mount propagates to or from the host"


def test_image_layers_are_shared_and_writes_are_private(web: Cli) -> None:
    web.ok("run", "-d", "--name", "other", "busybox", "sleep", "600")
    layers = [[layer["path"] for layer in web.json("explain", name)["layers"]] for name in ("web", "other")]
    assert layers[0] == layers[1] != []
    before = [(path, os.stat(path).st_mtime_ns, sorted(os.listdir(path))) for path in layers[0]]
    inside(web, "echo mine > /secret; echo changed >> /etc/passwd; mkdir /bin/new")
    assert web.run("exec", "other", "cat", "/secret").status != 0
    assert "changed" not in web.ok("exec", "other", "cat", "/etc/passwd")
    assert web.run("exec", "other", "test", "-e", "/bin/new").status != 0
    assert before == [(path, os.stat(path).st_mtime_ns, sorted(os.listdir(path))) for path in layers[0]]
    assert inside(web, "cat /secret") == "mine", "the positive control"
    web.ok("rm", "-f", "other")


def test_host_ids_see_nothing_of_each_others_files(web: Cli, daemon: Daemon) -> None:
    """The instance's directories are closed to everybody but root."""
    for path in (daemon.root, daemon.root / "instances"):
        assert path.stat().st_mode & 0o077 == 0, path
        assert path.stat().st_uid == 0


def test_the_socket_is_for_root_and_its_group(daemon: Daemon) -> None:
    mode = (daemon.run / "insulad.sock").stat().st_mode & 0o777
    assert mode in (0o660, 0o600), oct(mode)


def test_the_instance_is_in_its_tenants_control_groups(web: Cli, daemon: Daemon) -> None:
    lines = Path(f"/proc/{pid_of(web, 'web')}/cgroup").read_text().splitlines()
    ours = [line for line in lines if f"/{daemon.prefix}/{web.tenant}/" in line]
    controllers = {name for line in ours for name in line.split(":")[1].split(",")}
    assert {"memory", "pids"} <= controllers or "" in controllers
    for line in inside(web, "cat /proc/self/cgroup").splitlines():
        if any(f":{line.split(':')[1]}:" in mine for mine in ours):
            assert line.endswith(":/"), "inside, its group is the root of all groups"
