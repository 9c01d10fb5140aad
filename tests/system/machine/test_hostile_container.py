"""What has taken over a machine's container, QEMU or the shim, after an escape from the guest: what it reaches, and
what insulad makes of what it answers. Programs of these tests are in the place of the shim, with all that it has."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.cli import Cli
from tests.support.daemon import Daemon
from tests.support.wait import until
from tests.system.escape import cell
from tests.system.escape.attacks import files, kernel, privileges, processes, sockets
from tests.system.escape.cell import End, unguarded

LONG = 300.0
HEAD = f"""\
#!{cell.PYTHON} -ISB
import fcntl, json, os, socket, sys, time
sys.path.insert(0, "/attack")
plan = json.loads(os.read(3, 1 << 20))
def show(value):
    print(json.dumps(value, default=repr), flush=True)
def questions():
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind("\\0insula-shim")
    listener.listen(64)
    while True:
        connection, _ = listener.accept()
        yield connection, json.loads(connection.recv(1 << 16))
def ready():
    for connection, question in questions():
        connection.send(json.dumps(dict(generation=plan["identity"]["generation"])).encode())
"""
TRIES = """\
from tests.system.escape.attacks.run import call
show([call(*each) for each in json.loads({calls!r})])
ready()
"""
REFUSED: list[tuple[Any, ...]] = [
    (kernel.bpf_map,),
    (kernel.perf_event,),
    (kernel.io_uring,),
    (kernel.userfault,),
    (kernel.mount_tmpfs,),
    (kernel.file_system_context,),
    (kernel.user_namespace,),
    (kernel.user_namespace_by_clone,),
    (kernel.user_namespace_by_clone3,),
    (kernel.mount_namespace,),
    (kernel.join_a_namespace,),
    (kernel.load_a_module,),
    (kernel.another_kernel,),
    (kernel.swap_from_a_file,),
    (kernel.set_the_clock,),
    (kernel.host_name,),
    (kernel.ports_of_the_machine,),
    (kernel.kernel_log,),
    (kernel.session_keyring,),
    (kernel.watch_all_files,),
    (files.opened, "/dev/kvm", os.O_RDWR),
    (files.opened, "/dev/net/tun", os.O_RDWR),
    (files.opened, "/proc/sys/kernel/core_pattern"),
    (files.opened, "/proc/1/root/etc/shadow", os.O_RDONLY),
    (files.opened, "/shim"),
    (files.opened, "/usr/bin/qemu-system-x86_64"),
    (files.another_proc, "/tmp/proc"),
    (files.read_only_no_more, "/"),
    (sockets.new_link, "dummy7"),
    (sockets.devices,),
]
"""What it must not be able to do."""
DESCRIPTORS = """\
import ctypes, mmap
libc = ctypes.CDLL(None, use_errno=True)
def outcome(action):
    try:
        return action() or "done"
    except OSError as error:
        return os.strerror(error.errno)
def punch(fd):
    if libc.fallocate(fd, 3, ctypes.c_long(0), ctypes.c_long(4096)):
        raise OSError(ctypes.get_errno(), "")
def again(fd, action):
    fd = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
    try:
        return action(fd)
    finally:
        os.close(fd)
def shared(fd):
    mmap.mmap(fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)[0] = 66
def write(fd):
    os.pwrite(fd, os.pread(fd, 1, 0), 0)
ways = dict(write=write, shared=shared, punch=punch, truncate=lambda fd: os.ftruncate(fd, 0))
found = dict()
for fd in plan["descriptors"]:
    name = os.readlink(f"/proc/self/fd/{fd}").split(" ")[0]
    own = {{way: outcome(lambda: action(fd)) for way, action in ways.items() if way != "truncate"}}
    reopened = {{way: outcome(lambda: again(fd, action)) for way, action in ways.items() if "disk" not in name}}
    found[name] = dict(own=own, reopened=reopened)
show(found)
ready()
"""
ANSWERS = """\
mode = plan["identity"]["hostname"]
given = plan["identity"]["generation"]
held = []
if mode == "deaf":
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind("\\0insula-shim")
    listener.listen(1)
    time.sleep(10000)
for connection, question in questions():
    answer = b""
    if mode == "big":
        answer = b'{"generation": "' + given.encode() + b'", "x": "' + b"x" * 100000 + b'"}'
    elif mode == "deep":
        answer = b"[" * 4000
    elif mode == "list":
        answer = b"[1, 2]"
    elif mode == "another":
        answer = b'{"generation": "' + b"0" * 32 + b'"}'
    elif mode == "odd":
        answer = json.dumps(dict(failed=dict(step=dict(a=1), object=[2], errno="x", error=["y" * 3000]))).encode()
    elif mode == "passing":
        some = [os.open("/", os.O_RDONLY) for _ in range(200)]
        socket.send_fds(connection, [b"[]"], some)
        for fd in some:
            os.close(fd)
        connection.close()
        continue
    elif mode == "mute":
        held.append(connection)
        continue
    if answer:
        connection.send(answer)
    connection.close()
