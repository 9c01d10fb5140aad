"""A process that executes the user's program with a seccomp filter: its rights before and after, and the agent."""

from __future__ import annotations

import os
import re
import resource
from pathlib import Path
from typing import Any

import pytest

from insula.container.create.exec_process import Filter
from insula.kernel import capabilities as caps
from insula.kernel import syscalls
from insula.kernel.seccomp import compiler
from insula.kernel.seccomp.load import SECCOMP_FILTER_FLAG_NEW_LISTENER
from tests.system.test_exec_process import SOME, USER, Refused, became, sets_of

PR_GET_DUMPABLE = 3
ALLOWED = Filter(compiler.compile({"defaultAction": "SCMP_ACT_ALLOW"}))


@pytest.mark.parametrize("restricted", [True, False])
def test_a_created_process_has_the_attributes_of_its_program(restricted: bool, tmp_path: Path) -> None:
    """But for what loading a filter takes, which it doesn't with no_new_privs (seccomp(2))."""
    wanted, found = caps.to_mask(["CHOWN"]), tmp_path / "found"

    def wait() -> None:
        now = caps.current()
        found.write_text(f"{now.effective} {now.permitted} {syscalls.prctl(PR_GET_DUMPABLE)}")

    options: dict[str, Any] = {"capabilities": SOME, "noNewPrivileges": restricted, "wait": wait}
    for program in (ALLOWED, None):
        became("true", program=program, **options)
        more = caps.to_mask(["SYS_ADMIN"]) if program and not restricted else 0
        assert found.read_text() == f"{wanted | more} {wanted | more} 0"  # and nobody may look into it


@pytest.mark.parametrize("restricted", [True, False])
def test_attributes_are_set_with_a_filter_too(restricted: bool) -> None:
    """Without no_new_privs it is loaded while there is a right more, which is given up after it."""
    sets = ("bounding", "effective", "permitted", "inheritable", "ambient")
    options: dict[str, Any] = {"capabilities": {name: ["CAP_CHOWN"] for name in sets}, "noNewPrivileges": restricted}
    for user in (0, USER):
        status = became("cat /proc/self/status", program=ALLOWED, user={"uid": user}, **options)
        assert sets_of(status) == caps.Capabilities(*[caps.to_mask(["CHOWN"])] * 5)


def test_start_container_hooks_have_the_attributes_of_the_program(tmp_path: Path) -> None:
    found = tmp_path / "found"

    def last(environment: dict[str, str]) -> None:
        found.write_text(f"{caps.current().effective} {environment['A']}")

    became("true", program=ALLOWED, env=["PATH=/bin", "A=b"], capabilities=SOME, last=last)
    assert found.read_text() == f"{caps.to_mask(['CHOWN'])} b"


@pytest.mark.skipif(
    not caps.current().effective & caps.to_mask(["SYS_RESOURCE"]), reason="even root may not raise a limit here"
)
def test_limits_are_raised_before_the_right_is_dropped() -> None:
    number = resource.RLIMIT_SIGPENDING

    def lower() -> None:
        resource.setrlimit(number, (100, 100))

    asked = [{"type": "RLIMIT_SIGPENDING", "soft": 150, "hard": 200}]
    shown = became("cat /proc/self/limits", before=lower, rlimits=asked, capabilities=SOME)
    assert re.search(r"Max pending signals +150 +200 ", shown)


def test_the_memory_policy_is_set_for_the_program() -> None:
    policy = {"mode": "MPOL_BIND", "nodes": "0"}
    assert " bind:0 " in became("cat /proc/self/numa_maps", memory_policy=policy)
    assert " bind:0 " not in became("cat /proc/self/numa_maps")


def test_the_agent_of_a_filter_gets_its_descriptor(tmp_path: Path) -> None:
    program = Filter(compiler.compile({"defaultAction": "SCMP_ACT_ALLOW"}), SECCOMP_FILTER_FLAG_NEW_LISTENER)
    found = tmp_path / "found"

    def listen(fd: int) -> None:
        found.write_text(os.readlink(f"/proc/self/fd/{fd}"))

    became("true", program=program, listener=listen)
    assert "seccomp notify" in found.read_text()
    with pytest.raises(Refused, match="load the seccomp filter: no process receives its notifications"):
        became("true", program=program)
