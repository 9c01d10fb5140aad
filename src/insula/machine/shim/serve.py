"""Be process 1 of a container: serve a machine, which was started before, as the plan says what kind it is."""

from __future__ import annotations

import os

from insula.kernel.event_loop import EventLoop
from insula.machine.shim.agent import AgentError
from insula.machine.shim.common import FORWARDED, RESIZED
from insula.machine.shim.disk_machine import DiskMachineQuestions, DiskMachineShim
from insula.machine.shim.kept import KeptQuestions, KeptShim
from insula.machine.shim.listener import Listener
from insula.machine.shim.main import Shim
from insula.machine.shim.qmp import QmpError
from insula.machine.shim.questions import Questions
from insula.machine.shim.start import KeptGuest
from insula.model.cpython import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from insula.machine.shim.start import StartedQemu


def main(started: StartedQemu | KeptGuest) -> NoReturn:
    """Be process 1 of the container."""
    loop = EventLoop("shim")
    shim, questions = _kind(started, loop)
    read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    for number in (*FORWARDED, RESIZED):
        signal.signal(number, lambda *_: None)

    def forward(_: int) -> None:
        for number in os.read(read, 64):
            shim.forward(number)

    loop.watch(read, forward)
    try:
        Listener(shim, questions).listen()
        shim.start()
    except (QmpError, AgentError, OSError, TimeoutError) as error:
        os.write(2, f"the machine can't be started: {error}\n".encode())
        shim.finish()
    loop.run()


def _kind(started: StartedQemu | KeptGuest, loop: EventLoop) -> tuple[Shim, Questions]:
    """What serves a machine of this kind."""
    if isinstance(started, KeptGuest):
        kept = KeptShim(started, loop)
        return kept, KeptQuestions(kept)
    if "disk_machine" in started.plan:
        disk_machine = DiskMachineShim(started, loop)
        return disk_machine, DiskMachineQuestions(disk_machine)
    shim = Shim(started, loop)
    return shim, Questions(shim)
