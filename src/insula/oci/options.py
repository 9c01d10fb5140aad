"""Command lines as tables of text: ``("-f --format table|json", "what it is for")`` is an option.

The last word of an option names its value and how it is parsed; without one the option is a flag.

    N            a whole number            a|b|c         one of these words
    SIZE         bytes, as in 512m         VALUE...      may be given often, and collects a list
    DURATION     seconds, as in 5s         anything else text

Tables are constants of a compiled module and cost nothing until a verb's own is read. argparse is not used: its import
takes longer than all of `insula-oci state`. The grammar is that of Go's and GNU's programs, which callers expect:
``--name VALUE``, ``--name=VALUE``, ``--flag=false``, ``-n VALUE``, ``-it``; ``--`` ends the options.
"""

from __future__ import annotations

from insula.model.errors import Invalid

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    Table = tuple[tuple[str, str], ...]


class CommandLineError(Invalid):
    """The command line is wrong."""


class VerbArguments:
    """A parsed command line: an attribute for each option (``--pid-file``: `pid_file`) and argument (``ID``: `id`)."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...
        def __setattr__(self, name: str, value: Any) -> None: ...


class TableOption:
    """One option of a table."""

    def __init__(self, text: str) -> None:
        words = text.split()
        self.names = [word for word in words if word.startswith("-")]
        value = words[-1] if not words[-1].startswith("-") else None
        self.many = value is not None and value.endswith("...")
        self.value = value.removesuffix("...") if value else None
        self.key = self.names[-1].lstrip("-").replace("-", "_")

    @property
    def default(self) -> object:
        return [] if self.many else False if self.value is None else None

    def read(self, name: str, text: str) -> object:
        """The value that `text` means. CommandLineError."""
        try:
            return _read(self.value or "true|false", text)
        except Invalid as error:
            raise CommandLineError(f"{name}: {error.message}", error.hint) from None


def _read(kind: str, text: str) -> object:
    if kind == "N":
        if not text.removeprefix("-").isdecimal() or len(text) > 20:
            raise Invalid(f"{text[:60]!r} is not a whole number", "as in 1")
        return int(text)
    if kind == "true|false":
        kind, text = "true|false|", {"1": "true", "0": "false"}.get(text, text)
    if "|" in kind and text not in kind.split("|"):
        raise Invalid(f"there is no {text[:60]!r}", f"choose one of {', '.join(filter(None, kind.split('|')))}")
    if kind == "true|false|":
        return text == "true"
    if kind in ("SIZE", "DURATION"):
        from insula.model import units

        if kind == "DURATION":
            return units.parse_duration(text)
        return -1 if text == "-1" else units.parse_size(text)
    return text


def parse(table: Table, words: Sequence[str], result: VerbArguments, *, in_order: bool) -> list[str]:
    """Parse the options in `words` into `result`, with defaults for the others. Return the words that are no options.

    `in_order`: options end at the first argument, because the rest is another program's command line.
    """
    options = [TableOption(text) for text, _ in table]
    by_name = {name: option for option in options for name in option.names}
    for option in options:
        setattr(result, option.key, option.default)
    left = list(words)
    rest: list[str] = []
    while left:
        word = left.pop(0)
        if word == "--":
            return rest + left
        if not word.startswith("-") or word == "-":
            rest.append(word)
            if in_order:
                return rest + left
        elif word.startswith("--"):
            name, equals, text = word.partition("=")
            _take(by_name, name, text if equals else None, left, result)
        else:
            _take_short(by_name, word, left, result)
    return rest


def _take_short(by_name: dict[str, TableOption], word: str, left: list[str], result: VerbArguments) -> None:
    """Parse ``-it``, ``-b DIR``, ``-bDIR``, or a long name with one dash, which Go's programs accept."""
    if f"-{word.partition('=')[0]}" in by_name:
        name, equals, text = f"-{word}".partition("=")
        _take(by_name, name, text if equals else None, left, result)
        return
    for position in range(1, len(word)):
        name = "-" + word[position]
        option = by_name.get(name)
        if option is not None and option.value is not None:
            _take(by_name, name, word[position + 1 :].removeprefix("=") or None, left, result)
            return
        _take(by_name, name, None, left, result)


def _take(by_name: dict[str, TableOption], name: str, text: str | None, left: list[str], result: VerbArguments) -> None:
    option = by_name.get(name)
    if option is None:
        raise CommandLineError(f"there is no option {name[:60]!r}", _near(name, by_name))
    if text is None:
        if option.value is None:
            setattr(result, option.key, True)
            return
        if not left:
            raise CommandLineError(f"{name} needs a value: {option.value}", f"as in {name} {option.value}")
        text = left.pop(0)
    value = option.read(name, text)
    if option.many:
        getattr(result, option.key).append(value)
    else:
        setattr(result, option.key, value)


def _near(name: str, known: dict[str, TableOption]) -> str:
    from difflib import get_close_matches

    near = get_close_matches(name[:60], [each for each in known if each.startswith("--")], 1)
    return f"did you mean {near[0]}?" if near else "see --help"


def assign(usage: str, words: list[str], result: VerbArguments) -> None:
    """Assign the arguments to the names in `usage`, such as ``ID [SIGNAL]`` or ``ID [COMMAND...]``."""
    for name in usage.split():
        optional, many = name.startswith("["), name.rstrip("]").endswith("...")
        key = name.strip("[].").lower()
        if many:
            setattr(result, key, words)
            words = []
        elif words:
            setattr(result, key, words.pop(0))
        elif optional:
            setattr(result, key, None)
        else:
            raise CommandLineError(f"{name} is missing", f"usage: {usage}")
    if words:
        raise CommandLineError(f"unexpected argument {words[0][:60]!r}", f"usage: {usage}")
