"""insula-oci without a user namespace, as engines call it: root inside is the host's root.

What holds a container in then is its mount namespace, its capabilities, its control group, and that the runtime leaves
nothing of the host's within reach while it works: no descriptor, no program, no key, no path that means something else.
"""

from __future__ import annotations

import copy
import os
import shutil
import signal
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from insula.kernel import syscalls
from tests.forked import forked
from tests.support.cli import Terminal
from tests.support.machine import Run
from tests.support.wait import patiently, until
from tests.system.escape.attacks import files, processes, races, runtime
from tests.system.escape.attacks.calls import syscall
from tests.system.escape.bundles import ALL, DOCKERS, OciCell, host_file
from tests.system.escape.cell import POISON, PYTHON, Cell, End, poisoned_paths


@pytest.fixture(scope="module")
def made(run_: Run) -> Iterator[OciCell]:
    path = run_.path / "escape"
    yield OciCell(path, f"{run_.name}oci/cell")
    shutil.rmtree(path)


@pytest.fixture
def cell(made: OciCell) -> Iterator[OciCell]:
    """The bundle, with its original config before each test."""
    before = copy.deepcopy(made.config)
    yield made
    made.config.clear()
    made.config.update(before)
    assert made.bundle.left() == []


def test_the_runtimes_program_cannot_be_overwritten(cell: OciCell) -> None:
    """CVE-2019-5736: root inside opens /proc/PID/exe of a process that joins, waits until it runs something else, and
    overwrites the file: the host's runtime, at its next start, is his. Here it is a sealed copy in memory, and the
    container gets what it asks for only of its own programs."""
    cell.grant(ALL)
    (cell.root / "own").mkdir()
    shutil.copy(cell.root / "bin/busybox", cell.root / "own/true")
    with cell.running():
        watching = cell.start(runtime.programs, 2.5, "/tmp/watching")
        until(lambda: (cell.root / "tmp/watching").exists(), "it watches")
        while watching.poll() is None:
            cell.oci.run("exec", "cell", "/own/true")  # "text file busy" now and then: it is being written to
        found = Cell.finish(watching).value
    own = host_file(str(cell.root / "own/true"))
    shutil.rmtree(cell.root / "own")
    (cell.root / "tmp/watching").unlink()
    writable = [[device, inode] for device, inode, could in found if could]
    assert own in writable, "the control: its own program could be overwritten"
    assert len(found) > len(writable), "the control: it did see the runtime, a file that can't be written"
    assert host_file(PYTHON) not in [[device, inode] for device, inode, _ in found], "the host's was never in reach"
    assert {device for device, _ in writable} == {own[0]}, "nothing but files of its own root"


def test_a_script_whose_interpreter_is_the_runtime(cell: OciCell) -> None:
    """The other half of CVE-2019-5736: `#!/proc/self/exe`, to make the runtime's process stay as a program inside."""
    again = cell.root / "bin/again"
    again.write_text("#!/proc/self/exe\n")
    again.chmod(0o755)
    cell.grant(ALL)
    with cell.running():
        for program in ("/bin/again", "/proc/self/exe"):
            result = cell.oci.run("exec", "cell", program, "-c", "import os; print(os.stat('/proc/self/exe').st_ino)")
            assert result.out.strip() != str(host_file(PYTHON)[1]), result
    again.unlink()


def test_descriptors_and_the_working_directory(cell: OciCell) -> None:
    """CVE-2024-21626: a descriptor of a host's directory stays open while the runtime changes to process.cwd, and
    `/proc/self/fd/7` is a directory of the host; or it is still open in the program."""
    outside = sorted(os.listdir("/"))[:20]
    end = cell.once(runtime.where)
    assert isinstance(end, End) and end.value["cwd"] == "/", "the control"
    for number in (3, 4, 5, 6, 7, 9):
        found = cell.once(runtime.where, cwd=f"/proc/self/fd/{number}")
        if isinstance(found, End):
            assert outside not in found.value["seen"].values(), found
            assert found.value["cwd"].startswith("/"), "a directory outside of the root has no name in it"
    with cell.running():
        descriptors = cell.gets(runtime.where)["seen"]
        assert outside not in descriptors.values()
        for number in (3, 5, 6, 7):
            result = cell.oci.run("exec", "--cwd", f"/proc/self/fd/{number}", "cell", "/bin/ls", "../../../../..")
            assert result.status != 0 or ("rootfs" not in result.out and "opt" not in result.out), result


