"""Mounts, devices, protected paths and namespaces as the three runtimes make them: one config, one observation.

Section by section of the runtime-spec 1.2: config.md (Root, Mounts, Process), config-linux.md (Default Filesystems,
Namespaces, Devices, Default Devices, Masked Paths, Readonly Paths, Rootfs Mount Propagation).
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.runtimes import Runtime

OWN = "insula-oci"


def older(oci: Runtime, name: str, reason: str) -> None:
    """Skip what Debian 12's version of a peer lacks."""
    if oci.name == name:
        pytest.skip(f"Debian's {name}: {reason}")


def mount(oci: Runtime, destination: str, kind: str, source: Path | str, *options: str) -> None:
    entry = {"destination": destination, "type": kind, "source": str(source), "options": [*options]}
    oci.config["mounts"].append(entry)


def bind(oci: Runtime, source: Path | str, destination: str, *options: str) -> None:
    mount(oci, destination, "bind", source, *(options if "rbind" in options else ("bind", *options)))


def tmpfs(oci: Runtime, destination: str, *options: str) -> None:
    mount(oci, destination, "tmpfs", "tmpfs", *options)


@pytest.fixture
def data(oci: Runtime) -> Iterator[Path]:
    """A directory of the host with files; afterwards it is gone, and the root file system as it was."""
    path, before = oci.path / "data", sorted(os.listdir(oci.rootfs))
    (path / "below").mkdir(parents=True)
    (path / "file").write_text("of the host\n")
    yield path
    made = [oci.rootfs / name for name in os.listdir(oci.rootfs) if name not in before]
    subprocess.run(["rm", "-rf", path, *made], check=True)


def mountinfo(oci: Runtime, script: str = "cat /proc/self/mountinfo") -> dict[str, list[str]]:
    """The fields of each mount by its place; of the last one there."""
    lines = [line.split() for line in oci.out(script).splitlines()]
    return {fields[4]: fields for fields in lines}


# -- config.md, Mounts -------------------------------------------------------------------------------------------------


def test_the_order_is_the_listed_one(oci: Runtime, data: Path) -> None:
    """Also as mountinfo shows it: validation programs of others look there."""
    bind(oci, data, "/first")
    tmpfs(oci, "/second")
    bind(oci, data / "file", "/second/file")
    tmpfs(oci, "/first/below")
    listed = [entry["destination"] for entry in oci.config["mounts"]]
    found = [line.split()[4] for line in oci.out("cat /proc/self/mountinfo").splitlines()]
    places = dict.fromkeys(path for path in found if path in listed)
    assert [*places] == listed


def test_a_later_mount_hides_an_earlier_one_below(oci: Runtime, data: Path) -> None:
    bind(oci, data, "/dev/shm/x")
    bind(oci, data, "/mnt/x")
    assert oci.out("ls /dev/shm/x /mnt/x").split().count("file") == 2, "the control"
    tmpfs(oci, "/dev/shm")
    tmpfs(oci, "/mnt")
    assert oci.out("ls /dev/shm; ls /mnt") == ""


def test_a_source_may_be_an_earlier_mount(oci: Runtime, data: Path) -> None:
    bind(oci, data, "/mnt")
    bind(oci, oci.rootfs / "mnt", "/final")
    bind(oci, oci.rootfs / "mnt/file", "/one/file")
    assert oci.out("cat /final/file /one/file") == "of the host\n" * 2


def test_sources_and_destinations_may_be_relative(oci: Runtime, data: Path) -> None:
    """A source to the bundle, a destination to the root."""
    bind(oci, "data", "/mnt")
    bind(oci, "data", "other/place")
    assert oci.out("cat /mnt/file /other/place/file") == "of the host\n" * 2


ATTRIBUTES = {
    "ro": {"ro"},
    "nosuid": {"nosuid", "rw"},
    "nodev": {"nodev"},
    "noexec": {"noexec"},
    "noatime": {"noatime"},
    "nodiratime": {"nodiratime"},
    "relatime": {"relatime"},
}


def test_attributes(oci: Runtime, data: Path) -> None:
    for option in ATTRIBUTES:
        bind(oci, data, f"/bind/{option}", option)
        tmpfs(oci, f"/tmpfs/{option}", option)
    bind(oci, data, "/bind/several", "ro", "nosuid", "nodev", "noexec")
    found = {place: set(fields[5].split(",")) for place, fields in mountinfo(oci).items()}
    for option, expected in ATTRIBUTES.items():
        assert expected <= found[f"/bind/{option}"], option
        assert expected <= found[f"/tmpfs/{option}"], option
    assert {"ro", "nosuid", "nodev", "noexec"} <= found["/bind/several"]


