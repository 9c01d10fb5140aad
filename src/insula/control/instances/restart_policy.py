"""Restart policies: whether and when an ended instance is started again, as docker-run(1) --restart. Pure functions."""

from __future__ import annotations

from insula.model.objects import Exit, Instance, RestartPolicy

FIRST = 0.1
LONGEST = 60.0
STEADY = 10.0
"""Seconds of running after which the delay begins at `FIRST` again."""


def delay(backoff: int) -> float:
    """Seconds to wait after `backoff` restarts without a steady run: 0.1 s, doubling to 60 s."""
    return float(min(LONGEST, FIRST * 2 ** min(backoff, 32)))


def after_exit(policy: RestartPolicy, ended: Exit, restarts: int) -> bool:
    """Whether an instance whose desired state is running is started again after this exit of its PID 1.

    `restarts` is the number of restarts since the user started it. An unknown exit status counts as a failure, and so
    does a failed start.
    """
    if policy.name == "on-failure":
        return ended.exit_status != 0 and (policy.max_retries == 0 or restarts < policy.max_retries)
    return policy.name in ("always", "unless-stopped")


def after_boot(instance: Instance, *, started_before: bool) -> bool:
    """Whether it is started again after a reboot of the host or `insula down`. `always` does so even if the user had
    stopped it; `on-failure` never does, since the instance did not fail."""
    name = instance.spec.restart.name
    if instance.wanted == "removed" or not started_before:
        return False
    return name == "always" or (name == "unless-stopped" and instance.wanted != "stopped")
