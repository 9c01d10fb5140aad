"""The shim's conversations with the agent: what belongs to none of them is dropped. The memory of a machine that goes
on in another QEMU has programs of conversations that are over, whose numbers may be used again."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from insula.agent.channel import Channel
from insula.agent.programs import RunningProgram
from insula.kernel.event_loop import EventLoop
from insula.machine import protocol
from insula.machine.shim.agent import AgentConnection
from tests.support.wait import patiently

OLD = 900


@contextmanager
def connected() -> Iterator[tuple[AgentConnection, socket.socket]]:
    """A connection of the shim, and the agent's end of it."""
    ours, agent = socket.socketpair()
    with ours, agent:
        agent.settimeout(patiently(10))
        connection = AgentConnection(ours.fileno(), EventLoop("shim"), lambda: pytest.fail("it is lost"))
        yield connection, agent
        connection.loop.unwatch(ours.fileno())


def frames(agent: socket.socket, count: int) -> list[tuple[int, int, bytes]]:
    decoder, found = protocol.FrameDecoder(), list[tuple[int, int, bytes]]()
    while len(found) < count:
        found += decoder.feed(agent.recv(1 << 16))
    return found


def message(session: int, kind: int, **value: Any) -> bytes:
    return protocol.encode(session, kind, json.dumps(value).encode())


def test_an_answer_is_that_of_its_own_question() -> None:
    with connected() as (connection, agent):
        agent.sendall(
            message(0, protocol.HELLO, version=1)
            + message(OLD, protocol.REPLY, generation="old")
            + protocol.encode(OLD, protocol.STDOUT, b"old")
            + message(OLD, protocol.ERROR, step="old", error="old")
        )
        answering = threading.Timer(0.1, lambda: agent.sendall(message(1, protocol.REPLY, generation="new")))
        answering.start()
        assert connection.request("identity", generation="new") == {"generation": "new"}
        answering.join()
        [(session, kind, asked)] = frames(agent, 1)
        assert (session, kind, json.loads(asked)) == (1, protocol.REQUEST, {"verb": "identity", "generation": "new"})


def test_output_of_other_conversations_goes_nowhere() -> None:
    read, write = os.pipe()
    ended = list[Any]()
    with open(os.devnull, "rb") as nothing, open(read, "rb") as output, connected() as (connection, agent):
        session = connection.run("exec", {}, [nothing.fileno(), write, write], ended.append)
        connection.serve()
        for number, text in ((OLD, b"old"), (protocol.NOBODY, b"of nobody"), (session.number, b"own")):
            agent.sendall(protocol.encode(number, protocol.STDOUT, text))
        agent.sendall(message(OLD, protocol.EXIT, status=9) + message(session.number, protocol.EXIT, status=5))
        connection.loop.turn(lambda: 0.0, lambda: None)
        assert ended == [{"status": 5}]
        os.close(write)
        assert output.read() == b"own"


def test_a_program_whose_host_is_gone_talks_to_nobody() -> None:
    """Its number may be that of another program now."""
    ours, host = socket.socketpair()
    with ours, host:
        os.set_blocking(ours.fileno(), False)
        host.settimeout(patiently(10))
        program = RunningProgram(4, Channel(ours.fileno()), EventLoop("agent"))
        program.pid = 1
        program.reply()
        program.abandon()
        program.reply()
        assert [each[0] for each in frames(host, 2)] == [4, protocol.NOBODY]
