"""The program `insula`: it finds the verb, imports its file, and converts errors to messages and exit statuses.

Exit status: 0; 1 for an error; 2 for a wrong command line; 125 for a failure of the engine in `run` and `exec`, which
otherwise exit as the instance's process (126: it can't be executed, 127: it does not exist).
"""

from __future__ import annotations

import sys

from insula.cli.options import GLOBAL, Command, UsageError, describe, help_text, nearest, parse, split_global
from insula.cli.output import error
from insula.model.cpython import signal
from insula.model.errors import InsulaError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import NoReturn

VERBS: Mapping[str, tuple[str, str]] = {
    # verb: (file below cli/verbs, one line of help)
    "run": ("run", "create and start an instance from an image"),
    "ps": ("ps", "list instances"),
    "exec": ("exec", "run another command in a running instance"),
    "logs": ("logs", "show what an instance has printed"),
    "attach": ("attach", "connect the terminal to a running instance"),
    "start": ("lifecycle", "start stopped instances"),
    "stop": ("lifecycle", "stop instances: their stop signal, then SIGKILL"),
    "restart": ("lifecycle", "stop and start instances"),
    "pause": ("lifecycle", "freeze instances"),
    "unpause": ("lifecycle", "resume paused instances"),
    "update": ("update", "change limits and labels of an instance while it runs"),
    "kill": ("lifecycle", "send a signal to instances"),
    "wait": ("lifecycle", "block until instances exit, and print their exit statuses"),
    "rename": ("lifecycle", "give an instance another name"),
    "rm": ("lifecycle", "remove instances"),
    "migrate": ("migrate", "move a virtual machine to another host while it runs"),
    "snapshot": ("snapshot", "make, list, restore and remove snapshots of virtual machines"),
    "fork": ("fork", "make copies of a virtual machine that runs, with its memory"),
    "cp": ("cp", "copy files between an instance and the host"),
    "export": ("export", "write an instance's root file system into a tar"),
    "console": ("console", "the screen, keyboard and pointer of a virtual machine, for a VNC viewer"),
    "screenshot": ("screenshot", "a picture of the screen of a virtual machine"),
    "inspect": ("inspect", "everything about an object, as JSON"),
    "stats": ("stats", "usage of instances: processor, memory, network, disk, and waiting times"),
    "usage": ("usage", "what tenants have used and reserved over time"),
    "top": ("top", "the processes of an instance, inside and on the host"),
    "explain": ("explain", "what makes an instance isolated"),
    "whois": ("whois", "the instance and tenant of a process on the host"),
    "whoami": ("whoami", "who you are, and your roles"),
    "user": ("user", "create, bind, list and remove users and service accounts"),
    "token": ("token", "create, list and revoke tokens, which prove who sends a request"),
    "certificate": ("certificate", "create, list and revoke certificates of clients, for HTTPS"),
    "login": ("login", "log in at a remote host by OpenID Connect"),
    "logout": ("login", "end a login"),
    "remote": ("remote", "use Insula on other machines, by HTTPS"),
    "tenant": ("tenant", "create, update, list, show and remove tenants"),
    "network": ("network", "create, change, list, show and remove networks"),
    "endpoint": ("endpoint", "addresses in a network that lead to instances of other tenants"),
    "peer": ("peer", "agree with other tenants that networks reach each other"),
    "policy": ("policy", "create, update, list, show and remove policies: which connections are allowed"),
    "group": ("group", "create, update, list, show and remove address groups for policies"),
    "router": ("router", "join networks, and set routes between them"),
    "floating-ip": ("floating_ip", "external addresses that lead to instances"),
    "lb": ("load_balancer", "load balancers: spread connections over instances that pass a check"),
    "guarantee": ("guarantee", "promise and limit bandwidth, promise CPU and memory"),
    "port": ("port", "list, plug and unplug connections of instances to networks"),
    "disk": ("disk", "add, list and remove further disks of virtual machines"),
    "image": ("image", "pull, push, load, save, import, build, list and remove images"),
    "apply": ("apply", "make everything as files declare it"),
    "diff": ("diff", "show what `apply` would change"),
    "dump": ("dump", "print what there is as a file for `apply`"),
    "trace": ("trace", "whether one end reaches another, and why or why not"),
    "verify": ("verify", "prove the isolation: compare wanted, installed and measured reachability"),
    "status": ("status", "the state of this host"),
    "doctor": ("doctor", "check this host's requirements"),
    "events": ("events", "watch changes"),
    "audit": ("audit", "show requests with their users and results"),
    "demo": ("demo", "the guided tour on live instances"),
    "down": ("down", "stop everything, insulad too, and clean the host; the state is kept"),
    "completion": ("completion", "print a completion script for bash, zsh or fish"),
}
HIDDEN = {
    "__complete": ("completion", "candidates for the words of a command line"),
    "resume": ("lifecycle", "the same as unpause"),
}
ELSEWHERE = {
    # words of Docker, Podman and Incus, and the verb here
    "images": "image ls",
    "rmi": "image rm",
    "pull": "image pull",
    "push": "image push",
    "load": "image load",
    "save": "image save",
    "import": "image import",
    "build": "image import",
    "networks": "network ls",
    "routers": "router ls",
    "policies": "policy ls",
    "groups": "group ls",
    "acl": "policy ls",
    "firewall": "policy ls",
    "peerings": "peer ls",
    "endpoints": "endpoint ls",
    "floating-ips": "floating-ip ls",
    "balancer": "lb ls",
    "tenants": "tenant ls",
    "project": "tenant ls",
    "ls": "ps",
    "list": "ps",
    "launch": "run -d",
    "create": "run -d",
    "delete": "rm",
    "remove": "rm",
    "shell": "exec -it",
    "info": "status",
}


