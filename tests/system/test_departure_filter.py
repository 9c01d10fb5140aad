"""A process that becomes the user's program with a seccomp filter: its rights until then and after, and who listens."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from insula.container.departure import Filter
from insula.kernel import capabilities as caps
from insula.kernel import seccomp
from insula.kernel.seccomp_load import SECCOMP_FILTER_FLAG_NEW_LISTENER
from tests.system.test_departure import SOME, USER, Refused, became, sets_of

ALLOWED = Filter(seccomp.compile({"defaultAction": "SCMP_ACT_ALLOW"}))


@pytest.mark.parametrize("restricted", [True, False])
def test_who_waits_for_the_word_has_what_its_program_will_have(restricted: bool, tmp_path: Path) -> None:
    """But for what loading a filter takes, which it doesn't with no_new_privs (seccomp(2))."""
    wanted, found = caps.to_mask(["CHOWN"]), tmp_path / "found"

    def wait() -> None:
        now = caps.current()
        found.write_text(f"{now.effective} {now.permitted}")

    options: dict[str, Any] = {"capabilities": SOME, "noNewPrivileges": restricted, "wait": wait}
    for program in (ALLOWED, None):
        became("true", program=program, **options)
        more = caps.to_mask(["SYS_ADMIN"]) if program and not restricted else 0
        assert found.read_text() == f"{wanted | more} {wanted | more}"


@pytest.mark.parametrize("restricted", [True, False])
def test_the_program_has_what_was_asked_with_a_filter_too(restricted: bool) -> None:
    """Without no_new_privs it is loaded while there is a right more, which is given up after it."""
    sets = ("bounding", "effective", "permitted", "inheritable", "ambient")
    options: dict[str, Any] = {"capabilities": {name: ["CAP_CHOWN"] for name in sets}, "noNewPrivileges": restricted}
    for user in (0, USER):
        status = became("cat /proc/self/status", program=ALLOWED, user={"uid": user}, **options)
        assert sets_of(status) == caps.Capabilities(*[caps.to_mask(["CHOWN"])] * 5)


def test_who_listens_to_a_filter_is_given_its_descriptor(tmp_path: Path) -> None:
    program = Filter(seccomp.compile({"defaultAction": "SCMP_ACT_ALLOW"}), SECCOMP_FILTER_FLAG_NEW_LISTENER)
    found = tmp_path / "found"

    def listen(fd: int) -> None:
        found.write_text(os.readlink(f"/proc/self/fd/{fd}"))

    became("true", program=program, listener=listen)
    assert "seccomp notify" in found.read_text()
    with pytest.raises(Refused, match="load the seccomp filter: nobody listens to its notifications"):
        became("true", program=program)
