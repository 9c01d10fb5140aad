"""A virtual machine moves from one insulad to another one by `insula migrate`, over HTTPS.

Each host is a network namespace of its own, and a link joins both.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from insula.cli.verbs.remote import encode
from tests.support.daemon import Daemon
from tests.support.machine import Namespaces, Run
from tests.support.wait import patiently, until

LONG = 300.0
PORT, GATE_USER = 7443, 61041
ADDRESSES = ("198.18.1.1", "198.18.1.2")
TICK = "n=0; while :; do n=$((n + 1)); echo $n; echo $n > /counter; sleep 0.1; done"

ON_DISKS = """\
until [ -e /dev/bare ]; do sleep 0.1; done
n=0; echo $n > /data/count; echo $n > /dev/bare
while :; do
    read a < /data/count; b=$(dd if=/dev/bare bs=16 count=1 2>/dev/null | head -n 1)
    [ "$a.$b" = $n.$n ] && echo $n || echo broken $n $a $b
    n=$((n + 1)); echo $n > /data/count; echo $n > /dev/bare
    sleep 0.1
done
"""
MAKE_BARE = "ln -s /dev/disk/by-id/virtio-bare /dev/bare"
FILL = """\
for n in $(seq 50); do head -c 50000 /dev/urandom > /data/f$n; done
head -c 9000000 /dev/urandom > /data/f; md5sum /data/f* > /data/sums; sync
"""
CHECK = "md5sum -c -s /data/sums"


class Hosts:
    """Two hosts, which each other's operator knows as `other`."""

    def __init__(self, run: Run, home: Path, stack: ExitStack) -> None:
        self.daemons = [Daemon(run) for _ in ADDRESSES]
        for daemon in self.daemons:
            stack.callback(daemon.remove)
            for path in (daemon.path.parent, daemon.path):
                path.chmod(0o711)
        first, second = (daemon.namespaces for daemon in self.daemons)
        first.ip(first.host, f"link add wan0 type veth peer name wan0 netns {second._holders[0].pid}")
        for daemon, address in zip(self.daemons, ADDRESSES, strict=True):
            daemon.namespaces.ip(daemon.namespaces.host, f"address add {address}/24 dev wan0")
            daemon.namespaces.ip(daemon.namespaces.host, "link set wan0 up")
            self.configure(daemon, address, ADDRESSES)
            daemon.start()
            daemon.cli.ok("user", "create", "mover")
            daemon.cli.ok("user", "bind", "mover", "member", "-T", "default")
        self.source, self.target = (OfHost(daemon, home) for daemon in self.daemons)
        for one, other, address in ((self.source, self.target, ADDRESSES[1]), (self.target, self.source, ADDRESSES[0])):
            invitation = json.loads(other.daemon.cli.ok("--json", "remote", "invite", "mover"))
            given = encode({**invitation, "addresses": [f"{address}:{PORT}"]})
            until(lambda one=one, given=given: one.adds("other", given), "it is reached by HTTPS", 30)  # type: ignore[misc]

    @staticmethod
    def configure(daemon: Daemon, address: str, migration: Sequence[str]) -> None:
        listen = f'[api]\nlisten = ["{address}:{PORT}"]\nnames = ["{address}"]\nuser = "{GATE_USER}"\n'
        daemon.configure(f'{listen}[machines]\ntemplate = "0"\nmigration = {json.dumps(list(migration))}\n')


