"""The health check of an instance, from the settings of its user and of its image. Pure functions.

A running process may not work: it hangs, or has lost its database. So a command is run in the instance periodically,
and its exit status determines the health. Images can define a check (dockerfile, HEALTHCHECK). Docker's rules apply:

    starting    from the start until a check succeeds
    healthy     after a check that succeeded
    unhealthy   after `retries` failures in a row; failures in the start period are not counted

Each field that the user sets replaces that of the image, and the others are kept.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from insula.model import rules
from insula.model.errors import Invalid
from insula.model.objects import Healthcheck
from insula.model.units import shorten

SHELL: Final = "/bin/sh"
LEAST: Final = rules.MIN_CHECK
"""The minimum of seconds between checks, because each starts a process on the host."""
_LONGEST: Final = rules.MAX_CHECK
_DEFAULTS: Final = {"interval": 30.0, "timeout": 30.0, "start_period": 0.0, "start_interval": 5.0}


class HealthPlan(NamedTuple):
    """A complete health check: the `command` to execute; times in seconds."""

    command: list[str]
    interval: float
    timeout: float
    retries: int
    start_period: float
    start_interval: float

    def pause(self, status: str, age: float) -> float:
        """Return the seconds until the next check of an instance that was started `age` seconds ago."""
        early = status == "starting" and age < self.start_period
        return min(self.interval, self.start_interval) if early else self.interval


def plan(own: Healthcheck | None, image: Healthcheck | None) -> HealthPlan | None:
    """Return the health check of an instance, None if neither user nor image define one. Invalid."""
    own, image = own or Healthcheck(), image or Healthcheck()
    test = own.test if own.test is not None else image.test or []
    values = {
        name: next((v for v in (getattr(own, name), getattr(image, name)) if v is not None), default)
        for name, default in _DEFAULTS.items()
    }
    for name, value in values.items():
        words = name.replace("_", " ")
        least = 0.0 if name == "start_period" else LEAST
        if not least <= value <= _LONGEST:
            what = f"a health check's {words} can't be {shorten(value)} seconds"
            raise Invalid(what, f"use {least:g}s to 24h")
    retries = next((n for n in (own.retries, image.retries) if n is not None), 3)
    if not 1 <= retries <= rules.MAX_CHECK_RETRIES:
        raise Invalid(f"a health check can't have {shorten(retries)} retries", "use 1 to 1000")
    command = _command(test)
    return None if command is None else HealthPlan(command, retries=retries, **values)


def _command(test: list[str]) -> list[str] | None:
    kind, *words = test or ["NONE"]
    if kind == "NONE":
        return None
    if kind == "CMD" and words and words[0]:
        return words
    if kind == "CMD-SHELL" and len(words) == 1 and words[0]:
        return [SHELL, "-c", words[0]]
    raise Invalid(
        f"a health check can't be {shorten(test)}", 'write ["CMD", PROGRAM, …], ["CMD-SHELL", LINE] or ["NONE"]'
    )