NULLS: dict[str, Callable[[Path], object]] = {
    "a link to core_pattern": lambda path: path.symlink_to("/proc/sys/kernel/core_pattern"),
    "a link to sysrq": lambda path: path.symlink_to("/proc/sysrq-trigger"),
    "a file": lambda path: path.write_text("not null"),
    "another device": lambda path: os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5)),
    "a directory": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("case", NULLS)
def test_masks_from_an_images_null_device(cell: OciCell, case: str) -> None:
    """CVE-2025-31133: runc masked files by binding the container's /dev/null over them, whatever that was. As a link to
    core_pattern it gave a writable core_pattern where nothing should be. It must be the null device, or nothing
    runs."""
    cell.config["mounts"] = [m for m in cell.config["mounts"] if not m["destination"].startswith("/dev")]
    device = cell.root / "dev/null"
    device.parent.mkdir(exist_ok=True)
    NULLS[case](device)
    masked = [path for path in ("/proc/keys", "/proc/interrupts", "/proc/timer_list") if os.path.exists(path)]
    cell.config["linux"]["maskedPaths"] = masked
    try:
        end = cell.once(runtime.masks, *masked)
        if isinstance(end, End):
            assert end.value == {path: [stat.S_IFCHR >> 12, 1, 3, 0] for path in masked}
    finally:
        shutil.rmtree(device.parent)
    end = cell.once(runtime.masks, *masked)
    assert isinstance(end, End) and end.value == {path: [stat.S_IFCHR >> 12, 1, 3, 0] for path in masked}, "the control"
    shutil.rmtree(device.parent)


def test_a_console_that_leads_elsewhere(cell: OciCell) -> None:
    """CVE-2025-52565: /dev/console of the image is a link, and the terminal is bound over what it names, before masks
    and read-only paths are in force."""
    cell.config["mounts"] = [m for m in cell.config["mounts"] if m["destination"] != "/dev"]
    (cell.root / "dev").mkdir()
    (cell.root / "victim").write_text("as it was")
    (cell.root / "dev/console").symlink_to("/victim")
    program = "cat /victim; cat /proc/mounts; echo done"
    cell.config["process"] |= {"terminal": True, "args": ["/bin/busybox", "sh", "-c", program]}
    cell.bundle.write(cell.config)
    command = cell.oci.command("run", "--bundle", cell.bundle.path, "console")
    with Terminal(command, {"PATH": os.environ["PATH"], "TERM": "xterm"}, 24, 200) as terminal:
        status = terminal.wait()
        seen = terminal.seen
    cell.oci.run("delete", "--force", "console")
    assert "error:" in seen or (status == 0 and "as it was" in seen and " /victim " not in seen), seen
    shutil.rmtree(cell.root / "dev")
    (cell.root / "victim").unlink()


@pytest.mark.parametrize("name", ["proc", "sys", "proc/sys"])
def test_a_root_with_links_for_the_kernels_file_systems(cell: OciCell, name: str) -> None:
    """CVE-2019-19921 and CVE-2023-27561: /proc of the image is a link, so what is masked and read-only is elsewhere."""
    path = cell.root / name
    if "/" in name:
        path.parent.mkdir(exist_ok=True)
    elif path.exists():
        path.rmdir()
    path.symlink_to("/tmp")
    try:
        end = cell.once(runtime.mounts)
        if isinstance(end, End):
            assert ["/proc", "proc"] in end.value and ["/tmp", "proc"] not in end.value
            assert ["/tmp", "sysfs"] not in end.value
    finally:
        path.unlink()


