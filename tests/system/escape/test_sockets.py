"""Sockets and terminals: interfaces between programs that file permissions don't protect.

A network namespace (network_namespaces(7)) holds interfaces, packet sockets, abstract unix sockets and most of netlink;
what it doesn't hold (AF_VSOCK, keys, consoles) the seccomp filter must. See test_packets for what instances send.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from insula.kernel.netns import call_in
from tests.support.cli import Cli, Terminal
from tests.support.daemon import Daemon
from tests.support.wait import until
from tests.system.escape.attacks import sockets
from tests.system.escape.cell import IMAGE, PYTHON, Cell, unguarded
from tests.system.escape.conftest import CellFactory


@pytest.fixture
def host_netns(daemon: Daemon) -> Iterator[int]:
    fd = os.open(daemon.namespaces.host, os.O_RDONLY)
    yield fd
    os.close(fd)


def test_a_packet_socket_receives_own_packets_only(
    cells: CellFactory, cell: Cell, neighbour: Cell, host_netns: int
) -> None:
    """AF_PACKET takes `--socket-family packet`, and then CAP_NET_RAW (CVE-2020-14386 was in it): all frames of all
    interfaces, but those of the own namespace; the bridge sends no neighbour's here (hostile/test_forgeries has the
    forgeries)."""
    assert set(cell.gets(sockets.devices)) == {"lo", "eth0"}
    assert cell.try_(sockets.sniff, 0.1, "/tmp/sniffing").errno == "EPERM"
    without = cells(cell.cli, "--socket-family", "packet", "--cap-drop", "NET_RAW")
    assert without.try_(sockets.sniff, 0.1, "/tmp/sniffing").errno == "EPERM"
    cell = cells(cell.cli, "--socket-family", "packet")
    listener = cell.start(sockets.sniff, 2.0, "/tmp/sniffing")
    until(lambda: cell.cli.run("exec", cell.name, "test", "-e", "/tmp/sniffing").status == 0, "it listens")
    neighbour.gets(sockets.shout, "neighbour", ["127.0.0.1", "10.0.0.255", "10.0.0.9", "10.0.0.2"])
    assert call_in(host_netns, lambda: sockets.shout("host", ["127.0.0.1", "198.18.0.255", "198.18.0.1"]))
    assert cell.finish(listener).value == ["insula-escape-own"], "and that is the control"


def test_abstract_sockets(cell: Cell, neighbour: Cell, host_netns: int) -> None:
    """CVE-2020-15257: containerd-shim listened on an abstract socket of the host's network namespace, for whoever's uid
    is 0. An instance has a namespace of its own always, so the name means nothing there; a neighbour's neither."""

    def listener() -> socket.socket:
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        made.bind("\0insula-escape")
        made.listen()
        return made

    for where in (host_netns, os.open(f"/proc/{neighbour.pid}/ns/net", os.O_RDONLY)):
        with call_in(where, listener) as sock:
            threading.Thread(target=lambda sock=sock: sock.accept()[0].sendall(b"secret"), daemon=True).start()
            assert cell.try_(sockets.abstract, "insula-escape").errno == "ECONNREFUSED"
            assert call_in(where, lambda: sockets.abstract("insula-escape")) == "secret", "the control"


def test_no_socket_of_the_host_is_in_a_file(cell: Cell, daemon: Daemon) -> None:
    """A runtime's own socket in a container is the host (docker.sock): /run and the daemon's paths are not there."""
    for path in (daemon.run, daemon.root, Path("/run/netns"), Path("/run/dbus")):
        assert cell.cli.run("exec", cell.name, "test", "-e", path).status == 1
    assert cell.cli.ok("exec", cell.name, "find", "/", "-xdev", "-type", "s") == ""


def test_netlink(cell: Cell) -> None:
    """netlink(7): links, addresses and firewalls take CAP_NET_ADMIN, audit takes the first user namespace's, and
    processes are announced in the first network namespace only."""
    assert cell.try_(sockets.link_down, "eth0").errno == "EPERM"
    assert cell.try_(sockets.new_link, "dummy7").errno == "EPERM"
    found = cell.gets(sockets.netlink_families)
    assert "" not in found.values(), found
    assert unguarded(sockets.link_down, "lo").value == 1, "the control"
    assert unguarded(sockets.netlink_families).value["connection tracking"] == "", "the control"


def test_netlink_with_every_capability(cells: CellFactory, cell: Cell, neighbour: Cell) -> None:
    """With CAP_NET_ADMIN a tenant controls its own namespace, down to its last interface, and no other."""
    strong = cells(cell.cli, "--cap-add", "ALL")
    found = strong.gets(sockets.netlink_families)
    assert found["audit"] and found["audit rules"] and found["process events"], found
    assert strong.gets(sockets.link_down, "eth0"), "the control: its own link"
    assert neighbour.gets(sockets.devices) == cell.gets(sockets.devices) == ["lo", "eth0"]
    flags = Path(f"/proc/{neighbour.pid}/root/sys/class/net/eth0/flags").read_text()
    assert int(flags, 16) & 1, "the neighbour's is up"


def test_typing_into_the_users_terminal(cell: Cell) -> None:
    """TIOCSTI (CVE-2005-4890, and bubblewrap's CVE-2017-5226): a program types a command into the terminal that it
    shares with a shell, and ends; the shell then runs it. Here the container's terminal is another, in its own
    devpts."""
    program = f"{PYTHON} -I -S -B /attack/tests/system/escape/attacks/sockets.py"
    launcher = " ".join(cell.cli.command("run", "--rm", "-it", IMAGE))
    with _shell(cell.cli) as shell:
        shell.expect(r"\$ $")
        shell.type(f"{launcher} {program}\n")
        shell.expect(r"typed: (\w+)", timeout=30)
        shell.expect(r"\$ $")
        shell.type("echo the-end-$((1+1))\n")
        assert "injected-42" not in shell.expect(r"(?s).*the-end-2")[0]
    legacy = Path("/proc/sys/dev/tty/legacy_tiocsti")
    if not legacy.exists() or legacy.read_text().strip() == "1":
        with _shell(cell.cli) as shell:
            shell.type(f"{PYTHON} {Path(sockets.__file__)}\n")
            shell.expect(r"injected-42", timeout=20)  # the control


def _shell(cli: Cli) -> Terminal:
    return Terminal(["/bin/sh", "-i"], {**cli.environment(), "PS1": "$ "}, 24, 200)


def test_terminals_of_the_host(cell: Cell) -> None:
    """/dev/tty1, /dev/pts of the host, TIOCLINUX: there is no console, and a pts number here is one of its own
    devpts."""
    assert cell.try_(sockets.paste_into_console).errno in {"ENOTTY", "EINVAL", "EPERM"}
    assert cell.cli.run("exec", cell.name, "sh", "-c", "ls /dev/tty?* /dev/vcs* /dev/hvc* /dev/ttyS*").out == ""
    master, slave = os.openpty()
    try:
        number = os.path.basename(os.ttyname(slave))
        assert cell.cli.run("exec", cell.name, "test", "-e", f"/dev/pts/{number}").status == 1
    finally:
        os.close(master)
        os.close(slave)