class OfHost:
    """The command line on a host, where its operator has a home."""

    def __init__(self, daemon: Daemon, home: Path) -> None:
        self.daemon, self.cli = daemon, daemon.cli
        self.environment = {**daemon.cli.environment(), "HOME": str(home / daemon.prefix)}

    def run(self, *words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        command = Namespaces.wrap(self.daemon.namespaces.host, *self.cli.command(*words))
        return subprocess.run(
            command, env=self.environment, input=stdin, capture_output=True, text=True, timeout=patiently(60)
        )

    def ok(self, *words: str) -> str:
        done = self.run(*words)
        assert done.returncode == 0, done
        return done.stdout.strip()

    def fails(self, *words: str) -> str:
        done = self.run(*words)
        assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done
        return done.stderr

    def adds(self, name: str, invitation: str) -> bool:
        return self.run("remote", "add", name, stdin=f"{invitation}\n").returncode == 0

    def begin(self, *words: str) -> subprocess.Popen[str]:
        command, pipe = Namespaces.wrap(self.daemon.namespaces.host, *self.cli.command(*words)), subprocess.PIPE
        return subprocess.Popen(command, env=self.environment, stdout=pipe, stderr=pipe, text=True)

    @property
    def names(self) -> list[str]:
        return [each["instance"]["name"] for each in self.cli.json("ps", "-a")]

    @property
    def directories(self) -> list[str]:
        return [each.name for each in (self.daemon.root / "instances").iterdir()]


@pytest.fixture(scope="module")
def hosts(run_: Run, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with ExitStack() as stack:
        yield Hosts(run_, tmp_path_factory.mktemp("homes"), stack)


def numbers(host: OfHost) -> list[int]:
    return [int(line) for line in host.cli.ok("logs", "vm").splitlines() if line.isdigit()]


def goes_on(host: OfHost) -> None:
    seen = len(numbers(host))
    until(lambda: len(numbers(host)) > seen + 2, "it goes on", 60)


def only_at(host: OfHost, other: OfHost) -> None:
    """It runs there, and of the other host nothing is left."""
    until(lambda: host.cli.json("inspect", "vm")[0]["status"]["state"] == "running", "it runs", 60)
    goes_on(host)
    until(lambda: other.names == [] and other.directories == [], "nothing is left at the other host", 60)


def test_it_moves_and_moves_back(hosts: Hosts) -> None:
    source, target = hosts.source, hosts.target
    machine = ("-d", "--vm", "--cold", "-m", "128m", "--name", "vm", "--restart", "always")
    source.cli.ok("run", *machine, "busybox", "sh", "-c", TICK, timeout=LONG)
    goes_on(source)
    before = source.cli.json("inspect", "vm")[0]["instance"]
    machine_id = source.cli.ok("exec", "vm", "cat", "/etc/machine-id")

    for allowed, refused in (([], "to other hosts from here"), (["203.0.113.0/24"], f"to {ADDRESSES[1]}:{PORT} from")):
        hosts.configure(source.daemon, ADDRESSES[0], allowed)
        source.daemon.stop()
        source.daemon.start()
        assert f"machines may not move {refused}" in source.fails("migrate", "vm", "other")
    hosts.configure(source.daemon, ADDRESSES[0], ADDRESSES)
    source.daemon.stop()
    source.daemon.start()

    address = before["ports"][0]["address"]
    taken = ("--name", "taken", "--network", f"default,ip={address}")
    target.cli.ok("run", "-d", *taken, "busybox", "sleep", "1000")
    assert f"address {address} is taken" in source.fails("migrate", "vm", "other")
    target.cli.ok("rm", "-f", "taken")
    goes_on(source)

    assert source.ok("migrate", "vm", "other") == "vm runs at other"
    only_at(target, source)
    after = target.cli.json("inspect", "vm")[0]["instance"]
    for name in ("id", "name", "image_digest"):
        assert after[name] == before[name], name
    for name in ("address", "address6", "mac"):
        assert after["ports"][0][name] == before["ports"][0][name], name
    assert target.cli.ok("exec", "vm", "cat", "/etc/machine-id") == machine_id
    assert abs(int(target.cli.ok("exec", "vm", "date", "+%s")) - time.time()) < patiently(2)
    assert target.cli.json("verify")["passed"]
    assert "no instance vm" in source.fails("migrate", "vm", "other")

    assert target.ok("migrate", "vm", "other") == "vm runs at other"
    only_at(source, target)
    counted = numbers(source)
    assert counted == list(range(counted[0], counted[0] + len(counted))) and counted[0] > 10
    source.cli.ok("stop", "-t", "0", "vm")
    source.cli.ok("start", "vm", timeout=LONG)
    assert source.cli.ok("exec", "vm", "cat", "/counter"), "it starts with the disk that has moved"
    source.cli.ok("rm", "-f", "vm")


def test_it_moves_with_all_of_its_disks(hosts: Hosts) -> None:
    """Its program finds on both hosts what it has written, on a disk that is mounted and on one that is bare, and so
    does the next start. There it can give disks back, and get others."""
    source, target = hosts.source, hosts.target
    words = ("-d", "--vm", "--cold", "-m", "128m", "--name", "vm", "busybox", "sh", "-c", ON_DISKS)
    source.cli.ok("run", *words, timeout=LONG)
    source.cli.ok("disk", "add", "--size", "16m", "vm", "bare", timeout=LONG)
    source.cli.ok("disk", "add", "--size", "64m", "--mount", "/data", "vm", "data", timeout=LONG)
    source.cli.ok("exec", "vm", "sh", "-c", f"{FILL}\n{MAKE_BARE}")
    goes_on(source)

    for here, there in ((source, target), (target, source)):
        assert here.ok("migrate", "vm", "other") == "vm runs at other"
        only_at(there, here)
        assert there.cli.run("exec", "vm", "sh", "-c", CHECK).status == 0
        assert "broken" not in there.cli.ok("logs", "vm")
    assert numbers(source)[0] > 10, "it has counted on"
    source.cli.ok("stop", "-t", "0", "vm")
    source.cli.ok("start", "vm", timeout=LONG)
    assert source.cli.run("exec", "vm", "sh", "-c", CHECK).status == 0, "it is on the disk, and not in memory alone"
    source.cli.ok("exec", "vm", "sh", "-c", MAKE_BARE)
    goes_on(source)
    assert target.directories == []
    assert source.ok("migrate", "vm", "other") == "vm runs at other"
    only_at(target, source)
    target.cli.ok("disk", "rm", "vm", "bare", timeout=LONG)
    target.cli.ok("disk", "add", "--size", "16m", "--mount", "/more", "vm", "more", timeout=LONG)
    target.cli.ok("exec", "vm", "touch", "/more/file")
    target.cli.ok("rm", "-f", "vm")


@pytest.mark.parametrize("end", ["source", "target"])
def test_insulad_is_killed_meanwhile(hosts: Hosts, end: str) -> None:
    """The machine is on one of the hosts, with all of its disks, and nothing is left at the other one, whenever it
    happens."""
    here, there = hosts.source, hosts.target
    machine = ("-d", "--vm", "--cold", "-m", "128m", "--name", "vm")
    here.cli.ok("run", *machine, "busybox", "sh", "-c", TICK, timeout=LONG)
    here.cli.ok("disk", "add", "--size", "64m", "--mount", "/data", "vm", "data", timeout=LONG)
    here.cli.ok("exec", "vm", "sh", "-c", FILL)
    goes_on(here)
    for after in (0.3, 0.8, 1.3):
        killed = (here if end == "source" else there).daemon
        with here.begin("migrate", "vm", "other") as command:
            time.sleep(after)
            until(lambda killed=killed: killed.pid("insulad"), "insulad runs")  # type: ignore[misc]
            killed.kill("insulad")
            killed.launch()
            command.communicate(timeout=patiently(60))
        killed.wait_until_it_answers()
        until(lambda here=here, there=there: len(here.names) + len(there.names) == 1, "one has it", 120)  # type: ignore[misc]
        here, there = (here, there) if here.names else (there, here)
        only_at(here, there)
    here.cli.ok("stop", "-t", "0", "vm")
    here.cli.ok("start", "vm", timeout=LONG)
    here.cli.ok("exec", "vm", "sh", "-c", CHECK)
    here.cli.ok("rm", "-f", "vm")
