"""When an instance that ended is started again; docker-run(1) --restart. Pure decisions, no state."""

from __future__ import annotations

from insula.model.objects import Exit, Instance, RestartPolicy

FIRST = 0.1
LONGEST = 60.0
STEADY = 10.0
"""Seconds of running after which the waiting time starts anew."""


def delay(backoff: int) -> float:
    """Seconds to wait after `backoff` restarts without a steady run: 0.1 s, doubling to 60 s."""
    return float(min(LONGEST, FIRST * 2 ** min(backoff, 32)))


def after_exit(policy: RestartPolicy, ended: Exit, restarts: int) -> bool:
    """Whether an instance that the user wants running, and whose PID 1 ended so, runs again.

    `restarts` counts those since the user started it. An unknown exit status counts as failure, and so does a start
    that did not succeed.
    """
    if policy.name == "on-failure":
        return ended.exit_status != 0 and (policy.max_retries == 0 or restarts < policy.max_retries)
    return policy.name in ("always", "unless-stopped")


def after_boot(instance: Instance, *, started_before: bool) -> bool:
    """Whether it runs again after the host was rebooted, or taken down: `always` even if the user had stopped it,
    `on-failure` never, for nothing of its own failed."""
    name = instance.spec.restart.name
    if instance.wanted == "removed" or not started_before:
        return False
    return name == "always" or (name == "unless-stopped" and instance.wanted != "stopped")