def test_mounts_while_links_come_and_go(cell: OciCell, tmp_path: Path) -> None:
    """CVE-2021-30465: two containers share a volume. One swaps a directory in it with a link to a path of the host,
    while the runtime makes the other's mounts below it: mkdir and mount by path go where the link leads."""
    volume, outside = tmp_path / "volume", tmp_path / "outside"
    for path in (volume, outside):
        path.mkdir()
    races.prepare(str(volume), str(outside))
    cell.config["mounts"] += [
        {"destination": "/volume", "type": "bind", "source": str(volume), "options": ["rbind", "rw"]},
        {"destination": "/volume/box/deep", "type": "tmpfs", "source": "tmpfs", "options": ["size=64k"]},
    ]
    cell.config["linux"]["maskedPaths"] = ["/volume/box/secret"]
    before = Path("/proc/self/mountinfo").read_text()
    racer = os.fork()
    if racer == 0:
        races.exchange(str(volume / "box"), str(volume / "link"), patiently(60))
        os._exit(0)
    ran = 0
    try:
        for _ in range(6):
            end = cell.once(runtime.mounts)
            if isinstance(end, End):
                ran += 1  # perhaps with a mount on the path of `outside` in its own root, where the link leads in it
        assert os.listdir(outside) == [], "nothing was made on the host"

        def naive() -> bool:
            for _ in range(2000):
                try:
                    os.makedirs(volume / "box" / "naive", exist_ok=True)
                except OSError:
                    continue
                if (outside / "naive").exists():
                    return True
            return False

        assert naive(), "the control: mkdir by path is led out"
    finally:
        os.kill(racer, signal.SIGKILL)
        os.waitpid(racer, 0)
    assert Path("/proc/self/mountinfo").read_text() == before


def test_modules_where_the_host_looks_for_its_own(run_: Run) -> None:
    """CVE-2019-14271: code of the container's, loaded by a process of the host's that entered it: see test_images. Here
    it would run as the host's root with all capabilities."""
    cell = OciCell(run_.path / "poison", f"{run_.name}oci/poison")
    try:
        for path in poisoned_paths():
            target = cell.root / path.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            target.write_text(POISON)
        cell.grant(DOCKERS)
        cell.config["hostname"] = "poison"
        cell.config["linux"]["sysctl"] = {"net.ipv4.ip_forward": "1"}
        with cell.running():
            for program in ("/bin/true", "/no/such", "/bin", "/proc/self/exe"):
                cell.oci.run("exec", "cell", program)
            for option in (("--cwd", "/no"), ("--user", "7:8")):
                cell.oci.run("exec", *option, "cell", "/bin/true")
        for process in ({"args": ["/no/such"]}, {"cwd": "/no/such"}, {"user": {"uid": 1 << 31, "gid": 0}}):
            cell.config["process"] |= process
            cell.bundle.write(cell.config)
            assert cell.oci.run("run", "--bundle", cell.bundle.path, "once").status != 0
            cell.oci.run("delete", "--force", "once")
        assert not (cell.root / "poisoned").exists(), (cell.root / "poisoned").read_text()
    finally:
        shutil.rmtree(cell.bundle.path)


def test_keys_of_the_host_cannot_be_read(cell: OciCell) -> None:
    """Keyrings are not namespaced: a session's is inherited by whatever it starts, so a container would search the keys
    of who ran the engine (Kerberos tickets, disk keys; CVE-2016-0728 was reached by it). The runtime makes a new
    one."""
    cell.grant(ALL)

    def administrator() -> tuple[str, str | None]:
        syscalls.join_session_keyring("insula-escape-host")
        syscall("add_key", b"user", b"insula-escape-secret", b"the host's", 10, runtime.SESSION)
        own = runtime.key_of_the_session("insula-escape-secret")
        end = cell.once(runtime.key_of_the_session, "insula-escape-secret")
        assert isinstance(end, End), end
        return own, end.errno

    own, refusal = forked(administrator, timeout=30)
    assert own == "the host's", "the control"
    assert refusal in {"ENOKEY", "EACCES"}
    with cell.running():
        assert cell.try_(runtime.key_of_the_session, "insula-escape-secret").errno in {"ENOKEY", "EACCES"}


def test_files_of_the_kernel_cannot_be_written(cell: OciCell) -> None:
    """Root's own files, with Docker's capabilities: only that /proc/sys and the like are read-only keeps him from
    them."""
    cell.grant(DOCKERS)
    with cell.running():
        found = cell.gets(files.writable, "/proc", "/sys")
        assert [path for path in found if not path.startswith("/proc/pressure/")] == []
        assert cell.gets(files.changed, "/sys") == []
        for path in ("/proc/sys", "/sys/fs/cgroup"):
            assert cell.try_(files.read_only_no_more, path).errno == "EPERM"
        assert cell.try_(files.release_agent, "/tmp/release").errno == "EPERM"
    (cell.root / "tmp/release").rmdir()


