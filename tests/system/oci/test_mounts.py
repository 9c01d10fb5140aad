"""The mount tree of a container: options, propagation, mapped owners, devices, protected paths, its root."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.wait import until
from tests.system.oci.conftest import NAME, Box

BASE = 0x50000000


@pytest.fixture
def volume(box: Box) -> Iterator[Path]:
    """A directory of the host with a file system of its own, and another mounted below it."""
    path = box.path / "volume"
    (path / "below").mkdir(parents=True)
    mount("-t", "tmpfs", "volume", path)
    (path / "below").mkdir()
    (path / "file").write_text("of the host\n")
    mount("-t", "tmpfs", "below", path / "below")
    yield path
    subprocess.run(["umount", "--recursive", path], check=True)


def mount(*arguments: object) -> None:
    subprocess.run(["mount", *map(str, arguments)], check=True)


def options_of(box: Box, path: str) -> set[str]:
    """The attributes of the mount at `path`, as the container sees them."""
    lines = [line.split() for line in box.out("cat /proc/self/mountinfo").splitlines()]
    return set([fields[5] for fields in lines if fields[4] == path][-1].split(","))


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "there", "absent"),
    [
        (["ro"], {"ro"}, {"rw"}),
        (["nosuid", "nodev", "noexec"], {"nosuid", "nodev", "noexec", "rw"}, set()),
        (["noexec", "exec"], set(), {"noexec"}),
        (["noatime"], {"noatime"}, {"relatime"}),
        (["noatime", "relatime"], {"relatime"}, {"noatime"}),
        (["strictatime"], set(), {"relatime", "noatime"}),
        (["nodiratime"], {"nodiratime"}, set()),
        (["nosymfollow"], {"nosymfollow"}, set()),
        (["rro", "rnosuid"], {"ro", "nosuid"}, set()),
    ],
)
@pytest.mark.parametrize("kind", ["bind", "tmpfs"])
def test_attributes(box: Box, volume: Path, kind: str, options: list[str], there: set[str], absent: set[str]) -> None:
    if kind == "bind":
        box.bind(volume, "/mnt", *options)
    else:
        box.mounts.append({"destination": "/mnt", "type": "tmpfs", "source": "tmpfs", "options": options})
    found = options_of(box, "/mnt")
    assert there <= found and not absent & found


def test_flags_of_the_source_stay_unless_cleared(box: Box, volume: Path) -> None:
    mount("-o", "remount,bind,nosuid,nodev", volume)
    box.bind(volume, "/kept", "ro")
    box.bind(volume, "/cleared", "suid")
    assert {"ro", "nosuid", "nodev"} <= options_of(box, "/kept")
    found = options_of(box, "/cleared")
    assert "nosuid" not in found and "nodev" in found


def test_bind_and_rbind(box: Box, volume: Path) -> None:
    (volume / "below/deep").write_text("x")
    box.bind(volume, "/bind")
    box.mounts.append({"destination": "/rbind", "source": str(volume), "type": "none", "options": ["rbind"]})
    assert box.out("ls /bind/below /rbind/below").split() == ["/bind/below:", "/rbind/below:", "deep"]


def test_ro_is_one_mounts_rro_is_for_all_below(box: Box, volume: Path) -> None:
    box.mounts.append({"destination": "/ro", "source": str(volume), "type": "bind", "options": ["rbind", "ro"]})
    box.mounts.append({"destination": "/rro", "source": str(volume), "type": "bind", "options": ["rbind", "rro"]})
    script = "for f in /ro/x /ro/below/x /rro/x /rro/below/x; do (echo > $f) 2>/dev/null && echo $f; done; true"
    assert box.out(script).split() == ["/ro/below/x"]


def test_a_file_is_bound_on_a_file(box: Box, volume: Path) -> None:
    box.bind(volume / "file", "/etc/deep/file", "ro")
    assert box.out("cat /etc/deep/file") == "of the host\n"


def test_relative_sources_are_the_bundles(box: Box) -> None:
    (box.path / "data").write_text("here\n")
    box.bind(Path("data"), "/data")
    assert box.out("cat /data") == "here\n"


def test_options_of_the_file_system(box: Box) -> None:
    options = ["size=64k", "mode=711", "uid=5", "ro"]
    box.mounts.append({"destination": "/mnt", "type": "tmpfs", "source": "tmpfs", "options": options})
    assert box.out("stat -c '%a %u' /mnt; df -k /mnt | tail -n1 | tr -s ' ' | cut -d' ' -f2").split() == [
        "711",
        "5",
        "64",
    ]


def test_remount(box: Box, volume: Path) -> None:
    box.bind(volume, "/mnt")
    box.mounts.append({"destination": "/mnt", "type": "none", "source": "none", "options": ["remount", "ro"]})
    assert "ro" in options_of(box, "/mnt")


def test_an_overlay_of_many_layers(box: Box) -> None:
    """Its options are longer than fsconfig(2) takes a value."""
    layers = []
    for number in range(12):
        layer = box.path / f"a-directory-with-a-long-name-{number}"
        layer.mkdir()
        (layer / str(number)).touch()
        layers.append(str(layer))
    for name in ("upper", "work"):
        (box.path / name).mkdir()
    options = [f"lowerdir={':'.join(layers)}", f"upperdir={box.path}/upper", f"workdir={box.path}/work"]
    box.mounts.append({"destination": "/mnt", "type": "overlay", "source": "overlay", "options": options})
    assert len(box.out("touch /mnt/new; ls /mnt").split()) == 13
    assert (box.path / "upper/new").exists()


def test_tmpcopyup(box: Box) -> None:
    etc = box.rootfs / "etc"
    (etc / "sub").mkdir(parents=True)
    (etc / "sub/file").write_text("kept\n")
    (etc / "sub/file").chmod(0o604)
    os.chown(etc / "sub/file", 7, 8)
    (etc / "link").symlink_to("/outside")
    etc.chmod(0o751)
    options = ["tmpcopyup", "mode=777"]
    box.mounts.append({"destination": "/etc", "type": "tmpfs", "source": "tmpfs", "options": options})
    script = "cat /etc/sub/file; stat -c '%a %u %g' /etc/sub/file; readlink /etc/link; stat -c %a /etc; touch /etc/new"
    assert box.out(script) == "kept\n604 7 8\n/outside\n751\n"
    assert not (etc / "new").exists()


# -- targets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("link", ["/", "../../../../../..", "/proc/self/root"])
def test_a_link_in_the_root_leads_nowhere_outside(box: Box, volume: Path, link: str) -> None:
    """CVE-2021-30465: the mount is inside, wherever the image's link points to."""
    (box.rootfs / "evil").symlink_to(link)
    outside = Path(f"/a-test-was-here-{os.getpid()}")
    box.bind(volume, f"/evil{outside}")
    result = box.run(f"cat {outside}/file")
    assert not outside.exists()
    assert result.out == "of the host\n" or "symbolic link" in result.err


