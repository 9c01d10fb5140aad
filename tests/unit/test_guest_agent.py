"""The agent of QEMU in a guest, for the shim: what it answers is a stranger's word, and it may not answer at all."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest

from insula.kernel.event_loop import EventLoop
from insula.machine.shim import guest_agent
from insula.machine.shim.guest_agent import GuestAgent, GuestAtMoment
from tests.support.wait import until

Said = list[dict[str, Any]]


class Guest:
    """The other end: it answers each line that has come by `answer`."""

    def __init__(self, answer: Callable[[dict[str, Any]], bytes], *, is_open: bool = True) -> None:
        ours, self.socket = socket.socketpair()
        self.loop = EventLoop("test")
        self.answer, self.asked = answer, list[str]()
        self.agent = GuestAgent(ours, self.loop, lambda: is_open)
        self.ours = ours
        self._rest = b""
        self.socket.setblocking(False)
        self.loop.watch(self.socket.fileno(), lambda _: self._serve())

    def _serve(self) -> None:
        *lines, self._rest = (self._rest + self.socket.recv(1 << 16)).split(b"\n")
        for line in lines:
            request = json.loads(line)
            self.asked.append(request["execute"])
            self.send(self.answer(request))

    def send(self, data: bytes) -> None:
        with suppress(BlockingIOError):
            self.socket.send(data)

    def turn(self) -> bool:
        self.loop.turn(lambda: 0.01, lambda: None)
        return True

    def command(self, name: str = "guest-info", seconds: float = 60.0) -> dict[str, Any]:
        """The answer to a command."""
        said: Said = []
        self.agent.ask(name, {}, said.append, seconds)
        until(lambda: self.turn() and said, f"{name} is answered", 60.0, 0.0)
        return said[0]

    def close(self) -> None:
        self.socket.close()
        self.ours.close()
        self.loop._poll.close()


@pytest.fixture
def guests() -> Iterator[Callable[..., Guest]]:
    made: list[Guest] = []

    def make(answer: Callable[[dict[str, Any]], bytes], **options: Any) -> Guest:
        made.append(Guest(answer, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


def honest(request: dict[str, Any]) -> bytes:
    if request["execute"] == "guest-sync-delimited":
        return b"\xff" + json.dumps({"return": request["arguments"]["id"]}).encode() + b"\n"
    return json.dumps({"return": {"of": request["execute"]}}).encode() + b"\n"


def test_commands_are_answered_in_turn(guests: Callable[..., Guest]) -> None:
    guest, said = guests(honest), list[dict[str, Any]]()
    guest.send(b'{"return": "of an earlier question"}\n' * 10)
    for name in ("first", "second"):
        guest.agent.ask(name, {}, said.append)
    until(lambda: guest.turn() and len(said) == 2, "both are answered", 60.0, 0.0)
    assert said == [{"return": {"of": "first"}}, {"return": {"of": "second"}}]
    assert guest.asked == ["guest-sync-delimited", "first", "guest-sync-delimited", "second"]


def test_without_an_agent_nothing_is_sent_or_waited_for(guests: Callable[..., Guest]) -> None:
    guest = guests(honest, is_open=False)
    assert guest.command() == {"error": "there is no agent"}
    assert guest.asked == []


def deep(_: dict[str, Any]) -> bytes:
    return b"\xff" + b"[" * 60_000 + b"\n"


HOSTILE: dict[str, Callable[[dict[str, Any]], bytes]] = {
    "silent": lambda _: b"",
    "another id": lambda _: b'\xff{"return": 1}\n',
    "no json": lambda _: b"\xff\xff\xfe{{{\n",
    "no object": lambda _: b"\xff[1]\n",
    "nested": deep,
    "without end": lambda _: b"x" * (guest_agent.MAX_LINE + 2),
    "no delimiter": lambda request: honest(request).lstrip(b"\xff"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_one_that_does_not_answer_is_left_alone(what: str, guests: Callable[..., Guest]) -> None:
    guest = guests(HOSTILE[what])
    guest.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    assert "error" in guest.command(seconds=0.3)
    asked = len(guest.asked)
    guest.answer = honest
    assert guest.command() == {"error": "the agent does not answer"}, "for a while"
    assert len(guest.asked) == asked
    guest.agent.insist("guest-fsfreeze-thaw", lambda _: None)
    until(lambda: guest.turn() and "guest-fsfreeze-thaw" in guest.asked, "but it is told to thaw", 60.0, 0.0)


def test_nothing_is_read_between_commands(guests: Callable[..., Guest]) -> None:
    """A guest that sends without end is stopped, and takes no time of the shim."""
    guest = guests(honest)
    guest.command()
    with pytest.raises(BlockingIOError):
        while True:
            guest.socket.send(b"flood\n" * 1000)
    for _ in range(100):
        guest.turn()
    with pytest.raises(BlockingIOError):
        guest.socket.send(b"flood\n" * 1000)
    assert "error" in guest.command(seconds=0.3), "and what comes then is dropped, line by line"


@pytest.mark.parametrize("freeze", [True, False])
def test_file_systems_are_frozen_and_thawed(freeze: bool, guests: Callable[..., Guest]) -> None:
    """For the disk alone; the time is told when they are thawed, since an agent takes nothing else before."""
    guest, said = guests(honest), list[dict[str, Any]]()
    moment = GuestAtMoment(guest.agent, guest.loop, freeze=freeze)
    for number, verb in enumerate(("freeze", "identity", "thaw"), 1):
        moment.ask(verb, {}, said.append)
        until(lambda n=number: guest.turn() and len(said) == n, verb, 60.0, 0.0)  # type: ignore[misc]
    frozen = ["guest-fsfreeze-freeze", "guest-fsfreeze-thaw"] if freeze else []
    assert [each for each in guest.asked if "sync" not in each] == [*frozen, "guest-set-time"]
    assert said == [{}, {}, {}], "no answer of an agent counts"
