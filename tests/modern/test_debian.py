"""Insula on the host that most users have: Debian 12, systemd as PID 1, cgroup v2 only, Debian's kernel.

One machine, from its first boot to the purge: the tests build on each other, in this order. Times are those of an
emulated processor, ten times slower than a real one.
"""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from insula.container.service.protocol import MONITOR_PID, ZYGOTE_PID
from tests.support.guest import CHECKOUT, PATIENCE, Guest
from tests.support.wait import until

CGROUP = "/sys/fs/cgroup/insula/shop"
UNMEASURED = {
    "kernel",
    "KVM",
    "CRIU",
    "exit information",
    "pressure stalls",
    "openvswitch",
    "disk quotas",
    "link speed",
    "virtual machines",  # QEMU is not in the guest
}
"""What `insula doctor` may find degraded on Debian's kernel, emulated, without a network."""


def instances(guest: Guest) -> dict[str, Any]:
    """The answer of `insula ps -a` for every instance of the tenant."""
    return {view["instance"]["name"]: view for view in guest.insula("-T", "shop", "ps", "-a")}


def pids(guest: Guest) -> dict[str, int | None]:
    """PID 1 of every instance, as the host numbers it; None for one that does not run."""
    found = {name: view["status"] for name, view in instances(guest).items()}
    return {name: status["pid"] if status["state"] == "running" else None for name, status in found.items()}


def alive(guest: Guest, *names: str) -> str:
    """PIDs and start times of these instances: equal means the very same processes."""
    found = pids(guest)
    return guest.ok("; ".join(f"cut -d ' ' -f 1,2,22 /proc/{found[name]}/stat" for name in names))


def answers(guest: Guest) -> None:
    until(lambda: guest.run("insula status").status == 0, "insulad answers", timeout=60 * PATIENCE, interval=0.2)


# -- installation -----------------------------------------------------------------------------------------------------


def test_the_machine_is_what_it_should_be(guest: Guest) -> None:
    assert guest.ok("systemctl is-system-running --wait") == "running"
    assert guest.ok("uname -r").startswith("6.1.")
    assert guest.ok("grep cgroup /proc/mounts | cut -d ' ' -f 2,3") == "/sys/fs/cgroup cgroup2"
    assert guest.run("ip -o link show up | grep -v ' lo: '").out == ""  # no network
    assert guest.ok("cat /proc/sys/kernel/softlockup_panic /proc/sys/kernel/watchdog_thresh") == "1\n30"


def test_up_installs_starts_and_shows(guest: Guest) -> None:
    out = guest.ok(f"{CHECKOUT}/scripts/up", timeout=150)
    claims = re.search(r"All (\d+) claims held", out)
    assert claims and int(claims[1]) > 20, out
    assert "0 wrong, 0 not proven" in out
    assert guest.ok("systemctl is-active insulad; systemctl is-enabled insulad") == "active\nenabled"


def test_up_installs_manual_pages_and_settings(guest: Guest) -> None:
    guest.ok("cd /usr/local/share/man && ls man1/insula.1 man1/insula-run.1 man5/insulad.toml.5 man8/insulad.8")
    guest.ok("insulad --check && grep range4 /etc/insula/insulad.toml")
    assert "POST /v1/tenants" in guest.ok("insula audit")  # of the demo


def test_up_again_changes_nothing(guest: Guest) -> None:
    before = guest.ok("systemctl show -p MainPID insulad")
    again = guest.run(f"{CHECKOUT}/scripts/up")
    assert again.status == 0 and "nothing to do" in again.out, again
    assert "claims held" not in again.out, "the demo is shown once"
    assert guest.ok("systemctl show -p MainPID insulad") == before


def test_doctor_finds_nothing_missing(guest: Guest) -> None:
    checks = {check["name"]: check for check in guest.insula("doctor")}
    bad = {name: check for name, check in checks.items() if check["state"] != "ok"}
    assert set(bad) <= UNMEASURED, bad
    assert checks["cgroups"]["detail"].startswith("version 2: ")
    assert checks["exit information"]["state"] == "degraded"  # Linux 6.15: a control that it does look


# -- instances on cgroup v2 -------------------------------------------------------------------------------------------


def test_instances_run(guest: Guest) -> None:
    guest.ok("insula tenant create shop && insula -T shop network create default --subnet 10.0.0.0/24")
    for options in (
        "--name always --init --restart always --memory 64m --pids 20 --cpus 0.25",
        "--name once --read-only --tmpfs /scratch",
        "--name retry --restart on-failure",
        "--name unless --restart unless-stopped",
    ):
        guest.ok(f"insula -T shop run -d {options} busybox sleep 10000")
    assert all(pids(guest).values())
    assert guest.ok("insula -T shop exec once sh -c 'echo x > /scratch/a && cat /scratch/a'") == "x"
    assert guest.run("insula -T shop exec once touch /a").status == 1
    assert guest.ok("insula -T shop exec always ping -c 1 once")
    assert guest.ok("echo typed | insula -T shop run -i --rm busybox cat") == "typed"
    assert guest.ok("insula -T shop exec always cat /proc/self/cgroup") == "0::/"