def execute() -> NoReturn:
    """Run the program `insula`. It ends with _exit(2), because freeing all objects takes 2 to 5 ms."""
    from os import _exit

    status = main()  # has flushed the standard output
    try:
        sys.stderr.flush()
    finally:
        _exit(status)


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line `words`, by default that of the process, and return the exit status."""
    if words is None:  # we are the process
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `insula … | head` ends as quietly as any other Unix command
    try:
        status = _run(list(sys.argv[1:] if words is None else words))
        sys.stdout.flush()
    except UsageError as problem:
        error(problem.message, problem.hint or "see `insula --help`")
        return 2
    except InsulaError as problem:
        error(problem.message, problem.hint)
        return 1
    except OSError as problem:  # for example a full disk for the output
        error(f"{problem.filename or 'insula'}: {problem.strerror or problem}", "check the destination of the output")
        return 1
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)  # so that a calling shell notices the interruption
        return 130
    return status


def _run(words: list[str]) -> int:
    given, rest = split_global(words)
    if given.version or rest[:1] == ["version"]:
        from insula import __version__

        print(f"insula {__version__}")
        return 0
    if rest[:1] == ["help"] and rest[1:]:
        given.help, rest = True, rest[1:]
    if not rest or rest[0] == "help":
        print(overview())
        return 0 if given.help or rest else 2
    name, command, rest = find(rest, help_wanted=given.help)
    if command is None:
        return 0
    try:
        arguments = parse(command, name, rest, given)
        if arguments.help:
            print(help_text(name, command))
            return 0
        arguments.named_tenant = arguments.tenant
        if arguments.tenant is None:
            from os import environ

            arguments.tenant = environ.get("INSULA_TENANT") or "default"
        arguments.verb = name
        return command.run(arguments)
    except UsageError as problem:
        raise UsageError(problem.message, problem.hint or f"see `insula {name} --help`") from None


def find(words: list[str], *, help_wanted: bool = False) -> tuple[str, Command | None, list[str]]:
    """Find the command at the start of `words`; returns it, its full name, and the remaining words.

    None after printing the overview of a family (`insula tenant --help`).
    """
    verb, rest = words[0], words[1:]
    commands = load(verb)
    if isinstance(commands, Command):
        return verb, commands, rest
    if (help_wanted and not rest) or (rest and rest[0] in ("-h", "--help", "help")):
        print(f"usage: insula {verb} VERB …\n")
        print("\n".join(f"  {name:10}  {command.help}" for name, command in commands.items()))
        print(f"\n`insula {verb} VERB --help` says more")
        return verb, None, rest
    if not rest or rest[0] not in commands:
        what = f"{verb} has no verb {rest[0][:60]!r}" if rest else f"{verb} needs a verb"
        hint = f"one of {', '.join(commands)}"
        raise UsageError(what, f"{hint}; or `insula inspect NAME`" if rest[:1] == ["inspect"] else hint)
    return f"{verb} {rest[0]}", commands[rest[0]], rest[1:]


def load(verb: str) -> Command | dict[str, Command]:
    """Load the command table of a verb, or of a family of verbs. UsageError for an unknown verb."""
    entry = VERBS.get(verb) or HIDDEN.get(verb)
    if entry is None:
        known = ELSEWHERE.get(verb) or nearest(verb, VERBS)
        raise UsageError(f"there is no verb {verb[:60]!r}", known and f"did you mean `insula {known}`?")
    module = __import__(f"insula.cli.verbs.{entry[0]}", fromlist=["COMMANDS"])
    commands: dict[str, Command] = module.COMMANDS
    return commands.get(verb, commands)


def overview() -> str:
    """Return the output of ``insula --help``."""
    lines = [
        "usage: insula [-T TENANT] VERB …",
        "",
        "A cloud for many tenants on the machines that you already have.",
        "",
    ]
    lines += [f"  {verb:10}  {summary}" for verb, (_, summary) in VERBS.items()]
    lines += ["", "for every verb:", *describe(GLOBAL)]
    return "\n".join([*lines, "", "`insula --version` shows the version, `insula VERB --help` the options of a verb"])


if __name__ == "__main__":
    execute()
