"""Images on the command line: names, notes, odd configurations, and pulls by `run`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from insula.container.service.launch import _random_directory
from insula.kernel import mounts, syscalls
from tests.forked import forked
from tests.support import machine
from tests.support.cli import Cli
from tests.support.daemon import Daemon
from tests.support.images import ARCHITECTURE, Layout, digest, docker_archive, member, skopeo, tar
from tests.support.machine import Namespaces
from tests.support.slow_registry import busybox_layer
from tests.support.wait import patiently


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def image(*more: bytes, **process: object) -> bytes:
    """An archive of busybox alone as mine:1, with more layers and this `config` of its configuration."""
    layout = Layout()
    layout.image([busybox_layer(), *more], process=process, name="mine:1")
    return layout.tar()


def names(cli: Cli) -> dict[str, str]:
    return {each["name"]: each["digest"] for each in cli.json("image", "ls")}


# -- names -----------------------------------------------------------------------------------------


def test_tag(cli: Cli) -> None:
    before = names(cli)
    assert cli.ok("image", "tag", "busybox", "mine:1") == "mine:1"
    assert cli.ok("image", "tag", "mine:1", "r.example/other") == "r.example/other:latest"
    busybox = before["busybox:latest"]
    assert names(cli) == {**before, "mine:1": busybox, "r.example/other:latest": busybox}
    assert cli.ok("run", "--rm", "--network", "none", "mine:1", "echo", "x") == "x"
    assert "no image nothing:latest" in cli.fails("image", "tag", "nothing", "mine:2")
    assert "does not parse" in cli.fails("image", "tag", "busybox", "MINE")
    cli.ok("image", "rm", "mine:1", "r.example/other")
    assert names(cli) == before
    assert cli.ok("run", "--rm", "--network", "none", "busybox", "echo", "x") == "x"


def test_a_tag_replaces_an_earlier_one(cli: Cli, tmp_path: Path) -> None:
    cli.ok("image", "load", write(tmp_path / "a.tar", image()))
    assert names(cli)["mine:1"] != names(cli)["busybox:latest"]
    cli.ok("image", "tag", "busybox", "mine:1")
    assert names(cli)["mine:1"] == names(cli)["busybox:latest"]
    cli.ok("image", "rm", "mine:1")


def test_archives_without_a_name(cli: Cli, tmp_path: Path) -> None:
    layout = Layout()
    layout.image([busybox_layer()], name="a:1")
    layout.write(tmp_path / "layout")
    skopeo("copy", f"oci:{tmp_path}/layout:a:1", f"oci-archive:{tmp_path}/oci.tar")
    name = cli.ok("image", "load", tmp_path / "oci.tar")
    assert name == layout.index["manifests"][0]["digest"]
    assert cli.ok("run", "--rm", "--network", "none", name, "/bin/sh", "-c", "echo x") == "x"
    assert cli.ok("image", "load", "--name", "given", tmp_path / "oci.tar") == "given:latest"
    cli.ok("image", "rm", name, "given")


def test_docker_archives_without_a_name(cli: Cli, tmp_path: Path) -> None:
    layer = busybox_layer()
    rootfs = {"type": "layers", "diff_ids": [digest(layer)]}
    config = json.dumps({"architecture": ARCHITECTURE, "os": "linux", "rootfs": rootfs}).encode()
    without: list[dict[str, object]] = [{"RepoTags": None}, {"RepoTags": []}, {}]
    for tags in without:
        archive = docker_archive([{"Config": "c", "Layers": ["l"], **tags}], {"c": config, "l": layer})
        path = write(tmp_path / "docker.tar", archive)
        assert cli.ok("image", "load", path) == digest(config)  # what docker calls the image's ID
        assert cli.ok("image", "load", "--name", "given:2", path) == "given:2"
        cli.ok("image", "rm", digest(config), "given:2")


# -- what is passed over, and what is refused ------------------------------------------------------


def test_a_device_node_is_left_out_with_a_note(cli: Cli, tmp_path: Path) -> None:
    nodes = tar(member("dev/console", kind=tarfile.CHRTYPE, devmajor=5, devminor=1), member("f", b"1"))
    done = cli.run("image", "load", write(tmp_path / "a.tar", image(nodes)))
    assert (done.status, done.out) == (0, "mine:1\n")
    assert done.err == "note: mine:1: device node 'dev/console' left out: instances have their own devices\n"
    assert cli.ok("run", "--rm", "--network", "none", "mine:1", "/bin/sh", "-c", "echo x") == "x"
    done = cli.run("image", "load", write(tmp_path / "a.tar", image(tar(member("f", b"1")))))
    assert (done.status, done.err) == (0, "")  # the control
    cli.ok("image", "rm", "mine:1")


def test_an_empty_entrypoint_is_none(cli: Cli, tmp_path: Path) -> None:
    cli.ok("image", "load", write(tmp_path / "a.tar", image(Entrypoint=[""], Cmd=["/bin/busybox", "echo", "x"])))
    assert cli.ok("run", "--rm", "--network", "none", "mine:1") == "x"
    cli.ok("image", "rm", "mine:1")


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_a_real_time_signal_stops(cli: Cli, tmp_path: Path, how: str) -> None:
    script = "trap 'exit 7' 37; echo ready; while :; do /bin/busybox sleep 0.1; done"
    archive = image(Cmd=["/bin/sh", "-c", script], StopSignal="sigrtmin+3")
    cli.ok("image", "load", write(tmp_path / "a.tar", archive))
    cli.ok("run", "-d", "--network", "none", "--name", "it", "mine:1")
    log = cli.start("logs", "-f", "it")
    assert log.stdout is not None and log.stdout.readline() == "ready\n"
    cli.ok(*(("stop", "it") if how == "stop" else ("kill", "-s", "SIGRTMIN+3", "it")))
    assert cli.ok("wait", "it") == "7"
    log.communicate(timeout=patiently(30))
    cli.ok("rm", "it")
    cli.ok("image", "rm", "mine:1")


def test_a_stop_signal_that_does_not_exist_is_refused(cli: Cli, tmp_path: Path) -> None:
    before = names(cli)
    path = write(tmp_path / "a.tar", image(StopSignal="NOSUCH"))
    assert "the image's stop signal 'NOSUCH' is not a signal" in cli.fails("image", "load", path)
    assert names(cli) == before
    assert "no signal 'NOSUCH'" in cli.run("kill", "-s", "NOSUCH", "it").err


# -- many layers -----------------------------------------------------------------------------------


def test_more_layers_than_other_engines_take(cli: Cli, tmp_path: Path) -> None:
    layers = [tar(member(f"f{number}", b"%d\n" % number)) for number in range(130)]
    cli.ok("image", "load", write(tmp_path / "a.tar", image(*layers)), timeout=300)
    line = "cd /; set -- f*; echo $#; /bin/busybox cat f0 f129"
    assert cli.ok("run", "--rm", "--network", "none", "mine:1", "/bin/sh", "-c", line) == "130\n0\n129"
    cli.ok("image", "rm", "mine:1")


def test_an_overlay_has_room_for_500_layers(tmp_path: Path) -> None:
    """Under the names that the zygote gives them."""

    def inside() -> tuple[int, int]:
        os.chdir(tmp_path)
        names = [_random_directory() for _ in range(500)]
        assert len(set(names)) == 500
        for number, name in enumerate(names):
            Path(name, f"f{number}").touch()
        place = "instances/" + "0" * 64
        for name in ("upper", "work"):
            os.makedirs(f"{place}/{name}")
        fd = mounts.overlay(names, f"{tmp_path}/{place}/upper", f"{tmp_path}/{place}/work")
        found = len(os.listdir(f"/proc/self/fd/{fd}"))
        try:
            os.mkdir("one-more")
            os.close(mounts.overlay([*names, "one-more"], f"{tmp_path}/{place}/upper", f"{tmp_path}/{place}/work"))
        except OSError as error:
            return found, error.errno or -1
        return found, 0

    def unshared() -> tuple[int, int]:
        syscalls.unshare(syscalls.CLONE_NEWNS)
        return inside()

    found, error = forked(unshared)
    assert found == 500
    assert error != 0  # the control: here is the end


# -- fetching --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trusting(run_: machine.Run, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Daemon, str]]:
    """A daemon and a registry on its loopback device, whose certificate it trusts."""
    daemon = Daemon(run_)
    both = tmp_path_factory.mktemp("registry") / "both.pem"
    certificate = daemon.path / "certificate.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", *subject]
    subprocess.run([*make, "-keyout", both, "-out", certificate], check=True, capture_output=True)
    both.write_bytes(both.read_bytes() + certificate.read_bytes())
    daemon.environment["SSL_CERT_FILE"] = str(certificate)
    serve = [sys.executable, "-m", "tests.support.slow_registry", str(both)]
    wrapped = [*Namespaces.wrap(daemon.namespaces.host), *serve]
    registry = subprocess.Popen(wrapped, stdout=subprocess.PIPE, text=True)
    try:
        assert registry.stdout is not None
        reference = f"127.0.0.1:{registry.stdout.readline().strip()}/app:1"
        daemon.start()
        yield daemon, reference
    finally:
        registry.kill()
        registry.communicate()
        daemon.remove()


def test_run_pulls_if_told_to(trusting: tuple[Daemon, str]) -> None:
    cli, reference = trusting[0].cli, trusting[1]
    command = [reference, "/bin/sh", "-c", "echo x"]
    run = ["run", "--rm", "--network", "none"]
    for option in ([], ["--pull", "never"]):
        assert f"no image {reference}" in cli.fails(*run, *option, *command, status=125)
    fetched = cli.run(*run, "--pull", "missing", *command)
    assert (fetched.status, fetched.out) == (0, "x\n") and "Copying blob" in fetched.err
    assert (again := cli.run(*run, "--pull", "missing", *command)).out == "x\n" and again.err == ""
    assert (always := cli.run(*run, "--pull", "always", *command)).out == "x\n" and "Copying" in always.err
    quiet = cli.run(*run, "--pull", "always", "--quiet", *command)
    assert (quiet.status, quiet.out, quiet.err) == (0, "x\n", "")
    assert cli.ok(*run, *command) == "x"
    cli.ok("image", "rm", reference)


def test_a_failed_pull_makes_no_instance(trusting: tuple[Daemon, str]) -> None:
    cli, reference = trusting[0].cli, trusting[1]
    wrong = reference.replace("127.0.0.1", "localhost")  # the certificate is not for this name
    what = cli.fails("run", "--rm", "--pull", "always", wrong, "/bin/true", status=125)
    assert "can't be trusted" in what and "certificate" in what and "\\" not in what
    assert "'sometimes'" in cli.fails("run", "--pull", "sometimes", reference, status=2)
    assert cli.json("ps", "-a") == []


def test_a_quiet_pull_prints_the_name_only(trusting: tuple[Daemon, str]) -> None:
    cli, reference = trusting[0].cli, trusting[1]
    loud, quiet = cli.run("image", "pull", reference), cli.run("image", "pull", "--quiet", reference)
    assert loud.out == quiet.out == f"{reference}\n"
    assert "Copying blob" in loud.err and quiet.err == ""
    cli.ok("image", "rm", reference)