def test_recursive_attributes(oci: Runtime, data: Path) -> None:
    """`ro` is one mount's; `rro` is that of all below too."""
    oci.host_mounts(data / "below")
    bind(oci, data, "/ro", "rbind", "ro")
    bind(oci, data, "/rro", "rbind", "rro", "rnosuid")
    script = "for f in /ro/x /ro/below/x /rro/x /rro/below/x; do (echo > $f) 2>/dev/null && echo $f; done; true"
    try:
        assert oci.out(script).split() == ["/ro/below/x"]
        found = {place: set(fields[5].split(",")) for place, fields in mountinfo(oci).items()}
        assert "nosuid" in found["/rro/below"] and "nosuid" not in found["/ro/below"]
    finally:
        oci.host_unmounts(data / "below")


def test_bind_takes_one_mount_rbind_all_below(oci: Runtime, data: Path) -> None:
    oci.host_mounts(data / "below")
    bind(oci, data, "/bind")
    bind(oci, data, "/rbind", "rbind")
    try:
        found = mountinfo(oci)
        assert "/rbind/below" in found and "/bind/below" not in found
    finally:
        oci.host_unmounts(data / "below")


PROPAGATION = {"private": [], "slave": ["master"], "shared": ["shared"], "unbindable": ["unbindable"]}


def optional(fields: list[str]) -> list[str]:
    """The names of a mount's optional fields (proc_pid_mountinfo(5)), which tell its propagation."""
    return [field.split(":")[0] for field in fields[6 : fields.index("-")]]


@pytest.mark.parametrize("kind", PROPAGATION)
def test_propagation(oci: Runtime, data: Path, kind: str) -> None:
    """Of a mount and, with an r, of all below it. What the host has shared stays so only if that is asked for."""
    older(oci, "crun", "every mount is private")
    oci.host_mounts(data)
    oci.host_mounts(data / "below")
    bind(oci, data, "/one", "rbind", kind)
    bind(oci, data, "/all", "rbind", f"r{kind}")
    tmpfs(oci, "/tmpfs", kind)
    try:
        found = {place: optional(fields) for place, fields in mountinfo(oci).items()}
        for place in ("/one", "/all", "/all/below"):
            # runc's are slaves of the host's besides, unless rootfsPropagation is shared
            assert [name for name in found[place] if kind != "shared" or name != "master"] == PROPAGATION[kind], place
        assert found["/tmpfs"] == ([] if kind == "slave" else PROPAGATION[kind])
        assert found["/one/below"] == ["shared" if kind == "shared" and oci.name == OWN else "master"]
    finally:
        oci.host_unmounts(data / "below")
        oci.host_unmounts(data)


def test_flags_of_the_source(oci: Runtime, data: Path) -> None:
    """What the host has made of the mount stays, unless an option says otherwise; runc and crun let some go."""
    oci.host_mounts(data)
    try:
        subprocess.run(oci.host.command("mount", "-o", "remount,bind,ro,nosuid,noexec", data), check=True)
        bind(oci, data, "/plain")
        bind(oci, data, "/nodev", "nodev")
        bind(oci, data, "/exec", "exec")
        found = {place: set(fields[5].split(",")) for place, fields in mountinfo(oci).items()}
    finally:
        oci.host_unmounts(data)
    kept = {"ro", "nosuid", "noexec"}
    if oci.name == OWN:
        assert kept < found["/plain"] and kept | {"nodev"} < found["/nodev"]
        assert kept - {"noexec"} < found["/exec"] and "noexec" not in found["/exec"]
    else:
        assert "nodev" in found["/nodev"] and not kept & found["/nodev"]


def test_a_destination_below_the_roots_own_path(oci: Runtime, data: Path) -> None:
    """It is a path inside, as every other; runc takes the root's path away, or fails."""
    older(oci, "runc", "looks for it on the host")
    bind(oci, data, f"{oci.rootfs}/mnt")
    assert f"{oci.rootfs}/mnt" in mountinfo(oci)


def test_options_of_a_file_system(oci: Runtime) -> None:
    tmpfs(oci, "/mnt", "size=64k", "mode=711", "uid=5", "gid=6")
    script = "stat -c '%a %u %g' /mnt; df -k /mnt | tail -n1 | tr -s ' ' | cut -d' ' -f2"
    assert oci.out(script).split() == ["711", "5", "6", "64"]


def test_tmpfs_has_the_mode_of_the_hidden_directory(oci: Runtime, data: Path) -> None:
    older(oci, "crun", "a tmpfs has mode 1777 unless another is asked for")
    (oci.rootfs / "kept").mkdir(mode=0o750)
    tmpfs(oci, "/kept")
    tmpfs(oci, "/missing")
    assert oci.out("stat -c %a /kept /missing").split() == ["750", "1777"]