def test_explain_shows_version_2(guest: Guest) -> None:
    groups = json.dumps(guest.insula("-T", "shop", "explain", "always"))
    for wanted in ('"memory.max": "67108864"', '"cpu.max": "25000 100000"', '"pids.max": "20"'):
        assert wanted in groups


def test_a_memory_hog_dies_alone(guest: Guest) -> None:
    before = alive(guest, "always", "once")
    grow = "x=0123456789abcdef; while :; do x=$x$x; done"
    guest.ok(f"insula -T shop run -d --name hog --memory 32m busybox sh -c '{grow}'")
    assert guest.ok("insula -T shop wait hog") == "137"
    assert instances(guest)["hog"]["status"]["exit"]["oom"] is True
    assert alive(guest, "always", "once") == before
    assert "out of memory" in guest.ok("insula -T shop ps -a | grep hog")
    guest.ok("insula -T shop rm hog")


def test_a_kill_is_not_reported_as_out_of_memory(guest: Guest) -> None:
    guest.ok("insula -T shop run -d --name killed --memory 32m busybox sleep 1000 && insula -T shop kill killed")
    assert guest.ok("insula -T shop wait killed") == "137"
    assert instances(guest)["killed"]["status"]["exit"]["oom"] is False
    guest.ok("insula -T shop rm killed")


def test_processes_are_limited(guest: Guest) -> None:
    fork = "i=0; while [ $i -lt {} ]; do sleep 600 & i=$((i+1)); done; echo all"
    for count, fits in ((5, True), (40, False)):
        done = guest.run(f"insula -T shop exec always sh -c '{fork.format(count)}'")
        assert (done.status == 0 and "all" in done.out) is fits, done
        assert ("can't fork" in done.out) is not fits, done
        guest.ok("insula -T shop restart -t 1 always")  # no process can be added that would kill them


def test_processors_are_limited(guest: Guest) -> None:
    """The share of one processor that a busy loop gets, by the kernel's own account."""
    shares = {}
    for name, options in (("slow", "--cpus 0.25"), ("fast", "")):
        guest.ok(f"insula -T shop run -d --name {name} {options} busybox sh -c 'while :; do :; done'")
        used = f"awk '/usage_usec/ {{ print $2 }}' {CGROUP}/{instances(guest)[name]['instance']['id']}/cpu.stat"
        look = f"{used}; cut -d ' ' -f 1 /proc/uptime"
        first, begun, second, ended = map(float, guest.ok(f"{look}; sleep 2; {look}").split())
        shares[name] = (second - first) / 1e6 / (ended - begun)
        guest.ok(f"insula -T shop rm -f {name}")
    assert 0.1 < shares["slow"] < 0.4, shares
    assert shares["fast"] > 0.5, shares  # the positive control


def test_limits_survive_a_reload_of_systemd(guest: Guest) -> None:
    guest.ok("systemctl daemon-reload && systemctl set-property --runtime insulad CPUWeight=90")
    groups = json.dumps(guest.insula("-T", "shop", "explain", "always"))
    assert '"cpu.max": "25000 100000"' in groups and '"memory.max": "67108864"' in groups


def test_an_overlay_of_many_layers(guest: Guest) -> None:
    """As many as an image may have; fsconfig(2) has no room for their names, and mount(2) has a page."""
    script = """
import os, tempfile
from insula.kernel import syscalls, mounts
syscalls.unshare(syscalls.CLONE_NEWNS)
os.chdir(tempfile.mkdtemp(dir='/var/tmp'))
layers = [str(1000 + number) for number in range(127)]
for name in [*layers, 'upper', 'work']:
    os.makedirs(f'{name}/{name}')
for volatile in (False, True):
    root = mounts.overlay(layers, os.path.abspath('upper'), os.path.abspath('work'), volatile=volatile)
    print(len(os.listdir(f'/proc/self/fd/{root}')), open('/proc/self/mounts').read().count('overlay'))
"""
    assert guest.ok(f'/opt/insula/venv/bin/python -c "{script}"') == "128 0\n128 0"


# -- the daemon's life ------------------------------------------------------------------------------------------------