@pytest.mark.parametrize("place", ["proc", "sys"])
def test_proc_and_sys_follow_no_link(box: Box, place: str) -> None:
    """CVE-2019-19921: else what is masked would be elsewhere."""
    (box.rootfs / "elsewhere").mkdir()
    (box.rootfs / place).symlink_to("elsewhere")
    line = box.refused()
    assert f"mount /{place}" in line and "must be mounted on ordinary directory" in line


# -- propagation -------------------------------------------------------------------------------------------------------


def test_later_mounts_of_the_host(box: Box, volume: Path) -> None:
    """It reaches slaves, which binds are unless told otherwise, and not private ones."""
    box.mounts.append({"destination": "/default", "source": str(volume), "options": ["rbind"]})
    box.mounts.append({"destination": "/slave", "source": str(volume), "options": ["rbind", "rslave"]})
    box.mounts.append({"destination": "/private", "source": str(volume), "options": ["rbind", "rprivate"]})
    box.start()
    mount("-t", "tmpfs", "-o", "size=128k", "later", volume / "below")
    try:
        found = box.oci.ok("exec", NAME, "grep", "size=128k", "/proc/self/mounts")
        assert sorted(line.split()[1] for line in found.splitlines()) == ["/default/below", "/slave/below"]
    finally:
        subprocess.run(["umount", volume / "below"], check=True)


