"""Dangerous system calls; `attacks.kernel` says what each would give.

Three things stop them, and each alone would: the seccomp filter refuses the call before the kernel looks at it, root in
the container has no such capability, and what it has counts in its own user namespace only.
"""

from __future__ import annotations

import pytest

from tests.support.cli import Cli
from tests.support.daemon import Daemon
from tests.system.escape.attacks import kernel
from tests.system.escape.cell import Cell, End, unguarded
from tests.system.escape.conftest import CellFactory

NOT_THERE = {"ENOSYS", "EAFNOSUPPORT"}
REFUSAL = {"EPERM", "ENOSYS", "ESOCKTNOSUPPORT", "ENOPROTOOPT"}


@pytest.fixture(scope="module")
def ends(cell: Cell) -> dict[str, End]:
    found = cell.ends(*((attack,) for attack in kernel.REFUSED))
    return {attack.__name__: end for attack, end in zip(kernel.REFUSED, found, strict=True)}


@pytest.mark.parametrize("attack", kernel.REFUSED, ids=lambda attack: attack.__name__)
def test_dangerous_calls_are_refused(attack: kernel.Call, ends: dict[str, End]) -> None:
    """Refused as such; the host's root gets what it wants, or another errno, since it asks with impossible
    arguments."""
    control, end = unguarded(attack), ends[attack.__name__]
    if control == end and (control.errno in NOT_THERE or control.signal):
        pytest.skip(f"this kernel has no such thing to attack: {control.why or control.signal}")
    assert control.errno != "EPERM", "the control"
    assert end.errno in REFUSAL or end.signal == "SIGSYS", end


def test_a_file_by_its_handle(cell: Cell, cells: CellFactory, tenant: Cli, daemon: Daemon) -> None:
    """ "Shocker" (Docker before 1.0): from a file that is bound from the host's disk, as /etc/hosts is, any other there
    by its inode's number. The capability must count in the first user namespace: a tenant may ask for it in vain."""
    (daemon.path / "secret").write_text("secret")
    handle = kernel.handle_of(str(daemon.path / "secret"))
    assert unguarded(kernel.file_by_handle, handle, str(daemon.root)).value == "secret", "the control"
    assert (daemon.path / "secret").stat().st_dev == cell.gets(kernel.device_of, "/etc/hosts")
    strong = cells(tenant, "--cap-add", "DAC_READ_SEARCH")
    for one in (cell, strong):
        assert one.try_(kernel.file_by_handle, handle, "/etc/hosts").errno == "EPERM"
