"""Virtual machines as users have them: `insula run --vm` and the verbs that containers have. One daemon serves all."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import tarfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from insula.control.instances.drivers.machine import files
from tests.support.cli import Cli, Terminal
from tests.support.daemon import Daemon
from tests.support.wait import patiently, until

LONG = 300.0


def test_a_command_in_a_machine(cli: Cli) -> None:
    """Its output, its input, its exit status, and a kernel that is not the host's; the next one is a copy of the
    same boot and shares nothing that is secret."""
    script = "cat; uname -r; cat /proc/sys/kernel/random/boot_id /sys/kernel/boot_params/version; echo err >&2; exit 7"
    found = [
        cli.run("run", "--vm", "--rm", "-i", *cold, "busybox", "sh", "-c", script, stdin="given\n", timeout=LONG)
        for cold in ((), (), ("--cold",))
    ]
    assert [each.status for each in found] == [7, 7, 7], found
    lines = [each.out.splitlines() for each in found]
    assert {each[0] for each in lines} == {"given"} and {each.err for each in found} == {"err\n"}
    assert all(each[1] != os.uname().release for each in lines)
    assert len({each[2] for each in lines}) == 3
    assert cli.run("run", "--vm", "--rm", "--cold", "--network", "none", "busybox", "true", timeout=LONG).err == ""
    assert {each[3] for each in lines} == {"0x020c"}, "entered by PVH: a BIOS leaves the kernel's own, 0x020f or later"
    assert cli.json("ps", "-a") == []


def test_the_life_of_a_machine(cli: Cli, daemon: Daemon) -> None:
    """On the network of a container, by its name and by its address; with exec, logs, a restart that keeps its disk,
    and insulad that is killed meanwhile."""
    serve = "echo up >> /log; cat /log; while :; do echo from the machine | nc -l -p 80; done"
    cli.ok("run", "-d", "--vm", "--name", "vm", "-m", "160m", "busybox", "sh", "-c", serve, timeout=LONG)
    cli.ok("run", "-d", "--name", "beside", "busybox", "sleep", "1000")

    def answers() -> bool:
        return cli.run("exec", "beside", "nc", "-w", "2", "vm", "80").out == "from the machine\n"

    until(answers, "a container is answered by the machine", LONG)
    assert cli.ok("logs", "vm") == "up"
    [port] = [each["instance"]["ports"][0] for each in cli.json("ps") if each["instance"]["name"] == "vm"]
    shown = cli.ok("exec", "vm", "ip", "addr", "show", "eth0")
    assert port["address"] in shown and port["mac"] in shown
    assert cli.ok("exec", "vm", "cat", "/etc/hostname") == "vm"
    assert cli.run("exec", "vm", "sh", "-c", "nslookup beside >/dev/null && exit 5").status == 5
    assert cli.run("exec", "vm", "ping", "-c", "1", "beside").status == 0
    assert cli.json("verify")["passed"], "its port is proven as others are"
    explained = cli.ok("explain", "vm")
    assert "capabilities           none" in explained
    assert "of at most 4G\n" in explained and "overlayfs in the guest" in explained, "its disk is as large as that"
    inside = [process["inside"] for process in cli.json("explain", "vm")["processes"]]
    assert inside == [1, 2], "the shim and QEMU, and nothing beside them"

    daemon.kill("insulad")
    daemon.start()
    assert answers(), "it went on, and is reached"
    assert cli.ok("exec", "vm", "echo", "adopted") == "adopted"

    cli.ok("stop", "-t", "0", "vm")
    cli.ok("start", "vm", timeout=LONG)
    until(lambda: cli.ok("logs", "vm").splitlines()[-2:] == ["up", "up"], "its disk was kept", LONG)
    cli.ok("rm", "-f", "vm")
    until(lambda: not list((daemon.root / "instances").glob("*/disk")), "no disk is left", LONG)


def test_nothing_is_left_of_one_whose_shim_is_killed(cli: Cli, daemon: Daemon) -> None:
    """QEMU ends with it, and the restart policy has another one started."""
    run = ("run", "-d", "--vm", "--restart", "on-failure", "--name", "vm", "--network", "none")
    cli.ok(*run, "busybox", "sleep", "1000", timeout=LONG)

    def status() -> dict[str, Any]:
        [found] = cli.json("ps", "-a")
        return dict(found["status"])

    shim = status()["pid"]
    [qemu] = Path(f"/proc/{shim}/task/{shim}/children").read_text().split()
    assert Path(f"/proc/{qemu}/comm").read_text().startswith("qemu")
    os.kill(shim, signal.SIGKILL)
    until(lambda: status()["state"] == "running" and status()["pid"] != shim, "another one runs", LONG)
    assert not Path(f"/proc/{qemu}").exists()
    assert cli.ok("exec", "vm", "echo", "well") == "well"
    assert [each["inside"] for each in cli.json("explain", "vm")["processes"]] == [1, 2]
    cli.ok("rm", "-f", "vm")
    until(lambda: not list((daemon.root / "instances").glob("*/disk")), "no disk is left", LONG)


def test_an_image_with_a_program_and_nothing_else(cli: Cli, tmp_path: Path) -> None:
    """The agent needs nothing of it: no shell, no libraries, no directories to mount anything on."""
    busybox = tmp_path / "busybox"
    busybox.write_bytes(cli.raw("run", "--rm", "busybox", "cat", "/bin/busybox").stdout)
    with tarfile.open(tmp_path / "image.tar", "w") as archive:
        busybox.chmod(0o755)
        archive.add(busybox, "busybox")
    cli.ok("image", "import", tmp_path / "image.tar", "scratch:1")
    words = ("scratch:1", "/busybox", "sh", "-c", "echo it runs; exit 3")
    for kind in ((), ("--vm",)):
        done = cli.run("run", "--rm", *kind, *words, timeout=LONG)
        assert (done.status, done.out, done.err) == (3, "it runs\n", ""), kind
    cli.ok("run", "-d", "--vm", "--name", "vm", "scratch:1", "/busybox", "sleep", "1000", timeout=LONG)
    assert cli.ok("exec", "vm", "/busybox", "ls", "/busybox") == "/busybox"
    cli.ok("rm", "-f", "vm")


def test_signals_and_the_terminal(cli: Cli) -> None:
    trap = "trap 'echo ended; exit 4' TERM; echo ready; while :; do sleep 0.1; done"
    cli.ok("run", "-d", "--vm", "--name", "vm", "--network", "none", "busybox", "sh", "-c", trap, timeout=LONG)
    until(lambda: cli.ok("logs", "vm") == "ready", "it runs", LONG)
    cli.ok("kill", "-s", "TERM", "vm")
    assert cli.ok("wait", "vm") == "4"
    assert cli.ok("logs", "vm").splitlines() == ["ready", "ended"]
    cli.ok("rm", "vm")
    with cli.terminal("run", "--vm", "--rm", "-it", "--network", "none", "busybox", "sh", rows=30, columns=90) as shell:
        shell.expect("#", LONG)
        shell.type("stty size; echo $((40 + 2))\n")
        shell.expect("30 90", LONG)
        shell.expect("42", LONG)
        follows_the_window(shell)
        shell.type("exit 3\n")
        assert shell.wait(LONG) == 3
    cli.ok("run", "-d", "-it", "--vm", "--name", "vm", "--network", "none", "busybox", "sh", timeout=LONG)
    for how in (("exec", "-it", "vm", "sh"), ("attach", "vm")):
        with cli.terminal(*how, rows=31, columns=91) as shell:
            shell.type("stty size\n")
            shell.expect("31 91", LONG)
            follows_the_window(shell)
            if how[0] == "exec":
                shell.type("exit 4\n")
                assert shell.wait(LONG) == 4
    cli.ok("rm", "-f", "vm")


def follows_the_window(shell: Terminal) -> None:
    """The terminal in the guest gets the size of the window while a program runs in it."""
    shell.type("echo it waits; until stty size | grep '44 1[0]1'; do sleep 0.1; done\n")
    shell.expect("\nit waits", LONG)
    shell.resize(44, 101)
    shell.expect("44 101", LONG)


def test_it_runs_when_its_agent_has_answered(cli: Cli) -> None:
    """A machine that was paused is told the time and a random number again. While it doesn't answer it is starting,
    and nobody ends it."""
    cli.ok("run", "-d", "--vm", "--name", "vm", "--network", "none", "busybox", "sleep", "1000", timeout=LONG)

    def status() -> dict[str, Any]:
        [found] = cli.json("ps", "-a")
        return dict(found["status"])

    def skew() -> float:
        before = time.time()
        lines = [line.split() for line in cli.ok("exec", "vm", "adjtimex").splitlines() if "tv_" in line]
        told = int(lines[0][1]) + int(lines[1][1]) / 1e6
        return max(before - told, told - time.time())

    assert status()["state"] == "running" and skew() <= 0.1
    cli.ok("pause", "vm")
    time.sleep(2)  # the clock of a machine may stand still meanwhile
    cli.ok("unpause", "vm")
    assert status()["state"] == "running" and skew() <= 0.1

    shim = status()["pid"]
    qemu = int(Path(f"/proc/{shim}/task/{shim}/children").read_text().split()[0])
    cli.ok("pause", "vm")
    os.kill(qemu, signal.SIGSTOP)
    with cli.start("unpause", "vm") as unpausing:
        until(lambda: status()["state"] == "starting", "it is thawed", LONG)
        assert status()["pid"] == shim
        os.kill(qemu, signal.SIGCONT)
        assert unpausing.wait(LONG) == 0
    until(lambda: status()["state"] == "running", "it answers", LONG)
    assert status()["pid"] == shim and skew() <= 0.1
    cli.ok("rm", "-f", "vm")


def test_files_go_in_and_out(cli: Cli, tmp_path: Path) -> None:
    """As with a container: by tar streams, which are longer than a window of the channel to the guest."""
    cli.ok("run", "-d", "--vm", "--name", "vm", "--network", "none", "busybox", "sleep", "1000", timeout=LONG)
    (tmp_path / "data/sub").mkdir(parents=True)
    large = os.urandom(3 << 20)
    (tmp_path / "data/large").write_bytes(large)
    (tmp_path / "data/sub/small").write_text("in\n")
    (tmp_path / "data/sub/small").chmod(0o640)
    (tmp_path / "data/link").symlink_to("sub/small")
    cli.ok("cp", f"{tmp_path}/data", "vm:/data", timeout=LONG)
    assert cli.ok("exec", "vm", "stat", "-c", "%a %u %N", "/data/sub/small", "/data/link").splitlines() == [
        "640 0 /data/sub/small",
        "777 0 '/data/link' -> 'sub/small'",
    ]
    assert cli.ok("exec", "vm", "sha256sum", "/data/large").split()[0] == hashlib.sha256(large).hexdigest()
    cli.ok("exec", "vm", "sh", "-c", "echo more >> /data/link")
    cli.ok("cp", "vm:/data", f"{tmp_path}/back", timeout=LONG)
    assert (tmp_path / "back/large").read_bytes() == large
    assert (tmp_path / "back/sub/small").read_text() == "in\nmore\n" and (tmp_path / "back/link").is_symlink()

    cli.ok("export", "-o", tmp_path / "all.tar", "vm", timeout=LONG)
    with tarfile.open(tmp_path / "all.tar") as tar:
        names = {each.name.removeprefix("./") for each in tar}
    assert {"bin/busybox", "data/sub/small", "etc/machine-id"} <= names
    assert not [name for name in names if name.startswith(("proc/", "sys/", "upper", "init"))]

    assert "there is no '/nothing'" in cli.fails("cp", "vm:/nothing", f"{tmp_path}/back")
    assert "no directory" in cli.fails("cp", f"{tmp_path}/data", "vm:/data/large")
    cli.ok("pause", "vm")
    assert "is paused" in cli.fails("cp", "vm:/data", f"{tmp_path}/back")
    cli.ok("unpause", "vm")
    cli.ok("rm", "-f", "vm")


def test_who_copies_of_a_guest_that_does_not_answer_waits_for_a_time(cli: Cli, tmp_path: Path) -> None:
    """Each copy has one line in the end, and other requests are served meanwhile. The guest goes on after that."""
    cli.ok("run", "-d", "--vm", "--name", "vm", "--network", "none", "busybox", "sleep", "1000", timeout=LONG)
    cli.ok("run", "-d", "--name", "beside", "busybox", "sleep", "1000")
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_text("in\n")
    large.write_bytes(os.urandom(4 << 20))
    copies: list[tuple[str | Path, ...]] = [
        ("cp", "vm:/etc", tmp_path / "out"),
        ("cp", small, "vm:/"),
        ("cp", large, "vm:/"),
        ("export", "-o", tmp_path / "all.tar", "vm"),
    ]
    [machine] = [each["pid"] for each in cli.json("top", "vm") if "qemu" in each["command"]]
    with ExitStack() as stack:
        os.kill(machine, signal.SIGSTOP)
        stack.callback(os.kill, machine, signal.SIGCONT)
        waiting = [stack.enter_context(cli.start(*words)) for words in copies]
        for each in waiting:
            stack.callback(each.kill)
        assert (
            cli.ok("cp", "beside:/etc", tmp_path / "etc") == "" and cli.ok("run", "--rm", "busybox", "echo", "x") == "x"
        )
        assert len(cli.json("ps")) == 2 and cli.json("inspect", "vm")
        assert all(each.poll() is None for each in waiting), "the control: whoever needs the guest waits"
        for each in waiting:
            said = each.communicate(timeout=patiently(2 * files.SILENT))[1]
            assert each.returncode == 1 and "error: the machine does not answer" in said and said.count("\n") == 1, said
    cli.ok("cp", small, "vm:/", timeout=LONG)
    assert cli.ok("exec", "vm", "cat", "/small") == "in", "the control: it goes on"
    cli.ok("rm", "-f", "vm", "beside")


def test_it_has_as_many_processors_as_its_limit_lets_it_use(cli: Cli) -> None:
    most = os.cpu_count() or 1
    for options, cpus in ((["--cpus", "1.5"], 2), (["--cpus", "1.5", "--cold"], 2), (["--cpus", "0.5"], 1)):
        command = ("run", "--vm", "--rm", "--network", "none", *options, "busybox", "nproc")
        assert cli.ok(*command, timeout=LONG) == str(min(cpus, most)), options


def test_several_networks(cli: Cli) -> None:
    """It is reached on each of them, by the address that it has there, and answers by the same way; and it goes out by
    the first. Another one is plugged in while it does not run. Templates have one network; a copy gets the others."""
    for number in range(3):
        cli.ok("network", "create", f"net{number}", "--subnet", f"10.8.{number}.0/24")
        cli.ok("run", "-d", "--name", f"on{number}", "--network", f"net{number}", "busybox", "sleep", "1000")
    serve = "while :; do echo from the machine | nc -l -p 80; done"
    networks = ("--network", "net0", "--network", "net1")
    cli.ok("run", "-d", "--vm", "--name", "vm", *networks, "busybox", "sh", "-c", serve, timeout=LONG)

    def reached(number: int) -> bool:
        return cli.run("exec", f"on{number}", "nc", "-w", "2", "vm", "80").out == "from the machine\n"

    for number in range(2):
        until(lambda number=number: reached(number), f"it is reached on net{number}", LONG)  # type: ignore[misc]
        assert cli.run("exec", "vm", "ping", "-c", "1", f"on{number}").status == 0
    routes = cli.ok("exec", "vm", "ip", "route").splitlines()
    assert [line.split()[2:5] for line in routes if line.startswith("default")] == [["10.8.0.1", "dev", "eth0"]]
    assert "eth1" in cli.ok("exec", "vm", "ip", "addr") and "eth2" not in cli.ok("exec", "vm", "ip", "addr")
    assert cli.json("verify")["passed"]

    cli.ok("stop", "-t", "0", "vm")
    cli.ok("port", "plug", "vm", "net2")
    cli.ok("port", "unplug", "vm", "net0")
    cli.ok("start", "vm", timeout=LONG)
    until(lambda: reached(2), "it is reached on the third", LONG)
    assert cli.json("verify")["passed"]
    cli.ok("rm", "-f", "vm")


def test_what_a_machine_can_not_have(cli: Cli) -> None:
    assert "64" in cli.fails("run", "--vm", "-m", "64m", "busybox", status=125)
    networks = []
    for number in range(9):
        cli.ok("network", "create", f"more{number}", "--subnet", f"10.9.{number}.0/24")
        networks += ["--network", f"more{number}"]
    assert "8 networks" in cli.fails("run", "--vm", *networks, "busybox", status=125)
    assert cli.json("ps", "-a") == []


def template_of(cli: Cli) -> tuple[int, int]:
    """The file that the memory of the machine `vm` is a copy of."""
    [shim] = [each["status"]["pid"] for each in cli.json("ps") if each["instance"]["name"] == "vm"]
    [qemu, *_] = Path(f"/proc/{shim}/task/{shim}/children").read_text().split()
    opened = [
        each for each in Path(f"/proc/{qemu}/fd").iterdir() if re.search("memfd:(memory|template)", os.readlink(each))
    ]
    return opened[0].stat().st_dev, opened[0].stat().st_ino


def test_a_tenant_has_templates_of_its_own(cli: Cli) -> None:
    """If the operator says so; others share theirs."""
    found = []
    for tenant, labels in (("one", ()), ("other", ()), ("own", ("--label", "templates=private"))):
        cli.ok("tenant", "create", tenant, *labels)
        of = cli.of(tenant)
        of.ok(
            "run",
            "-d",
            "--vm",
            "-m",
            "128m",
            "--name",
            "vm",
            "--network",
            "none",
            "busybox",
            "sleep",
            "1000",
            timeout=LONG,
        )
        found.append(template_of(of))
    one, other, own = found
    assert one == other != own
    again = cli.of("own")
    again.ok("stop", "-t", "0", "vm")
    again.ok("start", "vm", timeout=LONG)
    assert template_of(again) == own, "it is made once"
    for tenant in ("one", "other", "own"):
        cli.ok("tenant", "rm", "-f", tenant)


def test_a_template_is_made_in_advance(cli: Cli, daemon: Daemon) -> None:
    """In the background, and doctor tells. It and explain say how processors are made, and what keeps a guest in."""

    def detail() -> str:
        return next(str(each["detail"]) for each in cli.json("doctor") if each["name"] == "virtual machines")

    daemon.stop()
    daemon.configure('[machines]\ntemplate = "128m"\n')
    daemon.start()
    try:
        until(lambda: "templates of 128" in detail(), "it is made", LONG)
        how = detail().split(";")[0]
        assert how.startswith("KVM makes") or "the container around QEMU" in how, how
        cli.ok("run", "-d", "--vm", "-m", "128m", "--name", "vm", "busybox", "sleep", "1000", timeout=LONG)
        assert cli.json("explain", "vm")["security"]["processors"] == how
        cli.ok("rm", "-f", "vm")
    finally:
        daemon.stop()
        daemon.configure()
        daemon.start()
