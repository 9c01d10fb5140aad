"""Privileges from execve(2) of marked files, and privileges that a process could give to itself.

no_new_privs (prctl(2)) is set for whatever runs in a container, so that exec never gives more than there was: set-uid
programs, file capabilities and ambient sets all end there. The bounding set ends it a second time, and the user
namespace a third: what is gained counts inside only.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import pytest

from tests.forked import forked
from tests.support.cli import Cli
from tests.support.images import Layout, member, tar
from tests.system.escape.attacks import privileges, processes
from tests.system.escape.cell import PYTHON, Cell, files, members
from tests.system.escape.conftest import CellFactory

NOBODY = "65534:65534"
MARKS = ("setuid", "setgid", "caps2", "caps3")
DEFAULT = 0xA80425FB


@pytest.fixture(scope="module")
def marked(cell: Cell) -> dict[str, str]:
    """Marks made inside of the container by its root: the errno of each that the kernel refused."""
    marks: dict[str, str] = cell.gets(privileges.privileged_files, PYTHON, "/root")
    cell.cli.ok("exec", cell.name, "sh", "-c", "/bin/busybox chmod 755 /root")
    return marks


def control(mark: str, tmp_path: Path) -> Any:
    """The same file on the host, run by the user nobody, without no_new_privs."""
    privileges.privileged_files(PYTHON, str(tmp_path))
    for path in (tmp_path, *tmp_path.parents[:2]):
        os.chmod(path, 0o755)

    def nobody() -> Any:
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
        return privileges.after_exec(str(tmp_path / mark))

    return forked(nobody)


@pytest.mark.parametrize("mark", ["setuid", "setgid", "caps2"])
def test_set_uid_files_and_file_capabilities_have_no_effect(
    cell: Cell, marked: dict[str, str], mark: str, tmp_path: Path
) -> None:
    """Set-uid, set-gid, and security.capability of version 2, made by the container's root, run by its user nobody."""
    assert marked[mark] == ""
    end = cell.try_(privileges.after_exec, f"/root/{mark}", user=NOBODY)
    assert end.value["uid"] == [65534] * 3 and end.value["gid"] == [65534] * 3
    assert int(end.value["CapPrm"], 16) == 0
    unguarded = control(mark, tmp_path)
    gained = {"setuid": unguarded["uid"][1] == 0, "setgid": unguarded["gid"][1] == 0}
    assert gained.get(mark, int(unguarded["CapPrm"], 16) != 0), "the control"


def test_capabilities_for_the_hosts_root(cell: Cell, marked: dict[str, str]) -> None:
    """Version 3 of security.capability says for which root it counts. A container may write its own only: the kernel
    puts in the root of the writer's user namespace, or refuses (CVE-2021-4037 and the like were about such details)."""
    if marked["caps3"]:
        assert marked["caps3"] == "EPERM"
        return
    value = os.getxattr(cell.upper / "root/caps3", "security.capability")
    assert len(value) == 24, "version 3, as it is on the disk"
    assert struct.unpack("<I", value[20:])[0] == cell.upper.stat().st_uid != 0


def test_set_uid_files_and_file_capabilities_of_an_image(
    cell: Cell, cells: CellFactory, tenant: Cli, tmp_path: Path
) -> None:
    """In a layer: set-uid and version 2 are kept, as sudo and ping need; version 3 is refused."""
    python = files()[PYTHON]
    layout = Layout()
    layer = tar(
        *members(
            member("root/setuid", python, mode=0o4755), _with_capability("root/caps2", python, privileges.EVERYTHING)
        ),
        format=2,
    )
    layout.image([layer], name="marked:latest", process={"Cmd": ["/bin/sleep", "600"], "Env": ["PATH=/bin"]})
    (tmp_path / "marked.tar").write_bytes(layout.tar())
    tenant.ok("image", "load", tmp_path / "marked.tar")
    tenant.ok("run", "-d", "--name", "marked", "marked")
    one = Cell.__new__(Cell)
    one.cli, one.name = tenant, "marked"
    mode = tenant.ok("exec", "marked", "stat", "-c", "%a", "/root/setuid")
    assert mode == "4755", "the control: the mark is there"
    for name in ("setuid", "caps2"):
        found = one.gets(privileges.after_exec, f"/root/{name}", user=NOBODY)
        assert found["uid"] == [65534] * 3 and int(found["CapPrm"], 16) == 0
    tenant.ok("rm", "-f", "marked")
    (tmp_path / "three.tar").write_bytes(tar(_with_capability("x", b"", b"\0\0\0\3" + bytes(20))))
    assert "file capabilities of an unknown revision" in tenant.fails(
        "image", "import", tmp_path / "three.tar", "three"
    )


