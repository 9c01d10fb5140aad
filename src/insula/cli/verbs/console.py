"""insula console: the screen, keyboard and pointer of a virtual machine, for a VNC viewer."""

from __future__ import annotations

from insula.cli.connection import connect
from insula.cli.options import Arguments, Command, Option, UsageError
from insula.cli.output import warn
from insula.cli.viewers import PrivateSocket, loopback, serve

TYPE_CHECKING = False
if TYPE_CHECKING:
    from insula.client.attachment import Attachment


def run(arguments: Arguments) -> int:
    client = connect(arguments)
    name = arguments.name

    def view() -> Attachment:
        return client.instances.vnc(arguments.tenant, name)

    view().close()  # what is wrong is told now, and not when a viewer comes
    if arguments.port is not None:
        if arguments.listen:
            raise UsageError("--port and --listen can't be used together", "leave out one of them")
        with loopback(arguments.port) as listener:
            port = listener.getsockname()[1]
            print(f"127.0.0.1:{port}", flush=True)
            warn("note: every user and program of this machine can connect there, and see and use the screen")
            _hint(f"127.0.0.1::{port}")
            serve(listener, view)
        return 0
    place = PrivateSocket(arguments.listen, f"{name}.vnc")
    with place as listener:
        print(place.path, flush=True)
        _hint(place.path)
        serve(listener, view)
    return 0


def _hint(where: str) -> None:
    warn(f"view it in another terminal: vncviewer {where}; Ctrl-C ends this")


def _port(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text) < 1 << 16):
        raise UsageError(f"{text[:60]!r} is no port", "use 1 to 65535, or 0 for a free one")
    return int(text)


COMMANDS = {
    "console": Command(
        run,
        "Serve the screen, keyboard and pointer of a virtual machine to VNC viewers, at a unix socket.",
        "NAME",
        [
            Option("--listen", "the path of the socket (one in a new directory)", "PATH", complete="file"),
            Option(
                "--port",
                "a TCP port on 127.0.0.1 in its place: every user of this machine can connect to it",
                "PORT",
                parse=_port,
            ),
        ],
        complete={"NAME": "instance"},
        details="It prints where it listens, and goes on until Ctrl-C. Nobody else can open the socket.\n"
        "Machines of disk images have a screen. The serial console is that of `insula attach`.",
    ),
}