@pytest.mark.parametrize(("propagation", "reaches"), [("rshared", True), ("rslave", False), ("rprivate", False)])
@pytest.mark.parametrize("user", [False, True])
def test_mounts_of_the_container(box: Box, volume: Path, propagation: str, reaches: bool, user: bool) -> None:
    """It reaches the host from a shared mount only, and from a user namespace never."""
    if user:
        box.map_ids((0, BASE, 65536))
    box.process["capabilities"] = {name: ["CAP_SYS_ADMIN"] for name in ("bounding", "effective", "permitted")}
    box.mounts.append({"destination": "/mnt", "source": str(volume), "options": ["rbind", propagation]})
    box.start("mount -t tmpfs -o size=256k new /mnt/below && touch /tmp/done; exec sleep 600")
    until(lambda: (box.rootfs / "tmp/done").exists() or box.output, "it is mounted, or something was said")
    assert box.output == ""
    assert ("size=256k" in Path("/proc/self/mounts").read_text()) is (reaches and not user)
    if reaches and not user:
        subprocess.run(["umount", volume / "below"], check=True)


@pytest.mark.parametrize("propagation", ["private", "slave", "unbindable", "shared"])
@pytest.mark.parametrize("user", [False, True])
def test_mounts_below_a_bind_mount_do_not_propagate_to_the_host(
    box: Box, volume: Path, propagation: str, user: bool
) -> None:
    """An option without r speaks of one mount; those below it are slaves, unless sharing with the host is asked for."""
    if user:
        box.map_ids((0, BASE, 65536))
    box.mounts.append({"destination": "/mnt", "source": str(volume), "options": ["rbind", propagation]})
    box.linux["rootfsPropagation"] = "private"
    box.mounts.append({"destination": "/plain", "source": str(volume), "options": ["rbind"]})
    lines = [line.split() for line in box.out("cat /proc/self/mountinfo").splitlines()]
    shared = {fields[4] for fields in lines if any(field.startswith("shared:") for field in fields[6:])}
    assert not shared & {"/plain", "/plain/below"}
    assert ("/mnt/below" in shared) is (propagation == "shared" and not user)


def test_a_mount_on_a_device_of_the_hosts(box: Box) -> None:
    """A user namespace has no nodes of its own, and so copies of the host's mounts of /dev."""
    box.map_ids((0, BASE, 65536))
    box.mounts[:] = [m for m in box.mounts if not m["destination"].startswith("/dev")]
    box.process["capabilities"] = {name: ["CAP_SYS_ADMIN"] for name in ("bounding", "effective", "permitted")}
    before = Path("/proc/self/mountinfo").read_text()
    assert " /dev " in before and "shared:" in [line for line in before.splitlines() if " /dev " in line][-1]
    box.start("mount --bind /bin/sh /dev/null && touch /tmp/done; exec sleep 600")
    until(lambda: (box.rootfs / "tmp/done").exists(), "it is mounted")
    assert Path("/proc/self/mountinfo").read_text() == before


@pytest.mark.parametrize(
    ("propagation", "field"),
    [(None, "master:"), ("private", None), ("slave", "master:"), ("shared", "shared:"), ("unbindable", "unbindable")],
)
def test_propagation_of_the_root(box: Box, propagation: str | None, field: str | None) -> None:
    """Mounts that are made for the container never appear in the host's root file system."""
    mount("--bind", box.rootfs, box.rootfs)
    try:
        if propagation:
            box.linux["rootfsPropagation"] = propagation
        before = Path("/proc/self/mounts").read_text()
        line = box.out(f"grep ' / ' /proc/self/mountinfo; grep -c {box.rootfs} /proc/self/mounts || true").splitlines()
        optional = line[0].split(" - ")[0].split()[6:]
        assert [f for f in optional if field and f.startswith(field)] or (field is None and optional == [])
        assert Path("/proc/self/mounts").read_text() == before
    finally:
        subprocess.run(["umount", box.rootfs], check=True)


# -- mapped owners -----------------------------------------------------------------------------------------------------


def test_an_idmapped_mount(box: Box, volume: Path) -> None:
    os.chown(volume / "file", 1000, 1000)
    ids = [{"containerID": 1000, "hostID": 7, "size": 1}]
    box.bind(volume, "/mapped", uidMappings=ids, gidMappings=ids)
    box.bind(volume, "/plain")
    assert box.out("stat -c '%u %g' /mapped/file /plain/file").splitlines() == ["7 7", "1000 1000"]


