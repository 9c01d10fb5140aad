"""`run --vm --privileged`: all rights on the guest's kernel, and none more on the host."""

from __future__ import annotations

from tests.support.cli import Cli
from tests.support.wait import until

LONG = 300.0
TRIES = {
    "a mount": "mount -t tmpfs none /mnt",
    "a host name": "hostname other",
    "a kernel parameter": "echo 1 >/proc/sys/kernel/sysrq",
    "a control group": "mkdir /sys/fs/cgroup/one",
    "the devices": "cat /proc/interrupts | grep -q virtio",
    "an address": "ip addr add 127.0.0.2/8 dev lo",
}


def test_root_has_all_rights_and_without_it_those_of_a_container(cli: Cli) -> None:
    for name, options in (("all", ("--privileged",)), ("some", ())):
        words = ("--vm", *options, "--name", name, "--network", "none", "busybox", "sleep", "1000")
        cli.ok("run", "-d", *words, timeout=LONG)
    for what, command in TRIES.items():
        done = {name: cli.run("exec", name, "sh", "-c", command) for name in ("all", "some")}
        assert done["all"].status == 0, (what, done["all"])
        assert done["some"].status != 0, (what, "the control")
    assert cli.ok("exec", "-u", "1000", "all", "grep", "CapEff", "/proc/self/status").split()[1] == "0" * 16
    assert "capabilities           none" in cli.ok("explain", "all"), "those of QEMU's container"
    assert "--privileged is of virtual machines" in cli.fails("run", "--privileged", "busybox", status=2)


def test_all_signals_reach_the_first_program(cli: Cli) -> None:
    """As in a container: those, too, by which some programs are asked to end."""
    script = (
        "for n in 30 37 64; do trap \"echo got $n\" $n; done; trap 'exit 7' 35; echo ready; while :; do sleep 1; done"
    )
    words = ("--stop-signal", "SIGRTMIN+1", "--name", "vm", "--network", "none", "busybox", "sh", "-c", script)
    cli.ok("run", "-d", "--vm", *words, timeout=LONG)
    until(lambda: "ready" in cli.ok("logs", "vm"), "it is ready", LONG)
    for signal in ("PWR", "SIGRTMIN+3", "RTMAX"):
        cli.ok("kill", "-s", signal, "vm")
    until(lambda: len(cli.ok("logs", "vm").splitlines()) == 4, "it has got them", LONG)
    assert set(cli.ok("logs", "vm").splitlines()) == {"ready", "got 30", "got 37", "got 64"}
    cli.ok("stop", "-t", "100", "vm", timeout=LONG)
    assert cli.ok("wait", "vm") == "7"
