"""Capabilities are really dropped, as the kernel reports them."""

from __future__ import annotations

import os
import socket
import subprocess

from hypothesis import given, settings
from hypothesis import strategies as st

from insula.kernel import capabilities as caps
from insula.kernel import syscalls
from tests.forked import errno_of, forked

DEFAULT = caps.Capabilities(caps.DEFAULT, caps.DEFAULT, caps.DEFAULT)
EPERM = 1


def status(name: str) -> int:
    """A capability mask of this process from /proc/self/status."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1], 16) for line in file if line.startswith(f"{name}:"))


def proc_sets() -> tuple[int, ...]:
    return tuple(status(name) for name in ("CapBnd", "CapEff", "CapPrm", "CapInh", "CapAmb"))


def test_current_sets_match_proc() -> None:
    assert tuple(caps.current()) == proc_sets()
    assert caps.current().effective  # else this test runs without root and shows nothing


def test_root_keeps_only_the_default_set() -> None:
    def child() -> tuple[tuple[int, ...], int, int, int]:
        before = errno_of(lambda: socket.sethostname(os.uname().nodename))  # the same name: harmless
        caps.before_setuid(DEFAULT)
        caps.after_setuid(DEFAULT)
        return (
            proc_sets(),
            before,
            errno_of(lambda: socket.sethostname(os.uname().nodename)),
            errno_of(lambda: os.chown("/proc/self/cwd", -1, -1)),
        )

    sets, before, sethostname, chown = forked(child)
    assert sets == (caps.DEFAULT, caps.DEFAULT, caps.DEFAULT, 0, 0)
    assert before == 0
    assert sethostname == EPERM
    assert chown == 0


def test_requested_capabilities_survive_setuid() -> None:
    sets = caps.Capabilities(caps.DEFAULT, caps.to_mask(["KILL"]), caps.to_mask(["KILL", "CHOWN"]))

    def child() -> tuple[int, ...]:
        caps.before_setuid(sets)
        os.setgroups([])
        os.setgid(1234)
        os.setuid(1234)
        caps.after_setuid(sets)
        return proc_sets()

    assert forked(child) == (*sets,)


def test_setuid_clears_capabilities_without_keepcaps() -> None:
    """The positive control of the test above: the two phases are needed."""

    def child() -> int:
        os.setuid(1234)
        return errno_of(lambda: caps.after_setuid(DEFAULT))

    assert forked(child) == EPERM


def test_exec_cannot_exceed_the_bounding_set() -> None:
    def child() -> tuple[int, int]:
        def bounded() -> None:
            caps.before_setuid(DEFAULT)
            caps.after_setuid(DEFAULT)

        def effective(preexec: bool) -> int:
            done = subprocess.run(
                ["/bin/grep", "CapEff", "/proc/self/status"],
                preexec_fn=bounded if preexec else None,
                capture_output=True,
                check=True,
            )
            return int(done.stdout.split()[1], 16)

        return effective(False), effective(True)

    before, after = forked(child)
    assert before & caps.to_mask(["SYS_ADMIN"])
    assert after == caps.DEFAULT


def test_ambient_capabilities_survive_exec_of_another_user() -> None:
    kill = caps.to_mask(["KILL"])
    sets = caps.Capabilities(kill, kill, kill, kill, kill)

    def child() -> int:
        def lower() -> None:
            caps.before_setuid(sets)
            os.setuid(1234)
            caps.after_setuid(sets)

        done = subprocess.run(
            ["/bin/grep", "CapEff", "/proc/self/status"], preexec_fn=lower, capture_output=True, check=True
        )
        return int(done.stdout.split()[1], 16)

    assert forked(child) == kill


def test_capabilities_that_the_process_lacks_are_an_error() -> None:
    def child() -> int:
        caps.before_setuid(DEFAULT)
        caps.after_setuid(DEFAULT)
        return errno_of(lambda: caps.after_setuid(caps.Capabilities(caps.ALL, caps.ALL, caps.ALL)))

    assert forked(child) == EPERM


def test_keepcaps_is_off_afterwards() -> None:
    def child() -> int:
        caps.before_setuid(DEFAULT)
        caps.after_setuid(DEFAULT)
        return syscalls.prctl(7)  # PR_GET_KEEPCAPS

    assert forked(child) == 0


MASKS = st.integers(0, caps.ALL)


@settings(max_examples=25, deadline=None)
@given(MASKS, MASKS, MASKS, MASKS, MASKS)
def test_any_sets_are_granted_as_far_as_permitted(
    bounding: int, effective: int, permitted: int, inheritable: int, ambient: int
) -> None:
    """Granted capabilities are effective, to the last of the 41; missing ones are reported; no more are given."""
    wanted = caps.Capabilities(bounding, effective, permitted, inheritable, ambient)

    def child() -> tuple[tuple[int, ...], int, tuple[int, ...], tuple[int, ...]]:
        have = caps.current()
        granted, missing = wanted.grantable()
        caps.before_setuid(granted)
        caps.after_setuid(granted)
        assert tuple(caps.current()) == proc_sets()
        return tuple(granted), missing, proc_sets(), tuple(have)

    granted, missing, got, have = forked(child)
    assert got == (bounding & have[0], *granted[1:])
    assert granted[2] == permitted & have[2]
    assert granted[1] == effective & granted[2]
    assert granted[3] == inheritable & (have[3] | have[2] & bounding)
    assert granted[4] == ambient & granted[2] & granted[3]
    lost = [asked & ~given for asked, given in zip(wanted, granted, strict=True)]
    assert missing == lost[0] | lost[1] | lost[2] | lost[3] | lost[4]


def test_no_process_is_granted_a_capability_that_it_lacks() -> None:
    def child() -> tuple[tuple[int, ...], int]:
        caps.before_setuid(DEFAULT)
        caps.after_setuid(DEFAULT)
        every = caps.Capabilities(caps.ALL, caps.ALL, caps.ALL, caps.ALL, caps.ALL)
        granted, missing = every.grantable()
        return tuple(granted), missing

    granted, missing = forked(child)
    assert granted == (caps.ALL, *[caps.DEFAULT] * 4)
    assert missing == caps.ALL & ~caps.DEFAULT


def test_capabilities_between_the_two_phases() -> None:
    """The sets themselves and CAP_SYS_ADMIN, with which a filter is loaded; and without it, no more than there is."""
    admin = caps.to_mask(["SYS_ADMIN"])
    sets = caps.Capabilities(caps.DEFAULT, caps.to_mask(["KILL"]), caps.to_mask(["KILL", "CHOWN"]))

    def child() -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        caps.before_setuid(sets)
        caps.keep_sys_admin(sets)
        kept = proc_sets()
        caps.after_setuid(sets)
        without = proc_sets()
        caps.keep_sys_admin(sets)
        return kept, without, proc_sets()

    kept, without, again = forked(child)
    assert kept == (sets.bounding, sets.effective | admin, sets.permitted | admin, 0, 0)
    assert without == again == tuple(sets)


def test_the_bounding_set_needs_a_right_only_if_there_is_something_to_drop() -> None:
    def child() -> tuple[int, int, tuple[int, ...]]:
        less = caps.Capabilities(caps.DEFAULT)
        caps.before_setuid(less)
        caps.after_setuid(less)
        again = errno_of(lambda: caps.before_setuid(less))
        more = errno_of(lambda: caps.before_setuid(caps.Capabilities(caps.to_mask(["KILL"]))))
        return again, more, proc_sets()

    again, more, sets = forked(child)
    assert (again, more) == (0, EPERM)
    assert sets == (caps.DEFAULT, 0, 0, 0, 0)