def test_no_process_can_gain_capabilities(cell: Cell) -> None:
    """capset(2), the ambient set, securebits, setuid(0), an own ID map: for root and for the user nobody inside."""
    free = forked(lambda: privileges.more_capabilities())
    assert free["ambient"] == "" or free["capset"] == "" or free["setuid"] == "", "the control"
    root = cell.gets(privileges.more_capabilities)
    assert {root[way] for way in ("capset", "ambient", "forget no_new_privs", "map IDs")} <= {"EPERM", "EINVAL"}
    nobody = cell.gets(privileges.more_capabilities, user=NOBODY)
    assert set(nobody.values()) <= {"EPERM", "EINVAL", "EACCES"}, nobody


def test_exec_gives_root_no_more_capabilities(cell: Cell) -> None:
    """capabilities(7): exec by user 0 gives the whole bounding set; that set is Docker's, and it can't grow."""
    for program in ("/root/setuid", "/root/caps2", PYTHON):
        found = cell.gets(privileges.after_exec, program)
        assert int(found["CapBnd"], 16) == DEFAULT and int(found["CapPrm"], 16) & ~DEFAULT == 0
        assert (found["NoNewPrivs"], found["Seccomp"]) == ("1", "2")
        assert int(found["CapAmb"], 16) == 0 and int(found["CapInh"], 16) == 0
    free = forked(lambda: privileges.after_exec(PYTHON))
    assert int(free["CapPrm"], 16) & ~DEFAULT, "the control"  # type: ignore[call-overload]


def test_another_user_has_no_capabilities(cell: Cell) -> None:
    """`--user`: nothing permitted, nothing ambient; CVE-2022-24769 left an inheritable set, which file capabilities
    met."""
    found = cell.gets(processes.identity, user="1000:1000")
    assert [int(found[name], 16) for name in ("CapEff", "CapPrm", "CapInh", "CapAmb")] == [0] * 4
    assert found["uid"] == [1000] * 3


def test_a_user_namespace_inside(cell: Cell, cells: CellFactory, tenant: Cli) -> None:
    """Refused without CAP_SYS_ADMIN. With it a tenant gets one, as nested containers need: its root has fewer rights
    than root outside of it, so it gets no closer to the host."""
    assert cell.try_(privileges.nested).errno == "EPERM"
    strong = cells(tenant, "--cap-add", "SYS_ADMIN")
    found = strong.gets(privileges.nested)
    assert int(found["CapEff"], 16) == 0x1FFFFFFFFFF, "the control: it is one"
    assert found["mount"] == ""
    assert found["core_pattern"] in {"EACCES", "EROFS"}
    assert found["mknod"] in {"EPERM", "EOVERFLOW"} and found["chown"] in {"EPERM", "EINVAL"}
    assert found["NoNewPrivs"] == "1"


def test_all_capabilities_are_the_containers_own(cells: CellFactory, tenant: Cli) -> None:
    """`--cap-add ALL` gives each capability and no right on the host: the processes have an unprivileged uid there."""
    strong = cells(tenant, "--cap-add", "ALL")
    assert int(strong.gets(processes.identity)["CapEff"], 16) & (1 << privileges.CAP_SYS_ADMIN)
    assert os.stat(f"/proc/{strong.pid}").st_uid >= 65536


def _with_capability(name: str, data: bytes, value: bytes) -> Any:
    info, content = member(name, data, mode=0o755)
    info.pax_headers = {"SCHILY.xattr.security.capability": value.decode(errors="surrogateescape")}
    return info, content
