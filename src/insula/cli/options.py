"""Tables of command lines: a `Command` for each verb, which parsing, help and completion use.

argparse is not used, for three reasons: it takes a third of the start-up time of `insula ps`; `insula run IMAGE -x`
must pass `-x` to the instance; and completion scripts need the tables.

Grammar: options may stand anywhere among the arguments, as ``--name VALUE``, ``--name=VALUE``, ``-n VALUE``,
``-nVALUE``; flags combine (``-dit``); ``--`` ends the options. If the last argument is a command line for the instance
(`rest`), options end at the first argument; a ``--`` right after it is dropped (``exec NAME -- CMD``).
"""

from __future__ import annotations

from insula.model.errors import Invalid

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from typing import Any


class UsageError(Exception):
    """The command line is wrong; `hint` refers to its help. Exit status 2."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UnknownOption(UsageError):
    """There is no option `name`; the hint is the most similar one of `known`, if there is one."""

    def __init__(self, name: str, known: Iterable[str]) -> None:
        near = nearest(name, (each for each in known if each.startswith("--")))
        super().__init__(f"there is no option {name[:60]!r}", near and f"did you mean {near}?")
        self.name = name


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the word of `known` of which `word` is a misspelling or an abbreviation; None if there is none.

    Leading dashes are ignored, because all options have them."""
    from difflib import get_close_matches

    names = {name.lstrip("-"): name for name in known}
    bare = word[:60].lstrip("-")
    near = get_close_matches(bare, names, 3, cutoff=0.7)
    swapped = next((each for each in near if sorted(each) == sorted(bare)), None)
    begun = [each for each in names if len(bare) > 2 and each.startswith(bare)]
    found = swapped or (begun[0] if len(begun) == 1 else next(iter(near), None))
    return found and names[found]


class Option:
    """An option. `names` as in "-n --name"; `value` is the name of its value, None for a flag.

    `many` collects a list. `parse` converts the text to a value, and raises Invalid (or ValueError). `complete` has the
    possible values: a tuple of words, or the kind of object (see `cli.verbs.completion`).
    """

    def __init__(
        self,
        names: str,
        help: str,  # noqa: A002
        value: str | None = None,
        *,
        many: bool = False,
        default: object = None,
        parse: Callable[[str], object] | None = None,
        complete: tuple[str, ...] | str = (),
    ) -> None:
        self.names = names.split()
        self.help = help
        self.value = value
        self.many = many
        self.default = [] if many else False if value is None else default
        self.parse = parse
        self.complete = complete
        self.key = self.names[-1].lstrip("-").replace("-", "_")

    def read(self, name: str, text: str) -> object:
        if self.parse is None:
            return text
        try:
            return self.parse(text)
        except Invalid as error:
            raise UsageError(f"{name}: {error.message}", error.hint) from None
        except ValueError:
            raise UsageError(f"{name} takes {self.value}, not {text!r}") from None


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """Return a parser of whole numbers from `least` up, or to `most`."""
    end = "up" if most is None else f"to {most}"
    last = (1 << 63) - 1 if most is None else most

    def parse(text: str) -> int:
        if not (text.isascii() and text.isdigit() and len(text) < 20 and least <= int(text) <= last):
            raise Invalid(f"{text[:60]!r} is not a whole number from {least} {end}", f"as in {least or 10}")
        return int(text)

    return parse


def or_none(parse: Callable[[str], object]) -> Callable[[str], object]:
    """Return a parser like `parse` that also accepts ``none``, as the string "none": None is an absent option."""
    return lambda text: text if text == "none" else parse(text)


def zero_or(parse: Callable[[str], object], zero: object = None) -> Callable[[str], object]:
    """Return a parser like `parse` that also accepts 0, which means no limit, as in docker-run(1)."""
    return lambda text: zero if text.replace(".", "", 1).isdigit() and not text.strip("0.") else parse(text)


def choice(*words: str) -> Callable[[str], str]:
    """Return a parser that accepts some words only."""

    def parse(text: str) -> str:
        if text not in words:
            raise Invalid(f"there is no {text[:60]!r}", f"choose one of {', '.join(words)}")
        return text

    return parse


class Argument:
    """An argument of a usage line such as ``NAME [SIGNAL] CMD...``."""

    def __init__(self, word: str) -> None:
        self.optional = word.startswith("[")
        self.many = "..." in word
        self.name = word.strip("[].")
        self.key = self.name.lower().replace("-", "_").replace(":", "_")


