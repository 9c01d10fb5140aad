"""insula exec: run another process in a running instance."""

from __future__ import annotations

from insula.cli.connection import connect
from insula.cli.options import Arguments, Command, Option
from insula.cli.output import error
from insula.cli.terminal import DETACH_KEYS, detach_keys, interact, require_terminal, terminal_size
from insula.cli.verbs.run import ENGINE_FAILURE, environment
from insula.model.errors import InsulaError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def run(arguments: Arguments) -> int:
    spec = {
        "env": environment(arguments.env, arguments.env_file),
        "user": arguments.user,
        "working_dir": arguments.workdir,
        "tty": arguments.tty,
        "stdin": arguments.interactive,
    }
    if arguments.tty and (size := terminal_size()):
        spec["console_size"] = dict(zip(("rows", "columns"), size, strict=True))
    try:
        if arguments.detach:
            return _detached(arguments, {**spec, "stdin": False})
        if arguments.tty and arguments.interactive:
            require_terminal()
        with connect(arguments).instances.exec(arguments.tenant, arguments.name, arguments.cmd, **spec) as attachment:
            status = interact(attachment, stdin=arguments.interactive, tty=arguments.tty, keys=arguments.detach_keys)
    except InsulaError as problem:
        error(problem.message, problem.hint)
        return problem.exit_status or ENGINE_FAILURE
    return 0 if status is None else status


def _detached(arguments: Arguments, spec: dict[str, Any]) -> int:
    client = connect(arguments)
    made = client.instances.exec_detached(arguments.tenant, arguments.name, arguments.cmd, **spec)
    if arguments.json:
        from insula.cli.output import print_json

        print_json(made)
    return 0


COMMANDS = {
    "exec": Command(
        run,
        "Run CMD in the running instance NAME, with its isolation and its environment.",
        "NAME CMD...",
        [
            Option("-d --detach", "run it in the background; its output is discarded"),
            Option("-i --interactive", "connect our standard input"),
            Option("-t --tty", "give it a terminal"),
            Option(
                "--detach-keys", "keys that detach and leave it running", "KEYS", default=DETACH_KEYS, parse=detach_keys
            ),
            Option("-e --env", "set a variable; without a value, to its value here", "NAME[=VALUE]", many=True),
            Option("--env-file", "set the variables in a file: NAME=VALUE a line", "FILE", many=True, complete="file"),
            Option("-u --user", "run as this user: name or number, with :group", "USER"),
            Option("-w --workdir", "start in this directory", "PATH"),
        ],
        rest=True,
        complete={"NAME": "instance"},
        details="Exit status: CMD's own (125: the engine failed, 126: CMD can't be executed, 127: CMD does not exist).",
    )
}
