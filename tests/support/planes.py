"""Settings of control planes that tests run themselves."""

from __future__ import annotations

from insula.model.machine_settings import MachineSettings

NO_TEMPLATE = MachineSettings(template="0")
"""No machine is booted in advance, which takes seconds of a processor."""
