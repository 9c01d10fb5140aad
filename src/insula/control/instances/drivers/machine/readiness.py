"""Whether a machine runs: its agent has answered with the random number that this machine was given, and its program is
executed. Until then it is starting, however slow it is."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from insula.control.instances.drivers.machine.shim import ask, failure
from insula.kernel import records
from insula.model.errors import Failed, InsulaError, NotFound

_READY: Final = "ready"
_AGAIN, _MOST_AGAIN = 0.005, 0.1  # seconds between attempts to reach the shim of a machine that is starting
_PATIENCE: Final = 5.0  # seconds for a machine that was paused to take an identity, before it is starting again


class Generation:
    """The generation that a machine was given, and whether it has answered with it: a record in its directory.

    The record has the number, and behind it "ready" if the machine has taken it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def give(self, number: str) -> None:
        """Record that the machine is given another one. OSError."""
        records.replace(self._path, number.encode())

    @property
    def is_taken(self) -> bool:
        """Whether the machine has answered with it. Also if there is no record, as machines of an older insulad have
        none; but not if it is damaged."""
        words = self._words()
        return words is None or words[1:] == [_READY]

    def is_given(self, answered: str) -> bool:
        """Whether this is the number that the machine was given."""
        number, *_ = self._words() or [""]
        return bool(number) and answered == number

    def take(self, answered: str) -> None:
        """Record that the machine has answered. Failed if it has answered with another one."""
        if not self.is_given(answered):
            what = "the machine answers with the identity of another one"
            raise Failed(what, "it may be a copy of one that runs; remove it and make another")
        records.replace(self._path, f"{answered} {_READY}".encode())

    def _words(self) -> list[str] | None:
        """What is in the record; None if there is none."""
        try:
            return records.read(self._path).decode("ascii").split()
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError):
            return []


class MachineReadiness:
    """The readiness of machines, by the records in the `directory` of each, and why programs could not be executed."""

    def __init__(
        self,
        directory: Callable[[str], Path],
        netns: Callable[[str], int],
        question: Callable[[str], dict[str, Any]],
        gone_on: Callable[[str], object],
    ) -> None:
        """`netns` opens the network namespace of a machine's container, or raises NotFound. `question` is what a
        machine is asked, `gone_on` is called when it runs with its own disk. Both block."""
        self._directory, self._netns, self._question, self._gone_on = directory, netns, question, gone_on
        self._failures: dict[str, InsulaError] = {}

    def give(self, instance_id: str) -> str:
        """Give a machine another number, and return it. OSError."""
        number = os.urandom(16).hex()
        self._generation(instance_id).give(number)
        return number

    def is_ready(self, instance_id: str) -> bool:
        return self._generation(instance_id).is_taken

    async def wait(self, instance_id: str) -> bool:
        """Wait for that. False if the machine has ended, or if its program can't be executed, which `failure` tells.
        Failed if another machine answers."""
        generation, pause = self._generation(instance_id), _AGAIN
        while not generation.is_taken:
            try:
                question = await asyncio.to_thread(self._question, instance_id)
                answer = await ask(self._netns(instance_id), question)
            except NotFound:
                return False
            if answer is None:
                await asyncio.sleep(pause)
                pause = min(2 * pause, _MOST_AGAIN)
            elif "failed" in answer:
                self._failures[instance_id] = failure(answer["failed"])
                return False
            else:
                taken = str(answer.get("generation"))
                if generation.is_given(taken):
                    await asyncio.to_thread(self._gone_on, instance_id)
                generation.take(taken)
        return True

    async def renew(self, instance_id: str, number: str) -> None:
        """Have a machine that was stopped meanwhile take another identity, with that number. If it takes long, `wait`
        goes on. Failed if another machine answers."""
        with contextlib.suppress(NotFound, TimeoutError):
            async with asyncio.timeout(_PATIENCE):
                answer = await ask(self._netns(instance_id), {"ask": "identity", "generation": number})
                if answer and "generation" in answer:
                    self._generation(instance_id).take(str(answer["generation"]))

    def failure(self, instance_id: str) -> InsulaError | None:
        """Why the program of the latest start could not be executed, if that is so."""
        return self._failures.get(instance_id)

    def forget(self, instance_id: str) -> None:
        """Forget that, before another start, or with the instance."""
        self._failures.pop(instance_id, None)

    def _generation(self, instance_id: str) -> Generation:
        return Generation(self._directory(instance_id) / "generation")