"""
MODES = ("big", "deep", "list", "another", "odd", "passing", "mute", "closing", "deaf")


class Hostile:
    """A daemon whose machines have a program of the test in the place of the shim."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon, self.cli = daemon, daemon.cli
        self.cli.ok("run", "--vm", "--rm", "--network", "none", "busybox", "true", timeout=LONG)
        [self.root] = daemon.root.glob("machines/*/*/rootfs")
        self.shim = (self.root / "shim").read_bytes()
        for path, data in cell.files().items():
            target = Path(f"{self.root}{path}")
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                target.write_bytes(data)
                target.chmod(0o755)

    def install(self, program: str) -> None:
        self._replace((HEAD + program).encode())

    def put_back(self) -> None:
        self._replace(self.shim)

    def _replace(self, data: bytes) -> None:
        new = self.root / "shim.new"
        new.write_bytes(data)
        new.chmod(0o755)
        new.rename(self.root / "shim")

    def begin(self, *options: str, name: str = "vm") -> None:
        self.cli.ok("run", "-d", "--vm", "--name", name, *options, "busybox", "sleep", "1000", timeout=LONG)

    def said(self, name: str = "vm") -> Any:
        """The first line that the program has printed."""
        line = until(lambda: self.cli.run("logs", name).out, "it has said something", LONG)
        return json.loads(line.splitlines()[0])


@pytest.fixture(scope="module")
def hostile(daemon: Daemon) -> Iterator[Hostile]:
    found = Hostile(daemon)
    yield found
    found.put_back()


@pytest.fixture
def machines(hostile: Hostile) -> Iterator[Hostile]:
    yield hostile
    names = [view["instance"]["name"] for view in hostile.cli.json("ps", "-a")]
    if names:
        hostile.cli.ok("rm", "-f", *names, timeout=LONG)


def ends(machines: Hostile, *wanted: tuple[Any, ...]) -> list[End]:
    machines.install(TRIES.format(calls=cell.request(wanted)))
    machines.begin()
    return [End.of(each) for each in machines.said()]


def test_it_is_an_ordinary_user_of_an_empty_place(machines: Hostile) -> None:
    """Nothing but its own processes, no device of the network, nothing that can be written to, no system call that
    leads further. The same works for the host's root, where that does no harm."""
    insulad = machines.daemon.pid("insulad") or 0
    looked = [
        (processes.seen,),
        (files.writable, "/"),
        (files.changed, "/"),
        (files.nodes, "/dev", "/tmp"),
        (privileges.more_capabilities,),
        (processes.number_of, insulad),
        (sockets.netlink_families,),
    ]
    found = ends(machines, *looked, *REFUSED)
    seen, writable, changed, nodes, more, number, families = (each.value for each in found[: len(looked)])
    assert seen == [1, 2], "itself, and what tries"
    assert (writable, changed, nodes) == ([], [], [])
    assert all(more.values()) and all(number.values()), (more, number)
    assert all(families.values()), families
    for (attack, *_), end in zip(REFUSED, found[len(looked) :], strict=True):
        assert end.refused, (attack.__name__, end)
    assert unguarded(kernel.mount_tmpfs).value == unguarded(kernel.mount_namespace).value == 0, "the control"
    assert unguarded(files.opened, "/proc/sys/kernel/core_pattern").value, "the control: nothing is written"


def test_what_it_was_given_can_not_be_changed_but_for_its_disk(machines: Hostile) -> None:
    """The memory of a template is sealed, and the image is open for reading; a copy that is made afterwards is well."""
    machines.install(DESCRIPTORS.replace("{{", "{").replace("}}", "}"))
    machines.begin("--network", "none")
    found = machines.said()
    disks = [name for name in found if name.endswith("/disk")]
    memory = [name for name in found if name.startswith("/memfd:")]
    assert len(disks) == 1 and memory and len(found) > 2, found
    assert found[disks[0]]["own"]["write"] == "done", "the control: its disk is its own"
    for name, how in found.items():
        if name in disks:
            continue
        for way in (*how["own"].values(), *how["reopened"].values()):
            assert way in {"Operation not permitted", "Bad file descriptor", "Permission denied", "Text file busy",
                           "No such file or directory", "Read-only file system", "Invalid argument",
                           "No such device or address"}, (name, how)  # fmt: skip
    machines.cli.ok("rm", "-f", "vm")
    machines.put_back()
    run = ("run", "--rm", "--vm", "--network", "none", "busybox", "echo", "well")
    assert machines.cli.ok(*run, timeout=LONG) == "well"


def test_whatever_it_answers_insulad_goes_on(machines: Hostile, cli: Cli) -> None:
    """Answers of all kinds, and none: the machine counts as running only with its own number; others are served, the
    descriptors and the memory of insulad stay as they were, and each is removed at once."""
    machines.install(ANSWERS)
    insulad = machines.daemon.pid("insulad") or 0

    def memory() -> int:
        line = next(each for each in Path(f"/proc/{insulad}/status").read_text().splitlines() if "VmRSS" in each)
        return int(line.split()[1]) >> 10

    before, descriptors = memory(), len(os.listdir(f"/proc/{insulad}/fd"))
    starting = [
        machines.cli.start("run", "-d", "--vm", "--name", mode, "--network", "none", "busybox", "sleep", "1000")
        for mode in MODES
    ]
    assert cli.ok("run", "--rm", "busybox", "echo", "well") == "well", "another tenant is served meanwhile"
    failed = {mode: each.communicate(timeout=LONG) for mode, each in zip(MODES, starting, strict=True)}
    states = {view["instance"]["name"]: view["status"]["state"] for view in machines.cli.json("ps", "-a")}
    assert states == {mode: "failed" if mode == "odd" else "starting" for mode in MODES}, failed
    assert failed["odd"][1].count("\n") == 1 and len(failed["odd"][1]) < 2000
    assert cli.ok("run", "--rm", "busybox", "echo", "well") == "well"
    for mode in MODES:
        machines.cli.ok("rm", "-f", mode)
    until(lambda: len(os.listdir(f"/proc/{insulad}/fd")) <= descriptors + 16, "descriptors are closed", 30)
    assert memory() < before + 100, "MiB"
    assert machines.daemon.pid("insulad") == insulad