def test_tmpcopyup(oci: Runtime, data: Path) -> None:
    (oci.rootfs / "full/deep").mkdir(parents=True)
    (oci.rootfs / "full/deep/file").write_text("kept\n")
    (oci.rootfs / "full/link").symlink_to("/outside")
    tmpfs(oci, "/full", "tmpcopyup", "mode=755")
    assert oci.out("cat /full/deep/file; readlink /full/link; touch /full/new") == "kept\n/outside\n"
    assert not (oci.rootfs / "full/new").exists()


def test_missing_parts_of_a_target_are_made(oci: Runtime, data: Path) -> None:
    bind(oci, data, "/new/deep/directory")
    bind(oci, data / "file", "/new/other/file")
    assert oci.out("cat /new/deep/directory/file /new/other/file") == "of the host\n" * 2
    assert (oci.rootfs / "new/other/file").is_file() and (oci.rootfs / "new/deep/directory").is_dir()


@pytest.mark.parametrize("link", ["../run/x/file", "/run/x/file", "../../../../run/x/file"])
def test_targets_that_are_dangling_links(oci: Runtime, data: Path, link: str) -> None:
    (oci.rootfs / "etc/link").symlink_to(link)
    (oci.rootfs / "way").symlink_to("/not/there")
    bind(oci, data / "file", "/etc/link", "ro")
    if oci.name != "crun":  # Debian's follows a dangling link at the end only
        tmpfs(oci, "/way/deep")
    try:
        assert oci.out("cat /etc/link /run/x/file") == "of the host\n" * 2
        assert oci.name == "crun" or (oci.rootfs / "not/there/deep").is_dir()
    finally:
        (oci.rootfs / "etc/link").unlink()


def test_idmapped_mounts(oci: Runtime, data: Path) -> None:
    older(oci, "runc", "it has no idmapped mounts of directories")
    oci.linux["namespaces"].append({"type": "user"})
    oci.linux["uidMappings"] = oci.linux["gidMappings"] = [{"containerID": 0, "hostID": 0, "size": 65536}]
    entry = {"destination": "/mapped", "type": "bind", "source": str(data), "options": ["bind"]}
    maps = [{"containerID": 0, "hostID": 7, "size": 1}]
    oci.config["mounts"].append({**entry, "uidMappings": maps, "gidMappings": maps})
    bind(oci, data, "/plain")
    assert oci.out("stat -c '%u %g' /mapped/file /plain/file").splitlines() == ["7 7", "0 0"]


# -- config.md, Root and Process ---------------------------------------------------------------------------------------


def test_a_read_only_root(oci: Runtime) -> None:
    oci.config["root"]["readonly"] = True
    result = oci.run("touch /x; touch /dev/shm/y && echo shm")
    assert result.out == "shm\n" and "Read-only file system" in result.err


def test_a_read_only_dev(oci: Runtime) -> None:
    [dev] = [entry for entry in oci.config["mounts"] if entry["destination"] == "/dev"]
    dev["options"].append("ro")
    result = oci.run("echo x > /dev/null && echo x > /dev/shm/x && ls /dev; touch /dev/x")
    assert {"null", "zero", "pts", "shm", "mqueue", "fd"} <= set(result.out.split())
    assert "Read-only file system" in result.err


def test_a_missing_working_directory(oci: Runtime, data: Path) -> None:
    oci.process |= {"cwd": "/none/such", "user": {"uid": 1000, "gid": 1000}}
    oci.config["root"]["readonly"] = True
    assert oci.out("pwd; stat -c '%a %u %g' /none /none/such").splitlines() == ["/none/such", "755 0 0", "755 0 0"]


def test_hooks_find_the_mounts_at_the_roots_path(oci: Runtime, data: Path) -> None:
    """Hooks in the container's mount namespace before pivot_root, and those that enter it (config.md, Hooks)."""
    library = oci.rootfs / "library.so"
    library.touch()
    bind(oci, data, "/data")
    pid = "$(sed 's/.*\"pid\": *\\([0-9]*\\).*/\\1/')"
    inject = f"nsenter --mount --target {pid} mount --bind {data}/file {library}"
    show = f"cat > /dev/null; cat {oci.rootfs}/data/file {library} > {oci.rootfs}/seen"
    oci.config["hooks"] = {
        kind: [{"path": "/bin/sh", "args": ["sh", "-c", f"PATH=/usr/bin:/bin; {script}"]}]
        for kind, script in (("createRuntime", inject), ("createContainer", show))
    }
    assert oci.out("cat /seen /library.so") == "of the host\n" * 3
    assert library.read_text() == ""


