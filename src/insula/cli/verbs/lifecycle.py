"""insula start, stop, restart, pause, unpause, kill, wait, rm: each for any number of instances; `each` for others."""

from __future__ import annotations

from collections.abc import Callable

from insula.cli.connection import connect
from insula.cli.options import Arguments, Command, Option
from insula.cli.output import clean, error, print_json
from insula.client import Client
from insula.model.errors import InsulaError
from insula.model.units import parse_duration, parse_signal


def each(act: Callable[[Client, Arguments, str], object], argument: str = "name") -> Callable[[Arguments], int]:
    """Make a verb that does `act` for each value of an argument, NAME by default, and prints the result; it continues
    after an error (exit status 1)."""

    def run(arguments: Arguments) -> int:
        client = connect(arguments)
        status, results = 0, {}
        for name in getattr(arguments, argument):
            try:
                results[name] = act(client, arguments, name)
            except InsulaError as problem:
                error(problem.message, problem.hint)
                status = 1
            else:
                if not arguments.json:
                    print(results[name] if arguments.verb == "wait" else clean(name), flush=True)
        if arguments.json:
            print_json(results)
        return status

    return run


def start(client: Client, arguments: Arguments, name: str) -> object:
    return client.instances.start(arguments.tenant, name, cold=arguments.cold)


def stop(client: Client, arguments: Arguments, name: str) -> object:
    return client.instances.stop(arguments.tenant, name, arguments.timeout)


def restart(client: Client, arguments: Arguments, name: str) -> object:
    return client.instances.restart(arguments.tenant, name, arguments.timeout)


def pause(client: Client, arguments: Arguments, name: str) -> object:
    return client.instances.pause(arguments.tenant, name)


def unpause(client: Client, arguments: Arguments, name: str) -> object:
    return client.instances.unpause(arguments.tenant, name)


def kill(client: Client, arguments: Arguments, name: str) -> None:
    client.instances.kill(arguments.tenant, name, arguments.signal)


def wait(client: Client, arguments: Arguments, name: str) -> object:
    return client.instances.wait(arguments.tenant, name)["exit_status"]


def remove(client: Client, arguments: Arguments, name: str) -> None:
    client.instances.remove(arguments.tenant, name, force=arguments.force)


def signal_name(text: str) -> str:
    """`text` if it is a signal, as ``TERM``, ``SIGTERM``, ``15`` or ``RTMIN+3``. Raises Invalid."""
    parse_signal(text)
    return text


def rename(arguments: Arguments) -> int:
    view = connect(arguments).instances.rename(arguments.tenant, arguments.name, arguments.new_name)
    print_json(view) if arguments.json else print(clean(view["instance"]["name"]))
    return 0


SIGNALS = ("TERM", "KILL", "HUP", "INT", "QUIT", "USR1", "USR2", "WINCH", "STOP", "CONT")
_NAME = {"NAME": "instance"}
_TIME = Option(
    "-t --timeout", "how long to wait before SIGKILL (as given to `run --stop-timeout`)", "TIME", parse=parse_duration
)

_UNPAUSE = Command(each(unpause), "Resume paused instances.", "NAME...", complete=_NAME)

COMMANDS = {
    "start": Command(
        each(start),
        "Start stopped instances.",
        "NAME...",
        [Option("--cold", "boot a virtual machine, also where it would go on from a snapshot")],
        complete=_NAME,
    ),
    "stop": Command(each(stop), "Stop instances: their stop signal, then SIGKILL.", "NAME...", [_TIME], complete=_NAME),
    "restart": Command(each(restart), "Stop and start instances.", "NAME...", [_TIME], complete=_NAME),
    "pause": Command(
        each(pause),
        "Freeze all processes of instances: they keep their memory, and get no processor time.",
        "NAME...",
        details="Until `insula unpause`. A paused instance can be stopped, killed and removed (-f), but nothing can\n"
        "be executed in it; signals that don't end it wait until it goes on.",
        complete=_NAME,
    ),
    "unpause": _UNPAUSE,
    "resume": _UNPAUSE,
    "kill": Command(
        each(kill),
        "Send a signal to PID 1 of instances.",
        "NAME...",
        [
            Option(
                "-s --signal", "the signal (SIGKILL)", "SIGNAL", default="SIGKILL", parse=signal_name, complete=SIGNALS
            )
        ],
        complete=_NAME,
    ),
    "wait": Command(
        each(wait), "Block until instances exit, and print their exit statuses.", "NAME...", complete=_NAME
    ),
    "rename": Command(
        rename,
        "Give the instance NAME another name, while it runs too.",
        "NAME NEW-NAME",
        details="The new name resolves at once, and the old one no longer; its host name changes with the next start.",
        complete=_NAME,
    ),
    "rm": Command(
        each(remove),
        "Remove instances with their files.",
        "NAME...",
        [Option("-f --force", "kill it first if it runs")],
        complete=_NAME,
    ),
}
