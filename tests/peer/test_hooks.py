"""Hooks of the three runtimes: their rights and their environment."""

from __future__ import annotations

from tests.support.runtimes import Runtime

RIGHTS = "grep -E '^(Uid|Gid|Groups|CapInh|CapPrm|CapEff|CapBnd|CapAmb|NoNewPrivs|Seccomp):' /proc/self/status"
PATH = "PATH=/bin:/usr/bin"
READ = "/bin/cat > /dev/null"
"""A hook is told the state: one that ends before crun has written that fails there (EPIPE)."""


def start_hook(oci: Runtime, script: str, **more: object) -> None:
    entry = {"path": "/bin/sh", "args": ["sh", "-c", f"{READ}; {script}"], "env": [PATH], **more}
    oci.config["hooks"] = {"startContainer": [entry]}


def test_start_hooks_have_the_rights_of_the_process(oci: Runtime) -> None:
    """The path is the image's: what it could do with more rights, a hostile image could."""
    oci.process |= {
        "user": {"uid": 1000, "gid": 1001, "additionalGids": [1002]},
        "capabilities": {"bounding": ["CAP_CHOWN"]},
        "noNewPrivileges": True,
    }
    oci.linux["seccomp"] = {
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["sethostname"], "action": "SCMP_ACT_ERRNO"}],
    }
    (oci.rootfs / "tmp").chmod(0o1777)
    start_hook(oci, f"({RIGHTS}) > /tmp/rights")
    own = oci.out(f"cat /tmp/rights; echo --; {RIGHTS}")
    hook, _, program = own.partition("--\n")
    assert hook == program
    assert "Uid:\t1000\t1000\t1000\t1000" in hook and "CapEff:\t0000000000000000" in hook
    assert "CapBnd:\t0000000000000001" in hook and "NoNewPrivs:\t1" in hook and "Seccomp:\t2" in hook


def test_a_start_hook_cannot_write_the_hosts_settings(oci: Runtime) -> None:
    """An attack of an image's /sbin/ldconfig; it writes the existing value, in case that it succeeds."""
    attack = "mount -o remount,rw,bind /proc/sys || mount -t proc none /proc; cat /proc/sys/kernel/core_pattern"
    attack = f"({attack} > /tmp/was; cat /tmp/was > /proc/sys/kernel/core_pattern && touch /tmp/written) 2> /tmp/why"
    start_hook(oci, f"{attack}; touch /tmp/ran")
    oci.out("test -e /tmp/ran && test -s /tmp/why && test ! -e /tmp/written")


def test_start_hooks_run_with_the_filter_of_engines(oci: Runtime) -> None:
    """Which answers clone3 with ENOSYS, and forbids more than a runtime may need to run a hook."""
    oci.linux["seccomp"] = {
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [
            {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38},
            {"names": ["pidfd_open", "close_range", "unshare", "mount"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1},
        ],
    }
    start_hook(oci, "touch /tmp/ran", timeout=20)
    oci.out("test -e /tmp/ran")
    (oci.rootfs / "tmp/ran").unlink()
    start_hook(oci, "sleep 300", timeout=1)
    result = oci.run("touch /tmp/program")
    assert result.status != 0 and not (oci.rootfs / "tmp/program").exists(), result


def test_without_env_a_hook_inherits(oci: Runtime) -> None:
    """The runtime's environment; startContainer hooks the process's."""
    told = oci.path / "told"
    oci.environment["OF_THE_CALLER"] = "1"
    oci.process["env"] = ["OF_THE_PROCESS=1", PATH]
    oci.config["hooks"] = {
        "createRuntime": [{"path": "/bin/sh", "args": ["sh", "-c", f"{READ}; env > {told}"]}],
        "startContainer": [{"path": "/bin/sh", "args": ["sh", "-c", f"{READ}; env > /tmp/env"]}],
    }
    inside = oci.out("cat /tmp/env").splitlines()
    outside = told.read_text().splitlines()
    assert "OF_THE_CALLER=1" in outside and "OF_THE_PROCESS=1" not in outside
    assert "OF_THE_PROCESS=1" in inside and "OF_THE_CALLER=1" not in inside
    for kind, path in (("createRuntime", str(told)), ("startContainer", "/tmp/env")):
        oci.config["hooks"] = {
            kind: [{"path": "/bin/sh", "args": ["sh", "-c", f"{READ}; env > {path}"], "env": ["ONLY=1", PATH]}]
        }
        found = oci.out("cat /tmp/env") if kind == "startContainer" else oci.out("") or told.read_text()
        assert "ONLY=1" in found and "OF_THE" not in found, kind


def test_where_hooks_are_run(oci: Runtime) -> None:
    """The spec names no directory: that of createContainer hooks is the root, as in runc, or the bundle, as in crun."""
    told = oci.path / "places"
    entry = {"path": "/bin/sh", "args": ["sh", "-c", f"{READ}; pwd >> {told}"], "env": [PATH]}
    oci.config["hooks"] = {"createRuntime": [entry], "createContainer": [entry]}
    oci.out("true")
    container = oci.path if oci.name == "crun" else oci.rootfs
    assert told.read_text().splitlines() == [str(oci.path), str(container)]
