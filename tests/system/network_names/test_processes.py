"""The processes of egress by name: their confinement, and what is left of leases and connections when one is killed."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

import pytest

from insula.kernel.netlink.nftables import TimedElement, refresh_elements
from insula.kernel.netns import call_in
from insula.network.linux.gates import NameGates
from insula.network.names.elements import LeaseElement
from insula.network.names.rules import ClientRules, Destination, EgressRules
from tests.support.internet import TcpServer, addresses_in, ask, certificate, echo, greeting, tls_echo, tls_greeting
from tests.support.lab import eventually, isolated
from tests.support.names_world import SITES, NamesWorld, https
from tests.support.wait import patiently

CHECKED = Destination("tcp", 443, True)
SITE, SITE6, PORT, NAME = SITES[0], "2606:2800::1", 8443, "api.example.com"


def world() -> NamesWorld:
    w = NamesWorld()
    w.allow(https("*.example.com", 443, PORT))
    w.server.names(NAME, SITE, SITE6)
    TcpServer(w.internet, SITE, PORT, echo)
    TcpServer(w.internet, SITE, 443, tls_echo(certificate(Path("/run"), NAME)))
    return w


def works(w: NamesWorld) -> bool:
    told = addresses_in(ask(w.client, NAME, timeout=patiently(1)))
    return told == [SITE] and tls_greeting(w.client, SITE, NAME) == NAME


def is_alive(pid: int) -> bool:
    try:
        return not status_of(pid)["State"].startswith("Z")  # the test is whom orphans are given to
    except OSError:
        return False


def status_of(pid: int) -> dict[str, str]:
    return dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())


@isolated
def test_the_processes_have_no_rights_beyond_their_work() -> None:
    w = world()
    _, lessor, gate = w.pids()
    assert status_of(gate)["CapEff"] == f"{0:016x}" and status_of(lessor)["CapEff"] == f"{1 << 12:016x}"
    users = [status_of(pid)["Uid"].split() for pid in (lessor, gate)]
    assert users == [[str(0x74000007)] * 4, [str(0x72000007)] * 4]
    assert status_of(gate)["Gid"].split() == [str(0x71000000)] * 4
    for pid in (lessor, gate):
        status = status_of(pid)
        assert status["NoNewPrivs"] == "1" and status["Seccomp"] == "2" and status["Groups"].split() == []
        assert status["CapBnd"] == status["CapEff"] and len(status["NSpid"].split()) == 2
        root = Path(f"/proc/{pid}/root")
        files = [str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir()]
        assert sorted(files) == ["dev/null", "dev/urandom"]
    kinds = {os.readlink(f"/proc/{gate}/fd/{fd}").split(":")[0] for fd in os.listdir(f"/proc/{gate}/fd")}
    assert kinds <= {"socket", "anon_inode", "/dev/null", "/run/gates/acme/lock"}, (
        "nothing that it could change for the next start"
    )
    assert works(w)


@pytest.mark.parametrize("which", ["supervisor", "lessor", "gate"])
@isolated
def test_whoever_is_killed_leases_stay_and_all_goes_on(which: str) -> None:
    w = world()
    assert works(w)
    with call_in(w.client, lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as direct:
        direct.connect((SITE, PORT))
        assert direct.recv(100)
        before = w.pids()
        os.kill(before[["supervisor", "lessor", "gate"].index(which)], signal.SIGKILL)
        direct.sendall(b"still here")
        assert direct.recv(100) == b"still here"
    if which == "supervisor":
        eventually(lambda: not any(map(is_alive, before)))
        assert ask(w.client, NAME, timeout=0.3) is None, "nothing opens"
        assert not w.gates.running("acme", w.router)
        w.allow(https("*.example.com", 443, PORT))
    eventually(lambda: len(w.pids()) == 3 and not set(w.pids()[1:]) & set(before))
    assert greeting(w.client, SITE, PORT) == SITE, "the lease is in the kernel"
    eventually(lambda: tls_greeting(w.client, SITE, NAME) == NAME)
    eventually(lambda: [lease.names for lease in w.gates.leases("acme")] == [[NAME]])
    assert tls_greeting(w.client, SITE, "other.example.com") is None
    eventually(lambda: works(w))
    w.allow(https("other.example.com"))
    assert greeting(w.client, SITE, PORT) is None and w.leased("leases4") == w.leased("checked4") == []


@isolated
def test_the_next_insulad_adopts_them() -> None:
    w = world()
    before = w.pids()
    w.gates = NameGates(Path("/run/gates"), "t")
    assert w.gates.running("acme", w.router)
    w.allow(https("*.example.com", 443, PORT), https("www.example.com"))
    assert w.pids() == before and works(w)
    (Path("/run/gates/acme") / "version").write_text("0.0 0")
    w.allow(https("*.example.com", 443, PORT))
    assert set(w.pids()).isdisjoint(before) and works(w), "another version is replaced"


@isolated
def test_without_rules_there_is_no_process() -> None:
    w = world()
    supervisor = w.pids()[0]
    w.allow()
    eventually(lambda: not is_alive(supervisor))
    assert not Path("/run/gates/acme").exists()
    assert w.leased("leases4") == [] and w.gates.leases("acme") == []
    w.gates.apply(w.tenant, w.router, EgressRules())
    assert not Path("/run/gates/acme").exists() and w.gates.tenants() == []


@isolated
def test_many_kills_in_a_row_end_well() -> None:
    w = world()
    for number in range(12):
        pids = w.pids()
        if len(pids) == 3:
            os.kill(pids[1 + number % 2], signal.SIGKILL)
        time.sleep(0.05)
        ask(w.client, NAME, timeout=0.05)
    eventually(lambda: works(w))


@isolated
def test_a_thousand_rules_of_five_hundred_instances() -> None:
    w = world()
    clients = {
        f"i{n}": ClientRules((f"10.1.{n >> 8}.{n & 255}",), tuple(https(f"n{k}.site{n}.test") for k in range(20)))
        for n in range(500)
    }
    w.apply(EgressRules({**w.rules.clients, **clients}, w.rules.servers, w.rules.own_servers, w.rules.own))
    eventually(lambda: works(w))
    for n in range(500):  # as after a crash with a lease for each name of each instance
        elements = [
            TimedElement(
                LeaseElement(f"10.1.{n >> 8}.{n & 255}", f"93.{n >> 8}.{n & 255}.{k}", CHECKED).key,
                300_000,
                f"n{k}.site{n}.test",
            )
            for k in range(20)
        ]
        w.nftables.transact(*refresh_elements("inet", "t", "checked4", elements))
    before = w.pids()
    os.kill(before[1], signal.SIGKILL)
    eventually(lambda: len(w.pids()) == 3 and not set(w.pids()[1:]) & set(before))
    eventually(lambda: len(w.gates.leases("acme")) == 10_001)
    memory = [int(status_of(pid)["RssAnon"].split()[0]) for pid in w.pids()]
    assert max(memory) < 100_000, memory  # KiB
