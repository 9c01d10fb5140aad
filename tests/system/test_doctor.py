"""`insula doctor`: working features are ok, removed ones are reported, and nothing is left behind."""

from __future__ import annotations

import grp
import os
import pwd
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from insula.control import doctor
from insula.control.tenants import FIRST_ID
from insula.kernel import features, netlink, nftables, syscalls
from insula.model.network_settings import NetworkSettings
from insula.model.views import Check
from insula.settings import Settings
from tests.forked import forked
from tests.support.descriptors import no_descriptor_left
from tests.support.wait import until

NEEDED = {"user_namespaces", "namespaces", "control_groups", "overlay", "idmapped_layers", "seccomp", "links"}


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def traces(directory: Path) -> tuple[list[str], str, list[str]]:
    with netlink.Rtnl() as rtnl:
        links = sorted(link.name for link in rtnl.links())
    return sorted(os.listdir(directory)), Path("/proc/self/mounts").read_text(), links


def test_features_that_the_tests_use_are_found(tmp_path: Path) -> None:
    found = features.probe(tmp_path)
    assert set(found) == set(features.NAMES) == set(doctor._FEATURES)
    assert {name for name in NEEDED if not found[name].works} == set()


def test_a_link_is_told_with_what_limits_a_fast_one() -> None:
    def found(link: str) -> Check:
        settings = Settings(network=NetworkSettings(link=link))
        return doctor._link(settings)

    assert (found("10gbit").state, found("10gbit").detail) == ("ok", "10gbit")
    assert "one lock" in found("25gbit").detail


def test_doctor_leaves_nothing(tmp_path: Path) -> None:
    before = traces(tmp_path)
    with no_descriptor_left():
        checks = doctor.examine(Settings(root=tmp_path))
    assert traces(tmp_path) == before
    for check in checks:
        assert check.detail
        assert "\n" not in check.detail
        assert (check.state == "ok") == (check.consequence is None) == (check.hint is None)


def test_a_probe_that_was_killed_is_cleaned_up_by_the_next(tmp_path: Path) -> None:
    def killed_in_time() -> bool:
        command = [sys.executable, "-m", "insula.kernel.features", str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
            while not list(tmp_path.iterdir()) and child.poll() is None:
                time.sleep(0.001)
            child.kill()
        return bool(list(tmp_path.iterdir()))

    until(killed_in_time, "one is killed before it has cleaned up")
    features.probe(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_overlayfs_refuses(tmp_path: Path) -> None:
    """An overlay cannot be the upper layer of another one."""

    def child() -> dict[str, Check]:
        syscalls.unshare(syscalls.CLONE_NEWNS)
        syscalls.mount(None, "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
        syscalls.mount("tmpfs", tmp_path, "tmpfs")
        for name in ("lower", "upper", "work", "root"):
            (tmp_path / name).mkdir()
        options = f"lowerdir={tmp_path}/lower,upperdir={tmp_path}/upper,workdir={tmp_path}/work"
        syscalls.mount("overlay", tmp_path / "root", "overlay", 0, options)
        return by_name(doctor.examine(Settings(root=tmp_path / "root")))

    checks = forked(child)
    assert checks["overlay"].state == checks["idmapped layers"].state == "missing"
    assert "ext4" in (checks["overlay"].hint or "")
    assert checks["namespaces"].state == "ok"


@pytest.mark.parametrize("how", ["unmounted", "hidden"])
def test_a_host_without_control_groups(tmp_path: Path, how: str) -> None:
    def child() -> Check:
        syscalls.unshare(syscalls.CLONE_NEWNS)
        syscalls.mount(None, "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
        if how == "unmounted":
            syscalls.umount2("/sys/fs/cgroup", syscalls.MNT_DETACH)
        else:
            syscalls.mount("tmpfs", "/sys/fs/cgroup", "tmpfs")
        return by_name(doctor.examine(Settings(root=tmp_path)))["cgroups"]

    check = forked(child)
    assert check.state == "missing"
    assert check.consequence


def test_a_read_only_disk_is_unknown(tmp_path: Path) -> None:
    def child() -> Check:
        syscalls.unshare(syscalls.CLONE_NEWNS)
        syscalls.mount(None, "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
        syscalls.mount("tmpfs", tmp_path, "tmpfs", syscalls.MS_RDONLY)
        return by_name(doctor.examine(Settings(root=tmp_path)))["overlay"]

    assert forked(child).state == "unknown"


def test_a_firewall_that_drops_forwarded_packets() -> None:
    def child() -> tuple[Check, Check, Check]:
        syscalls.unshare(syscalls.CLONE_NEWNET)
        before = doctor._foreign_firewall()
        with nftables.Nft() as nft:
            nft.run("add table ip filter")
            nft.run("add chain ip filter FORWARD { type filter hook forward priority 0; policy accept; }")
            accepting = doctor._foreign_firewall()
            nft.run("add chain ip filter FORWARD { policy drop; }")
            return before, accepting, doctor._foreign_firewall()

    before, accepting, dropping = forked(child)
    assert before.state == accepting.state == "ok"
    assert dropping.state == "degraded"
    assert "ip filter" in dropping.detail


def test_subordinate_ids_of_users(tmp_path: Path) -> None:
    file = tmp_path / "subuid"
    file.write_text("debian:100000:65536\nbroken\nx:y:z\n")
    assert doctor._subordinate_ids([str(file)]).state == "ok"
    file.write_text(f"debian:100000:65536\neve:{FIRST_ID - 10}:11\n")
    check = doctor._subordinate_ids([str(file)])
    assert check.state == "degraded"
    assert "eve" in check.detail
    assert doctor._subordinate_ids([str(tmp_path / "none")]).state == "ok"


def test_whoever_equals_root_is_listed() -> None:
    """Members of the group, and users whose primary group it is."""
    primary = grp.getgrgid(pwd.getpwnam("nobody").pw_gid).gr_name
    assert "nobody" in doctor._operators(primary).detail
    with_members = next((group for group in grp.getgrall() if group.gr_mem), None)
    if with_members is not None:
        assert set(with_members.gr_mem) <= set(re.split(r"[:,] ", doctor._operators(with_members.gr_name).detail))
    assert doctor._operators("no-such-group").detail.startswith("only root")
