"""The shim of a guest that a hypervisor of type 1 keeps: it talks with the agent over the guest's console.

There is no QEMU in the container. insulad has the hypervisor turn the guest off when the shim has ended. When the guest
is off its console ends, and then the shim does.
"""

from __future__ import annotations

import os

from insula.machine.console import ConsoleCoding
from insula.machine.shim.main import Shim
from insula.machine.shim.questions import Questions, RefusedQuestion

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from insula.kernel.event_loop import EventLoop
    from insula.machine.shim.connection import ShimMessage
    from insula.machine.shim.start import KeptGuest


class KeptShim(Shim):
    """Serves one guest. The plan has a `channel`."""

    off = 60.0  # it is not this process that ends it

    def __init__(self, guest: KeptGuest, loop: EventLoop) -> None:
        super().__init__(guest, loop, ConsoleCoding())

    def start(self) -> None:
        """Have the program run, as soon as the guest has booted. AgentError, OSError."""
        self.readiness.did("shim")
        self.agent.wait_for_hello()  # until then its terminal takes some bytes for itself
        self.readiness.did("boot")
        self.begin()

    def finish(self) -> NoReturn:
        """End this process with the status of the guest's program."""
        os._exit(self.status)


class KeptQuestions(Questions):
    """Answers for one guest, but for what is asked of QEMU."""

    def __init__(self, shim: KeptShim) -> None:
        super().__init__(shim)
        of_agent = ("ready", "started", "answers", "identity", "end", "back")
        self.verbs |= {verb: _refuse for verb in self.verbs if verb not in of_agent}


def _refuse(message: ShimMessage) -> None:
    raise RefusedQuestion("this hypervisor has no snapshots, and no devices that come and go")
