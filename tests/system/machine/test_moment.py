"""Guests that go on from the memory and the disk of one moment: what their programs see, and what is their own."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from insula.machine.guest import initramfs
from insula.machine.qemu import root
from tests.support.guests import TRIES, Guest, Guests, Moment
from tests.support.wait import until

UNSEEDED = """\
import os
from insula.agent import identity, root
from insula.agent.channel import Channel
drawn = []
reseed, renew, hold = identity.reseed, root.renew_machine_id, Channel.hold
def draw(seed):
    if drawn:
        drawn[0] = os.getrandom(16).hex()
    else:
        reseed(seed)
identity.reseed = draw
Channel.hold = lambda self: (drawn.append(os.getrandom(16).hex()), hold(self))[1]
root.renew_machine_id = lambda machine: renew(drawn[0])
main()
"""
"""Instead of mixing in random numbers from the host, the agent of a copy draws one, which the program finds as
/etc/machine-id. The kernel mixes in the time whenever the last time is some seconds ago, so it has just done that when
the machine is held still."""
ASKED = """\
mine=$(cat /proc/sys/kernel/random/uuid); echo ready
while read -r _; do echo $mine $(cat /proc/sys/kernel/random/uuid) $(hostname) $(cat /etc/machine-id); done
"""
"""A program that has drawn a random number, and draws another one when it is asked."""


def ask(guest: Guest) -> list[str]:
    assert guest.process.stdin is not None
    guest.process.stdin.write("\n")
    guest.process.stdin.flush()
    return guest.line().split()


def copies(guests: Guests) -> list[list[str]]:
    """What the programs of a guest and of two copies of it say."""
    with guests.start("sh", "-c", ASKED, hostname="first") as guest:
        assert guest.line() == "ready\n"
        ask(guest)
        moment = guest.moment()
        told = [ask(guest)]
    for name in ("second", "third"):
        with guests.start(moment=moment, hostname=name) as copy:
            told.append(ask(copy))
    return told


def test_copies_draw_numbers_of_their_own(guests: Guests) -> None:
    told = copies(guests)
    assert len({each[0] for each in told}) == 1, "what was drawn before is the same"
    assert len({each[1] for each in told}) == len({each[3] for each in told}) == 3
    assert [each[2] for each in told] == ["first", "second", "third"]


def test_copies_without_fresh_random_numbers_are_equal(guests_kernel: Path, tmp_path: Path) -> None:
    """What the test above would see if the agent did not mix in what the host gives. It is tried again: the kernel of a
    guest that takes long mixes in something by itself."""
    init = initramfs.INIT.replace("\nmain()\n", f"\n{UNSEEDED}")
    assert init != initramfs.INIT
    unseeded = Guests(tmp_path, guests_kernel, init)
    try:
        tried = (copies(unseeded) for _ in range(TRIES))
        assert any(second[3] == third[3] for _, second, third in tried)
    finally:
        unseeded.close()


def test_output_is_neither_lost_nor_torn(guests: Guests) -> None:
    """A program that writes as fast as it can: a copy goes on where it was, and so does the guest itself."""
    script = "i=0; while :; do i=$((i + 1)); echo $i; done"
    with guests.start("sh", "-c", script) as guest:
        before = [int(guest.line()) for _ in range(500)]
        moment = guest.moment()
        before += [int(guest.line()) for _ in range(20000)]
    assert before == [*range(1, len(before) + 1)]
    with guests.start(moment=moment) as copy:
        after = [int(copy.line()) for _ in range(2000)]
        status, out, _ = copy.execute("sh", "-c", "cat; exit 5", given="given\n")
        assert (status, out) == (5, "given\n")
    assert after == [*range(after[0], after[0] + 2000)]
    assert 500 < after[0] <= len(before) + 1


def test_a_signal_and_the_end_are_those_of_the_copy(guests: Guests) -> None:
    trap = "trap 'echo ended; exit 4' TERM; echo ready; while :; do sleep 0.1; done"
    with guests.start("sh", "-c", trap) as guest:
        assert guest.line() == "ready\n"
        moment = guest.moment()
        for _ in range(2):  # a guest may be held still again
            moment = guest.moment()
        with guests.start(moment=moment) as copy:
            until(lambda: copy.execute("sh", "-c", "exit 6")[0] == 6, "it goes on")
            guests.oci.ok("kill", copy.name, "TERM")
            assert copy.line() == "ended\n" and copy.process.wait(300) == 4
        assert guest.execute("sh", "-c", "exit 5")[0] == 5, "the guest goes on"


def test_a_moment_of_a_moment(guests: Guests) -> None:
    """A copy can be copied again; other programs that run go on without anybody at their streams: what they print is
    not taken for the output of those that are executed in the copy, with the same number."""
    with guests.start("sh", "-c", ASKED) as guest:
        assert guest.line() == "ready\n"
        what = json.dumps(guests.process("sh", "-c", "while :; do echo x; date > /alive; sleep 0.05; done"))
        command = guests.oci.command("exec", guest.name, root.SHIM, "exec", what)
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as other:
            guest.execute("sh", "-c", "until [ -e /alive ]; do sleep 0.1; done")
            moment: Moment = guest.moment()
            other.kill()
    drawn = set()
    for _ in range(3):
        with guests.start(moment=moment) as copy:
            drawn.add(ask(copy)[1])
            for _ in range(2):  # one of them has the number that the other program had
                assert copy.execute("sh", "-c", "cat; sleep 0.3; exit 5", given="own\n")[:2] == (5, "own\n")
            copy.execute("sh", "-c", "busybox rm /alive; until [ -e /alive ]; do sleep 0.1; done")
            moment = copy.moment()
            drawn.add(ask(copy)[1])
    assert len(drawn) == 6