def test_idmap_with_the_containers_own_mapping(box: Box, volume: Path) -> None:
    """Files of root on disk are root's inside, though that is another user outside."""
    box.map_ids((0, BASE, 65536))
    box.bind(volume, "/mapped", "idmap")
    box.bind(volume, "/plain")
    assert box.out("stat -c '%u' /mapped/file /plain/file; touch /mapped/new").split() == ["0", "65534"]
    assert (volume / "new").stat().st_uid == 0


@pytest.mark.parametrize("cgroup", [False, True])
def test_sysfs_in_a_user_namespace_on_the_hosts_network(box: Box, cgroup: bool) -> None:
    """The kernel lets only the owner of a network namespace mount a new one: the host's is bound, alone."""
    box.map_ids((0, BASE, 65536))
    if not cgroup:
        box.config["mounts"] = [entry for entry in box.mounts if entry["destination"] != "/sys/fs/cgroup"]
    below = "awk '$5 == \"/sys\"' /proc/self/mountinfo | wc -l"
    script = f"ls /sys/class/net; touch /sys/x; ls /sys/fs/cgroup | wc -l; {below}"
    own = box.run(script)
    assert own.out.split()[0] == "lo" and "Read-only" in own.err
    box.without("network")
    host = box.run(script)
    *devices, groups, mounted = host.out.split()
    assert set(devices) == set(os.listdir("/sys/class/net"))
    assert (groups != "0", mounted) == (cgroup, "1")
    assert "/sys/x: Read-only file system" in host.err


def test_ridmap_maps_mounts_below_too(box: Box, volume: Path) -> None:
    box.map_ids((0, BASE, 65536))
    (volume / "below/deep").touch()
    for name, option in (("one", "idmap"), ("all", "ridmap")):
        entry = {"destination": f"/{name}", "source": str(volume), "type": "bind", "options": ["rbind", option]}
        box.mounts.append(entry)
    assert box.out("stat -c %u /one/file /all/file /one/below/deep /all/below/deep").split() == ["0", "0", "65534", "0"]


# -- devices -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("user", [False, True])
@pytest.mark.parametrize("dev", ["tmpfs", "none"])
def test_devices(box: Box, user: bool, dev: str) -> None:
    if user:
        box.map_ids((0, BASE, 65536))
    if dev == "none":
        box.mounts[:] = [m for m in box.mounts if not m["destination"].startswith("/dev")]
    box.linux.pop("resources")
    script = "for d in null zero full random urandom tty; do stat -c '%n %t:%T %a' /dev/$d; done; echo x > /dev/null"
    expected = {"null": "1:3", "zero": "1:5", "full": "1:7", "random": "1:8", "urandom": "1:9", "tty": "5:0"}
    found = dict(line.split()[:2] for line in box.out(script).splitlines())
    assert found == {f"/dev/{name}": numbers for name, numbers in expected.items()}
    links = box.out("for l in fd stdin ptmx; do readlink /dev/$l; done").split()
    assert links == ["/proc/self/fd", "/proc/self/fd/0", "pts/ptmx"]


def test_devices_of_the_config(box: Box) -> None:
    box.linux["devices"] = [
        {"path": "/dev/deep/er/zero", "type": "c", "major": 1, "minor": 5, "fileMode": 0o604, "uid": 3, "gid": 4},
        {"path": "/dev/null", "type": "c", "major": 1, "minor": 3, "fileMode": 0o600},
        {"path": "/elsewhere/fifo", "type": "p", "fileMode": 0o622},
        {"path": "/dev/block", "type": "b", "major": 7, "minor": 200},
    ]
    script = "stat -c '%F,%t:%T,%a,%u:%g' /dev/deep/er/zero /dev/null /elsewhere/fifo /dev/block"
    assert box.out(script).splitlines() == [
        "character special file,1:5,604,3:4",
        "character special file,1:3,600,0:0",
        "fifo,0:0,622,0:0",
        "block special file,7:c8,666,0:0",
    ]


# -- the root ----------------------------------------------------------------------------------------------------------