class Arguments:
    """A parsed command line: an attribute for each option (`--log-size`: `log_size`) and argument (`NAME`: `name`)."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...
        def __setattr__(self, name: str, value: Any) -> None: ...


class Command:
    """A verb: `run` is called with the `Arguments` and returns the exit status.

    `usage` are its arguments; `complete` has their possible values by name. `rest`: the last one is a command line.
    `elsewhere` are options of similar programs, with a hint what to use instead.
    """

    def __init__(
        self,
        run: Callable[[Arguments], int],
        help: str,  # noqa: A002
        usage: str = "",
        options: Sequence[Option] = (),
        *,
        rest: bool = False,
        details: str = "",
        complete: Mapping[str, tuple[str, ...] | str] | None = None,
        elsewhere: Mapping[str, str] | None = None,
    ) -> None:
        self.run = run
        self.help = help
        self.usage = usage
        self.arguments = [Argument(word) for word in usage.split()]
        self.options = list(options)
        self.rest = rest
        self.details = details
        self.complete = complete or {}
        self.elsewhere = elsewhere or {}


GLOBAL = [
    Option("-T --tenant", "act as this tenant (INSULA_TENANT, else default)", "TENANT", complete="tenant"),
    Option("--json", "print JSON instead of text"),
    Option("--socket", "the daemon's socket (INSULA_SOCKET)", "PATH", complete="file"),
    Option("--remote", "use this remote (INSULA_REMOTE, else that of `insula remote use`)", "NAME"),
    Option("--token-file", "act by the token in this file (INSULA_TOKEN_FILE)", "PATH", complete="file"),
    Option("-h --help", "show this help"),
]
VERSION = Option("--version", "show the version")


def split_global(words: Sequence[str]) -> tuple[Arguments, list[str]]:
    """Parse the global options before the verb; returns them, and the verb with all words after it."""
    result = Arguments()
    rest = _parse(list(words), [*GLOBAL, VERSION], result, stop_at_argument=True)
    return result, rest


def parse(command: Command, name: str, words: Sequence[str], given: Arguments) -> Arguments:
    """Parse `words` for `command`; `given` are the global options before the verb. UsageError."""
    try:
        arguments = _parse(
            list(words), command.options + GLOBAL, given, stop_at_argument=command.rest, skip_dashes=command.rest
        )
    except UnknownOption as problem:
        raise UsageError(problem.message, command.elsewhere.get(problem.name) or problem.hint) from None
    if given.help:
        return given
    _assign(command, name, arguments, given)
    return given


def _parse(
    words: list[str], options: list[Option], result: Arguments, *, stop_at_argument: bool, skip_dashes: bool = False
) -> list[str]:
    """Move the options of `words` to `result` and return the arguments. `skip_dashes` drops a ``--`` that follows the
    argument at which it stops."""
    by_name = {name: option for option in options for name in option.names}
    for option in options:
        if not hasattr(result, option.key):
            setattr(result, option.key, list(option.default) if isinstance(option.default, list) else option.default)
    arguments: list[str] = []
    while words:
        word = words.pop(0)
        if word == "--":
            return arguments + words
        if not word.startswith("-") or word == "-":
            arguments.append(word)
            if stop_at_argument:
                return arguments + words[skip_dashes and words[:1] == ["--"] :]
        elif word.startswith("--"):
            name, equals, text = word.partition("=")
            _take(by_name, name, text if equals else None, words, result)
        else:
            _take_short(by_name, word, words, result)
    return arguments


def _take_short(by_name: dict[str, Option], word: str, words: list[str], result: Arguments) -> None:
    """Parse ``-it``, ``-n5`` or ``-n 5``."""
    for position in range(1, len(word)):
        name = "-" + word[position]
        option = by_name.get(name)
        if option is not None and option.value is not None:
            _take(by_name, name, word[position + 1 :].removeprefix("=") or None, words, result)
            return
        _take(by_name, name, None, words, result)


def _take(by_name: dict[str, Option], name: str, text: str | None, words: list[str], result: Arguments) -> None:
    option = by_name.get(name)
    if option is None:
        raise UnknownOption(name, by_name)
    if option.value is None:
        if text is not None:
            raise UsageError(f"{name} takes no value")
        setattr(result, option.key, True)
        return
    if text is None:
        if not words:
            raise UsageError(f"{name} needs a value: {option.value}")
        text = words.pop(0)
    value = option.read(name, text)
    if option.many:
        getattr(result, option.key).append(value)
    else:
        setattr(result, option.key, value)


def _assign(command: Command, name: str, words: list[str], result: Arguments) -> None:
    """Assign the arguments to their names."""
    for position, argument in enumerate(command.arguments):
        if argument.many:
            after = len(command.arguments) - position - 1
            count = max(len(words) - after, 0)
            taken, words = words[:count], words[count:]
            if not taken and not argument.optional:
                raise UsageError(f"{name} needs {argument.name}")
            setattr(result, argument.key, taken)
        elif words:
            setattr(result, argument.key, words.pop(0))
        elif argument.optional:
            setattr(result, argument.key, None)
        else:
            raise UsageError(f"{name} needs {argument.name}")
    if words:
        raise UsageError(f"{name} takes no argument {words[0][:60]!r}")


def help_text(name: str, command: Command) -> str:
    """Return the output of ``insula VERB --help``."""
    lines = [" ".join(filter(None, ["usage: insula", name, "[OPTIONS]", command.usage])), "", command.help]
    if command.details:
        lines += ["", command.details.strip()]
    if command.options:
        lines += ["", "options:", *describe(command.options)]
    return "\n".join([*lines, "", "for every verb:", *describe(GLOBAL)])


def describe(options: Sequence[Option]) -> list[str]:
    """Return a line for each option: names, value, help."""
    left = [", ".join(option.names) + (f" {option.value}" if option.value else "") for option in options]
    width = min(max(map(len, left)), 30)
    return [f"  {names:{width}}  {option.help}" for names, option in zip(left, options, strict=True)]
