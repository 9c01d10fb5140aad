"""`insula-oci`: finds the verb, imports its file and nothing else, and turns errors into lines and exit statuses.

Exit status: 0; 1 for any error, as engines expect, of `exec` 255; `run` and `exec`, when they wait, end as their
process did.
An error is one line on stderr. With --log it is also a line of that file, where engines look for the cause.
"""

from __future__ import annotations

import os
import sys

from insula.model.errors import InsulaError
from insula.oci import log
from insula.oci.commands import COMMANDS, GLOBAL, IN_ORDER, table
from insula.oci.options import CommandLineError, VerbArguments, assign, parse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from insula.oci.options import Table

DEFAULT_ROOT = "/run/insula-oci"
NEAR = {"create", "run", "exec"}
"""The verbs whose process is visible in a container, and so must run a sealed copy of the interpreter."""


def main(words: Sequence[str] | None = None) -> int:
    """The command's entry point; returns the exit status."""
    given = VerbArguments()
    try:
        status = _run(list(sys.argv[1:] if words is None else words), given)
        if sys.stdout:  # the caller may have closed it
            sys.stdout.flush()
        return status
    except InsulaError as error:
        message = f"{error.message}; hint: {error.hint}" if error.hint else error.message
        log.error(message, given)
        return _status(given, error.exit_status)
    except OSError as error:
        about = f"{error.filename}: " if error.filename else ""
        log.error(f"{about}{error.strerror or error}", given)
        return _status(given)
    except KeyboardInterrupt:
        return 130


def _status(given: VerbArguments, own: int | None = None) -> int:
    """The exit status for an error. For `exec` it is 255, to tell it from that of its process; see runc-exec(8)."""
    return 255 if getattr(given, "verb", "") == "exec" else own or 1


def _run(asked: list[str], given: VerbArguments) -> int:
    words = parse(GLOBAL, asked, given, in_order=True)
    given.debug = given.debug or given.log_level == "debug"
    if given.version:
        return _version()
    if given.help or words in ([], ["help"]):
        return _overview()
    if given.log:
        log.open_file(given)
    verb, *words = words
    if verb == "help":
        verb, words = words[0], ["--help"]
    if verb not in COMMANDS:
        if words and words[0] in ("-h", "--help"):
            raise CommandLineError(f"No help topic for {verb[:60]!r}", f"one of {', '.join(COMMANDS)}")
        raise CommandLineError(f"there is no verb {verb[:60]!r}", f"one of {', '.join(COMMANDS)}")
    given.named_root = bool(given.root)
    given.root = os.path.abspath(given.root or _default_root())
    given.systemd_cgroup = given.systemd_cgroup or given.cgroup_manager == "systemd"
    given.verb = verb
    arguments = VerbArguments()
    vars(arguments).update(vars(given))
    words = parse(table(verb), words, arguments, in_order=verb in IN_ORDER)
    if arguments.help:
        return _help(verb)
    assign(COMMANDS[verb][0], words, arguments)
    if verb in NEAR and sys.argv[1:] == asked:
        from insula.kernel import sealed

        sealed.ensure()
    run = __import__(f"insula.oci.verbs.{verb}", fromlist=["run"]).run
    status: int = run(arguments)
    return status


def _default_root() -> str:
    own = os.environ.get("XDG_RUNTIME_DIR") if os.geteuid() else None
    return f"{own}/insula-oci" if own else DEFAULT_ROOT


def _program() -> str:
    """The name of the command: runc or crun, if this program is installed under that name."""
    name = os.path.basename(sys.argv[0])
    return name if name in ("runc", "crun") else "insula-oci"


def _version() -> int:
    """Print the version in runc's form, which dockerd and containerd parse; as crun with a line of features."""
    from insula import __version__
    from insula.oci.state import OCI_VERSION

    name = _program()
    print(f"{name} version {__version__}\ncommit: insula-{__version__}\nspec: {OCI_VERSION}")
    if name == "crun":
        print("+SYSTEMD +SELINUX +APPARMOR +CAP +SECCOMP +EBPF")
    return 0


def _overview() -> int:
    name = _program()
    lines = ["NAME:", f"   {name} - Open Container Initiative runtime (Insula's)", ""]
    lines += ["USAGE:", f"   {name} [OPTIONS] VERB …", "", "COMMANDS:"]
    lines += [f"  {verb:10}  {help_}" for verb, (_, help_, _) in COMMANDS.items()]
    print("\n".join([*lines, "", "OPTIONS:", *_describe(GLOBAL)]))
    return 0


def _help(verb: str) -> int:
    usage, help_, _ = COMMANDS[verb]
    name = _program()
    lines = ["NAME:", f"   {name} {verb} - {help_}", "", "USAGE:", f"   {name} {verb} [OPTIONS] {usage}"]
    print("\n".join([*lines, "", "OPTIONS:", *_describe(table(verb))]))
    return 0


def _describe(options: Table) -> list[str]:
    return [f"  {text:40}  {help_}" for text, help_ in options]


if __name__ == "__main__":
    sys.exit(main())