def test_a_read_only_root(box: Box) -> None:
    box.config["root"]["readonly"] = True
    result = box.run("touch /x; touch /dev/shm/y && echo shm")
    assert result.out == "shm\n"
    assert "Read-only file system" in result.err


@pytest.mark.parametrize("options", [(), ("--no-pivot",)])
def test_the_root_is_all_there_is(box: Box, options: tuple[str, ...]) -> None:
    script = "ls /; cd /; cd ../../..; ls -d bin tmp; cut -d' ' -f5 /proc/self/mountinfo"
    found = box.out(script, *options).split()
    assert "usr" not in found and found.count("bin") == 2
    if not options:
        assert str(box.rootfs) not in found


def test_masked_and_readonly_paths(box: Box) -> None:
    (box.rootfs / "secret").write_text("x")
    (box.rootfs / "hidden/deep").mkdir(parents=True)
    (box.rootfs / "fixed").mkdir()
    box.linux["maskedPaths"] = ["/proc/keys", "/proc/acpi", "/secret", "/hidden", "/not/there"]
    box.linux["readonlyPaths"] = ["/proc/sys", "/fixed", "/not/there"]
    script = "cat /proc/keys /secret; ls /hidden; touch /hidden/x /fixed/x 2>&1; echo 1 > /proc/sys/net/ipv4/ip_forward"
    result = box.run(script)
    assert result.out.count("Read-only file system") == 2
    assert "Read-only file system" in result.err
    assert [line for line in result.out.splitlines() if "Read-only" not in line] == []


def test_a_path_that_is_listed_twice_is_masked_once(box: Box) -> None:
    (box.rootfs / "hidden").mkdir()
    (box.rootfs / "secret").write_text("x")
    box.linux["maskedPaths"] = ["/secret", "/hidden", "/secret", "/hidden/", "//hidden"]
    box.linux["readonlyPaths"] = ["/bin", "/bin", "/bin/"]
    script = "cut -d' ' -f5 /proc/self/mountinfo | grep -E '^/(secret|hidden|bin)$' | sort; cat /secret; ls /hidden"
    assert box.out(script) == "/bin\n/hidden\n/secret\n"


def test_a_mask_is_the_null_device_and_nothing_else(box: Box) -> None:
    """CVE-2025-31133: an image may bring any /dev/null."""
    box.mounts[:] = [m for m in box.mounts if not m["destination"].startswith("/dev")]
    (box.rootfs / "dev").mkdir()
    (box.rootfs / "dev/null").symlink_to("/proc/sys/kernel/core_pattern")
    (box.rootfs / "secret").write_text("x")
    box.linux["maskedPaths"] = ["/secret"]
    result = box.run("cat /secret")
    assert result.out == "" and "core" not in result.err


def test_a_link_in_the_place_of_a_masked_path(box: Box) -> None:
    (box.rootfs / "secret").symlink_to("/etc")
    box.linux["maskedPaths"] = ["/secret"]
    assert "protect paths" in box.refused()


def test_sysctls(box: Box) -> None:
    box.linux["sysctl"] = {"net.ipv4.ip_forward": "1", "net/ipv4/conf/lo/rp_filter": "2", "kernel.msgmax": "4096"}
    box.linux["readonlyPaths"] = ["/proc/sys"]
    files = "net/ipv4/ip_forward net/ipv4/conf/lo/rp_filter kernel/msgmax"
    assert box.out(f"cd /proc/sys; cat {files}").split() == ["1", "2", "4096"]


@pytest.mark.parametrize("namespaced", [True, False])
def test_the_cgroup_tree_is_the_containers_own(box: Box, namespaced: bool) -> None:
    if namespaced:
        box.namespace("cgroup")
    else:
        box.without("cgroup")
    box.mounts[:] = [m for m in box.mounts if m["destination"] != "/sys/fs/cgroup"]
    box.mounts.append({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro"]})
    script = "d=/sys/fs/cgroup; [ -d $d/pids ] && d=$d/pids; cat $d/pids.max; cat $d/cgroup.procs | wc -l; touch $d/x"
    result = box.run(script)
    assert result.out.split()[0] == "20"
    assert 1 <= int(result.out.split()[1]) <= 3
    assert "Read-only file system" in result.err