# -- config-linux.md ---------------------------------------------------------------------------------------------------


def test_default_devices_and_links(oci: Runtime) -> None:
    script = "cd /dev; stat -c '%n %F %t:%T %a %u' null zero full random urandom tty"
    found = oci.out(f"{script}; for l in fd stdin stdout stderr ptmx; do readlink $l; done").splitlines()
    numbers = {"null": "1:3", "zero": "1:5", "full": "1:7", "random": "1:8", "urandom": "1:9", "tty": "5:0"}
    assert found[:6] == [f"{name} character special file {number} 666 0" for name, number in numbers.items()]
    assert found[6:10] == ["/proc/self/fd", *(f"/proc/self/fd/{number}" for number in range(3))]
    assert found[10].removeprefix("/dev/") == "pts/ptmx"


def test_devices_of_the_config(oci: Runtime) -> None:
    oci.linux["devices"] = [
        {"path": "/dev/deep/er/zero", "type": "c", "major": 1, "minor": 5, "fileMode": 0o604, "uid": 3, "gid": 4},
        {"path": "/dev/fifo", "type": "p", "fileMode": 0o622},
        {"path": "/dev/block", "type": "b", "major": 7, "minor": 200, "fileMode": 0o666},
    ]
    assert oci.out("stat -c '%F,%t:%T,%a,%u:%g' /dev/deep/er/zero /dev/fifo /dev/block").splitlines() == [
        "character special file,1:5,604,3:4",
        "fifo,0:0,622,0:0",
        "block special file,7:c8,666,0:0",
    ]


def test_protected_paths(oci: Runtime, data: Path) -> None:
    """A masked file reads as empty, a masked directory is one; what isn't there is passed over."""
    (oci.rootfs / "secret").write_text("x")
    (oci.rootfs / "hidden/deep").mkdir(parents=True)
    (oci.rootfs / "fixed").mkdir()
    oci.linux["maskedPaths"] = ["/proc/keys", "/secret", "/hidden", "/not/there"]
    oci.linux["readonlyPaths"] = ["/proc/sys", "/fixed", "/not/there"]
    script = "cat /proc/keys /secret; ls /hidden; for f in /hidden/x /fixed/x; do touch $f 2>/dev/null || echo no; done"
    script += "; (echo 1 > /proc/sys/net/ipv4/ip_forward) 2>/dev/null || echo no"
    assert oci.out(script).split() == ["no"] * 3


@pytest.mark.parametrize("kind", PROPAGATION)
def test_rootfs_propagation(oci: Runtime, kind: str) -> None:
    if kind in ("shared", "unbindable"):
        older(oci, "runc", "a shared root is private in the end, and an unbindable one is refused")
    oci.linux["rootfsPropagation"] = kind
    found = optional(mountinfo(oci)["/"])
    if kind == "slave":
        assert "shared" not in found, "what it comes from need not be shared"
    else:
        assert found == PROPAGATION[kind]


TYPES = {"pid": "pid", "network": "net", "ipc": "ipc", "uts": "uts", "mount": "mnt", "cgroup": "cgroup"}


def test_new_namespaces(oci: Runtime) -> None:
    oci.linux["namespaces"] = [{"type": kind} for kind in TYPES]
    found = oci.out("; ".join(f"readlink /proc/self/ns/{name}" for name in TYPES.values())).split()
    theirs = [os.readlink(f"/proc/{oci.host.pid}/ns/{name}") for name in TYPES.values()]
    assert len(found) == len(TYPES) and not set(found) & set(theirs)


def test_namespaces_by_path_and_inherited_ones(oci: Runtime) -> None:
    """A type with a path is joined; one that isn't listed stays the runtime's."""
    command = ["unshare", "--ipc", "--uts", "--net", "sh", "-c", "echo; exec sleep 600"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        assert holder.stdout
        holder.stdout.readline()
        try:
            joined = ("ipc", "net")
            kinds = {name: kind for kind, name in TYPES.items()}
            oci.linux["namespaces"] = [{"type": kinds[n], "path": f"/proc/{holder.pid}/ns/{n}"} for n in joined]
            oci.linux["namespaces"] += [{"type": "pid"}, {"type": "mount"}]
            oci.config.pop("hostname", None)
            found = oci.out("; ".join(f"readlink /proc/self/ns/{name}" for name in (*joined, "uts"))).split()
            assert found[:2] == [os.readlink(f"/proc/{holder.pid}/ns/{name}") for name in joined]
            assert found[2] == os.readlink(f"/proc/{oci.host.pid}/ns/uts")
        finally:
            holder.kill()
