"""The steps of a guided tour: commands that are run, their output, and claims that are checked.

A claim that does not hold is marked and counted, and makes the tour fail.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from insula.cli.output import clean

LIBRARY = str(Path(__file__).parents[2])
_LAUNCH = f"import sys; sys.path.append({LIBRARY!r}); from insula.cli.main import main; sys.exit(main())"
WIDTH = 78


class CommandResult:
    """The exit status of a command, and its output on both streams, interleaved."""

    def __init__(self, status: int, text: str) -> None:
        self.status = status
        self.text = text

    @property
    def ok(self) -> bool:
        return self.status == 0


class Tour:
    """A tour: it prints the steps and counts the claims that do not hold."""

    def __init__(self, socket: str) -> None:
        self.socket = socket
        self.claims = 0
        self.failures: list[str] = []
        self._steps = 0

    def step(self, title: str, text: str = "") -> None:
        """Print a heading, and a sentence or two about the step."""
        self._steps += 1
        heading = f"── {self._steps}. {title} "
        print(f"\n{heading}{'─' * (WIDTH - len(heading))}")
        if text:
            print(text)

    def run(self, *words: str, quiet: bool = False, timeout: float = 120) -> CommandResult:
        """Print and run ``insula WORDS``, and print its output; with `quiet` nothing is printed."""
        if not quiet:
            print(f"\n$ insula {' '.join(map(shell_word, words))}", flush=True)
        command = [sys.executable, "-ISE", "-c", _LAUNCH, *words]
        environment = {**os.environ, "INSULA_SOCKET": self.socket}
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            timeout=timeout,
            start_new_session=True,  # Ctrl-C is for the tour, which then cleans up
        )
        text = done.stdout.decode("utf-8", "replace").rstrip("\n")
        if not quiet:
            for line in text.splitlines():
                print(f"  {clean(line)}")
            if done.returncode:
                print(f"  (exit status {done.returncode})")
            sys.stdout.flush()
        return CommandResult(done.returncode, text)

    def check(self, holds: bool, claim: str) -> bool:
        """Print whether `claim` holds, and record it if it does not."""
        self.claims += 1
        print(f"  {'✓' if holds else '✗ NOT SO:'} {claim}", flush=True)
        if not holds:
            self.failures.append(claim)
        return holds

    def summary(self) -> int:
        """Print the last line, and return the exit status."""
        print()
        if self.failures:
            print(f"{len(self.failures)} of {self.claims} claims did not hold:")
            for claim in self.failures:
                print(f"  ✗ {claim}")
            return 1
        print(f"All {self.claims} claims held.")
        return 0


def shell_word(word: str) -> str:
    """Quote `word` for a shell."""
    if word and all(character.isalnum() or character in "-_./:=,@%+" for character in word):
        return word
    return "'" + word.replace("'", "'\\''") + "'"


def fields(words: Sequence[object]) -> str:
    return ", ".join(map(str, words))
