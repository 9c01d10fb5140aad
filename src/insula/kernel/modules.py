"""Load modules of the kernel with modprobe(8), which knows where they are and what they need."""

from __future__ import annotations

import subprocess


def load(name: str) -> None:
    """Load a module. Nothing happens if it is loaded, if the kernel has it built in, or if it can't be had."""
    try:
        subprocess.run(
            ["modprobe", "-q", "--", name],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=30,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return
