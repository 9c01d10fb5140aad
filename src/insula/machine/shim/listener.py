"""Serves the shim's socket: a connection for each program that is executed in the container and stands for one in the
guest (client.py), whose first message has its streams as descriptors; and one for each question of insulad."""

from __future__ import annotations

from insula.machine.shim.connection import listen

TYPE_CHECKING = False
if TYPE_CHECKING:
    from insula.machine.shim.connection import ShimConnection, ShimMessage
    from insula.machine.shim.main import Shim
    from insula.machine.shim.questions import Questions
    from insula.machine.shim.sessions import ProgramSession


class Listener:
    """Has programs run by `shim`, and questions answered by `questions`."""

    def __init__(self, shim: Shim, questions: Questions) -> None:
        self._shim, self._questions = shim, questions

    def listen(self) -> None:
        """Accept connections from now on. OSError."""
        listen(self._shim.loop, self._serve)

    def _serve(self, connection: ShimConnection, session: ProgramSession | None = None) -> None:
        """Take messages of a connection, with the program that it is for."""
        connection.watch(lambda: self._on_message(connection, session))

    def _on_message(self, connection: ShimConnection, session: ProgramSession | None) -> None:
        message = connection.receive()
        if message is None:
            self._on_end(connection, session)
        elif "ask" in message.content:
            self._questions.answer(message)
        elif session is None:
            self._run(message)
        elif "signal" in message.content:
            session.forward(message.content["signal"])

    def _run(self, message: ShimMessage) -> None:
        if session := self._shim.run(message):
            self._serve(message.connection, session)

    def _on_end(self, connection: ShimConnection, session: ProgramSession | None) -> None:
        connection.close()
        self._shim.forget(connection)
        self._questions.forget(connection)
        if session:
            session.kill()