def test_up_restarts_insulad_for_changed_settings(guest: Guest) -> None:
    """An orderly restart, which instances outlive, too."""
    before, main = alive(guest, "always", "once", "retry"), guest.ok("systemctl show -p MainPID insulad")
    guest.ok("""sed -i '1i log_level = "debug"' /etc/insula/insulad.toml""")
    assert "restarting insulad" in guest.ok(f"{CHECKOUT}/scripts/up")
    assert guest.ok("systemctl show -p MainPID insulad") != main
    assert "nothing to do" in guest.ok(f"{CHECKOUT}/scripts/up")
    assert alive(guest, "always", "once", "retry") == before
    assert guest.ok("insula -T shop exec once echo there") == "there"
    assert guest.ok("insula -T shop exec always ping -c 1 once")
    guest.ok("sed -i '/^log_level/d' /etc/insula/insulad.toml")


@pytest.mark.parametrize(
    "command",
    [
        "systemctl kill --kill-whom=main --signal=KILL insulad && sleep 1.5",
        "systemctl kill --kill-whom=all --signal=KILL insulad && sleep 1.5",
    ],
)
def test_instances_outlive_the_daemon(guest: Guest, command: str) -> None:
    before = alive(guest, "always", "once", "retry")
    guest.ok(command)
    answers(guest)
    assert alive(guest, "always", "once", "retry") == before
    assert guest.ok("insula -T shop exec once echo there") == "there"
    assert guest.ok("insula -T shop exec always ping -c 1 once")


@pytest.mark.parametrize("helper", [ZYGOTE_PID, MONITOR_PID])
def test_an_exit_is_seen_after_a_helper_was_killed(guest: Guest, helper: str) -> None:
    """In this order: the zygote that a killed monitor leaves is init's child, and so are then those that it leaves."""
    script = "mkfifo /go; read x < /go; echo said; exit 7"
    guest.ok(f"insula -T shop run -d --name brief busybox sh -c '{script}'")
    guest.ok(f"kill -9 $(cut -d ' ' -f 1 /run/insula/{helper}) && sleep 1")
    guest.run("insula -T shop exec brief sh -c 'echo > /go'")  # PID 1 may take it along
    assert guest.ok("insula -T shop wait brief") == "7"
    assert guest.ok("insula -T shop logs brief") == "said"
    guest.ok("insula -T shop rm brief")


# -- the host's life --------------------------------------------------------------------------------------------------


def test_a_reboot_starts_instances_by_their_policies(guest: Guest) -> None:
    guest.ok("insula -T shop run -d --name stopped --restart unless-stopped busybox sleep 10000")
    guest.ok("insula -T shop stop -t 0 stopped")
    guest.reboot()
    # systemd waits 90 seconds for what does not end
    assert "Waiting for process" not in guest.console.read_text(errors="replace")
    answers(guest)
    until(lambda: pids(guest)["always"] and pids(guest)["unless"], "restarted instances run", timeout=30 * PATIENCE)
    running = {name for name, pid in pids(guest).items() if pid}
    assert running == {"always", "unless"}
    assert guest.ok("insula -T shop exec always ping -c 1 unless")
    assert '"memory.max": "67108864"' in json.dumps(guest.insula("-T", "shop", "explain", "always"))
    assert guest.run("systemctl --failed --no-legend --plain").out == ""


# -- the end ----------------------------------------------------------------------------------------------------------

LEFT = (
    "ls /run/netns 2>/dev/null; ip -o link | grep -v ' lo: '; nft list tables; find /sys/fs/cgroup -name 'insula*';"
    " grep -E '/run/(insula|netns)|/var/lib/insula|overlay' /proc/self/mounts;"
    " ps -eo args | grep -E 'sleep 10000|[i]nsulad|[k]eeper|[d]nsmasq' | grep -v grep"
)


def test_a_stopped_daemon_leaves_instances_and_down_leaves_nothing(guest: Guest) -> None:
    before, command = (
        alive(guest, "always", "unless"),
        [f"cut -d ' ' -f 1,2,22 /proc/{pid}/stat" for pid in pids(guest).values() if pid],
    )
    guest.ok("systemctl stop insulad && sleep 1")
    assert sorted(guest.ok("; ".join(command)).splitlines()) == sorted(before.splitlines())
    assert "sleep 10000" in guest.run(LEFT).out  # a control: it does see what runs
    guest.ok(f"{CHECKOUT}/scripts/down", timeout=90)
    assert guest.run(LEFT).out == ""
    assert guest.run("test -e /var/lib/insula/state.db").status == 0


def test_purge_removes_all(guest: Guest) -> None:
    guest.ok(f"{CHECKOUT}/scripts/purge", timeout=90)
    ours = "-path /root -prune -o -path /opt/insula-tests -prune"  # the tests' own
    left = guest.ok(f"find / -xdev {ours} -o -path /proc -prune -o -name '*insula*' -print")
    assert left == ""
    assert guest.run("systemctl cat insulad").status == 1
    assert guest.run("getent group insula").status == 2
