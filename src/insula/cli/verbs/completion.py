"""insula completion: scripts for bash, zsh and fish, which all ask ``insula __complete`` for candidates.

Candidates come from the verbs' tables. Names of tenants, networks, images and instances come from the daemon, and are
left out if it doesn't respond quickly.
"""

from __future__ import annotations

from collections.abc import Iterable

from insula.cli.options import GLOBAL, Arguments, Command, Option, UsageError
from insula.cli.output import clean
from insula.client import Client
from insula.model.errors import InsulaError

BASH = """\
# bash completion of insula: source it, or put it into /usr/share/bash-completion/completions/insula
_insula() {
    local cur=${COMP_WORDS[COMP_CWORD]} line
    COMPREPLY=()
    while IFS= read -r line; do
        if [[ $line == :file ]]; then
            while IFS= read -r line; do
                compopt -o filenames 2>/dev/null
                COMPREPLY+=("$line")
            done < <(compgen -f -- "$cur")
        else
            [[ $line == *: ]] && compopt -o nospace 2>/dev/null
            COMPREPLY+=("$line")
        fi
    done < <("${COMP_WORDS[0]}" __complete -- "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null)
}
complete -F _insula insula
"""
ZSH = """\
#compdef insula
# zsh completion of insula: put it into a directory of $fpath as _insula, or source it
_insula() {
    local -a candidates
    candidates=("${(@f)$("${words[1]}" __complete -- "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    if (( ${candidates[(Ie):file]} )); then
        _files
        candidates=("${(@)candidates:#:file}")
    fi
    compadd -- "${(@)candidates:#}"
}
if [ "$funcstack[1]" = "_insula" ]; then _insula "$@"; else compdef _insula insula; fi
"""
FISH = """\
# fish completion of insula: put it into ~/.config/fish/completions/insula.fish
function __insula_complete
    set -l words (commandline -opc) (commandline -ct)
    for candidate in ($words[1] __complete -- $words[2..-1] 2>/dev/null)
        if test "$candidate" = ":file"
            __fish_complete_path (commandline -ct)
        else
            echo $candidate
        end
    end
end
complete -c insula -f -a '(__insula_complete)'
"""
SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}


def script(arguments: Arguments) -> int:
    if arguments.shell not in SCRIPTS:
        raise UsageError(f"there is no completion for {arguments.shell[:60]!r}", "bash, zsh or fish")
    print(SCRIPTS[arguments.shell], end="")
    return 0


def complete(arguments: Arguments) -> int:
    """Print the candidates for the last of the words, one a line; ``:file`` means file names."""
    *before, current = arguments.word or [""]
    try:
        for candidate in sorted(set(candidates(before, current))):
            print(candidate)
    except (InsulaError, UsageError):
        pass  # nothing to offer is no error at a prompt
    return 0


def candidates(before: list[str], current: str) -> Iterable[str]:
    """Return the candidates for `current` after the words `before`."""
    given = _Words(before)
    offered: Iterable[str]
    if given.option is not None:
        offered = _values(given.option.complete, given)
    elif current.startswith("-") and not given.closed:
        if "=" in current and (option := given.known.get(current.partition("=")[0])):
            name = current.partition("=")[0]
            offered = [f"{name}={value}" for value in _values(option.complete, given) if value != ":file"]
        else:
            offered = [name for option in given.options for name in option.names if name.startswith("--")]
    elif given.command is None:
        offered = given.verbs
    else:
        offered = _values(given.argument(), given)
    return [word for word in offered if word == ":file" or word.startswith(current)]


class _Words:
    """The state after the words before the cursor: the verb, the argument, an option without its value yet."""

    def __init__(self, words: list[str]) -> None:
        from insula.cli.main import VERBS, load

        self.command: Command | None = None
        self.verbs: list[str] = list(VERBS)
        self.options: list[Option] = list(GLOBAL)
        self.values: dict[str, str] = {}
        self.option: Option | None = None  # it waits for its value
        self.closed = False  # options have ended
        self.count = 0  # arguments so far
        family: dict[str, Command] = {}
        for word in words:
            if self.option is not None:
                self.values[self.option.key] = word
                self.option = None
            elif word == "--" and not self.closed:
                self.closed = True
            elif word.startswith("-") and len(word) > 1 and not self.closed:
                self._option(word)
            elif self.command is None:
                found = family.get(word) if family else load(word)
                if isinstance(found, Command):
                    self.command = found
                    self.options = found.options + GLOBAL
                elif found:
                    family = found
                    self.verbs = list(family)
                else:
                    raise UsageError(f"no verb {word!r}")
            else:
                self.count += 1
                self.closed = self.closed or self.command.rest

    @property
    def known(self) -> dict[str, Option]:
        return {name: option for option in self.options for name in option.names}

    def _option(self, word: str) -> None:
        name, equals, value = word.partition("=")
        option = self.known.get(name if word.startswith("--") else "-" + word[-1])
        if option is not None and option.value is not None:
            if equals:
                self.values[option.key] = value
            else:
                self.option = option

    def argument(self) -> tuple[str, ...] | str:
        """Return the kind of the argument at the cursor."""
        assert self.command is not None
        arguments = self.command.arguments
        if not arguments or (self.count >= len(arguments) and not arguments[-1].many):
            return ()
        name = arguments[min(self.count, len(arguments) - 1)].name
        return self.command.complete.get(name, ())


def _values(kind: tuple[str, ...] | str, given: _Words) -> list[str]:
    """Return the words of `kind`; names of objects come from the daemon, within half a second."""
    if isinstance(kind, tuple):
        return list(kind)
    if kind == "file":
        return [":file"]
    from os import environ

    client = Client(given.values.get("socket"), timeout=0.5)
    tenant = given.values.get("tenant") or environ.get("INSULA_TENANT") or "default"
    try:
        if kind == "tenant":
            found = [view["tenant"]["name"] for view in client.tenants.list()]
        elif kind == "network":
            found = [*(view["network"]["name"] for view in client.networks.list(tenant)), "none"]
        elif kind == "policy":
            found = [view["policy"]["name"] for view in client.policies.list(tenant)]
        elif kind == "group":
            found = [group["name"] for group in client.address_groups.list(tenant)]
        elif kind == "router":
            found = [view["router"]["name"] for view in client.routers.list(tenant)]
        elif kind == "floating-ip":
            found = [view["floating_ip"]["name"] for view in client.floating_ips.list(tenant)]
        elif kind == "load-balancer":
            found = [view["name"] for view in client.load_balancers.list(tenant)]
        elif kind == "image":
            found = [image["name"].removesuffix(":latest") for image in client.images.list(tenant)]
        else:
            found = [view["instance"]["name"] for view in client.instances.list(tenant)]
    except OSError:
        return []
    names = [clean(name) for name in found]
    if kind == "container":
        return [f"container:{name}" for name in names]
    return [f"{name}:" for name in names] + [":file"] if kind == "instance:path" else names


COMMANDS = {
    "completion": Command(
        script,
        "Print a completion script.",
        "SHELL",
        details="As in: source <(insula completion bash)",
        complete={"SHELL": ("bash", "zsh", "fish")},
    ),
    "__complete": Command(complete, "Candidates for the last word of a command line.", "[WORD...]", rest=True),
}