def test_device_nodes_of_the_real_root(cell: OciCell) -> None:
    """With CAP_MKNOD, which Docker grants, the host's root makes any node; the control group doesn't let him open
    it."""
    cell.grant(DOCKERS)
    with cell.running():
        for disk in files.disks()[:2]:
            assert cell.try_(files.node, "/tmp/disk", "b", *disk).errno == "EPERM"
        for minor in (1, 11):
            assert cell.try_(files.node, "/tmp/memory", "c", 1, minor).errno == "EPERM"
        assert cell.gets(files.node, "/tmp/zero", "c", 1, 5), "the control: harmless ones open"


def test_a_joining_process_cannot_be_inspected(cell: OciCell) -> None:
    """CVE-2016-9962 with Docker's capabilities: without CAP_SYS_PTRACE nobody inside looks at a process that joins."""
    cell.grant(DOCKERS)
    with cell.running():
        spy = cell.start(processes.spy, 2.0, "/tmp/spying")
        until(lambda: (cell.root / "tmp/spying").exists(), "it spies")
        while spy.poll() is None:
            cell.oci.ok("exec", "cell", "/bin/true")
        got = Cell.finish(spy).value
    (cell.root / "tmp/spying").unlink()
    assert "/bin/busybox" in got["exe"], "the control: it sees the container's own"
    assert got["program's file system"] == [str(os.stat(cell.root).st_dev)]
    assert not [what for found in got.values() for what in found if "insula" in what or "memfd" in what]


@pytest.mark.parametrize("options", [(), ("--no-pivot",)])
@pytest.mark.parametrize("user", [False, True])
@pytest.mark.parametrize("fstype", ["proc", "sysfs"])
def test_a_proc_or_sys_without_masks(cell: OciCell, fstype: str, user: bool, options: tuple[str, ...]) -> None:
    """The kernel lets a user namespace mount a /proc or /sys if one that hides nothing is anywhere in the mount
    namespace. Without pivot_root(2) the host's are, below the container's root: /proc/sys would be writable."""
    cell.grant([*DOCKERS, "CAP_SETFCAP"])
    if user:
        cell.config["linux"]["namespaces"].append({"type": "user"})
        ids = [{"containerID": 0, "hostID": 0, "size": 65536}]
        cell.config["linux"] |= {"uidMappings": ids, "gidMappings": ids}
    end = cell.once(runtime.a_new, fstype, options=options)
    assert isinstance(end, End) and end.errno == "EPERM", end
    cell.config["linux"] |= {"maskedPaths": [], "readonlyPaths": []}
    for mount in cell.config["mounts"]:
        if mount["destination"].startswith("/sys"):
            mount["options"] = [option for option in mount["options"] if option != "ro"]
    end = cell.once(runtime.a_new, fstype, options=options)
    assert isinstance(end, End) and end.value == 0, ("the control", end)


def test_a_proc_that_the_host_mounts_later(cell: OciCell, tmp_path: Path) -> None:
    """Mounts of the host arrive where it has shared them; without pivot_root(2) also below the container's root."""
    cell.grant([*DOCKERS, "CAP_SETFCAP"])
    cell.bundle.write(cell.config)
    try:
        cell.oci.ok("run", "--detach", "--no-pivot", "--bundle", cell.bundle.path, "cell")
        subprocess.run(["mount", "-t", "proc", "proc", tmp_path], check=True)
        try:
            assert f" {tmp_path} rw,relatime shared:" in Path("/proc/self/mountinfo").read_text(), "the control"
            assert cell.try_(runtime.a_new, "proc").errno == "EPERM"
        finally:
            subprocess.run(["umount", tmp_path], check=True)
    finally:
        cell.oci.run("delete", "--force", "cell")


def test_the_mount_namespace_of_others_cannot_be_joined(cell: OciCell) -> None:
    """The same /proc is within reach in any mount namespace that a container would join: none can be."""
    with cell.running():
        pid = cell.oci.json("state", "cell")["pid"]
        [own] = [entry for entry in cell.config["linux"]["namespaces"] if entry["type"] == "mount"]
        own["path"] = f"/proc/{pid}/ns/mnt"
        end = cell.once(runtime.a_new, "proc")
    assert isinstance(end, str) and "can't join a mount namespace" in end
