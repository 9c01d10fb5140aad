"""Generate manual pages from the tables of command lines and settings: ``python -m insula.manual DIRECTORY``.

The pages are roff with the macros of man(7), in ASCII: insula(1) and a page for each verb, insula-oci(1), insulad(8),
insulad.toml(5). They go below DIRECTORY/man1, man5 and man8.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from insula import __version__
from insula.api import daemon
from insula.cli.main import VERBS, load
from insula.cli.options import GLOBAL, VERSION, Command
from insula.oci import commands as oci
from insula.settings import DOCUMENTED, ENVIRONMENT, FILE, default_of

EXIT_STATUS = {
    "0": "Success.",
    "1": "An error, reported in one line on standard error: error: what; hint: what to do.",
    "2": "The command line is wrong.",
    "125": "`run` and `exec`: the engine failed. Otherwise these exit as the instance's process did.",
    "126, 127": "`run` and `exec`: the program can't be executed, or does not exist.",
}
VARIABLES = {
    "INSULA_TENANT": "The tenant, unless -T is given.",
    "INSULA_SOCKET": "The daemon's socket, unless --socket is given.",
    "INSULA_RUN": "The daemon's run directory, in which the socket is by default.",
    "INSULA_REGISTRY_PASSWORD": "The password for a registry, with --username.",
}
FILES = {
    str(FILE): "Settings of insulad(8), see insulad.toml(5).",
    "/run/insula/insulad.sock": "The socket, for root and members of the group insula.",
    "/run/insula/users.sock": "The socket for other users of the host, and for tokens.",
    "/var/lib/insula": "The store, images, files of instances.",
    "/var/log/insula/audit.log": "The audit log, see insula-audit(1).",
}
_CODE = re.compile(r"`([^`]+)`")


def text(words: str) -> str:
    """Convert a paragraph or a heading to roff: special characters are escaped, `code` is bold."""
    escaped = words.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\[aq]").replace("~", "\\[ti]")
    escaped = escaped.replace("^", "\\[ha]").replace('"', "\\[dq]")
    escaped = _CODE.sub(r"\\fB\1\\fR", escaped).replace("`", "\\[ga]")
    escaped = "".join(c if ord(c) < 128 else f"\\[u{ord(c):04X}]" for c in escaped)
    return "\n".join(f"\\&{line}" if line.startswith(".") else line for line in escaped.splitlines())


def bold(words: str) -> str:
    return f"\\fB{text(words)}\\fR"


def italic(words: str) -> str:
    return f"\\fI{text(words)}\\fR"


class Page:
    """A manual page, built from top to bottom."""

    def __init__(self, name: str, section: int, summary: str) -> None:
        self.name = name
        self.section = section
        self.lines = [f'.TH {text(name.upper())} {section} "" "Insula {__version__}" "Insula"']
        self.heading("NAME")
        self.lines.append(f"{text(name)} \\- {text(summary.rstrip('.'))}")

    def heading(self, title: str, level: str = ".SH") -> None:
        self.lines.append(f'{level} "{text(title)}"')

    def synopsis(self, name: str, arguments: str) -> None:
        self.lines += [".br"] if self.lines[-1].startswith("\\fB") else []
        self.lines.append(" ".join(filter(None, [bold(name), text(arguments)])))

    def paragraph(self, words: str) -> None:
        self.lines += [".PP", text(words)]

    def example(self, words: str) -> None:
        self.lines += [".PP", ".RS 4", ".nf", text(words), ".fi", ".RE"]

    def entry(self, term: str, words: str) -> None:
        """Add a tagged paragraph; `term` is roff."""
        self.lines += [".TP", term, text(words)]

    def entries(self, title: str, found: Mapping[str, str]) -> None:
        self.heading(title)
        for term, words in found.items():
            self.entry(bold(term), words)

    def option(self, names: Iterable[str], value: str | None, words: str) -> None:
        term = ", ".join(map(bold, names)) + (f" {italic(value)}" if value else "")
        self.entry(term, words)

    def see_also(self, *pages: str) -> None:
        self.heading("SEE ALSO")
        self.lines.append(", ".join(f"\\fB{text(page[:-3])}\\fR{page[-3:]}" for page in pages if page))

    def write(self, directory: Path) -> None:
        target = directory / f"man{self.section}" / f"{self.name}.{self.section}"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text("\n".join(self.lines) + "\n", encoding="ascii")


def overview() -> Page:
    """Make insula(1)."""
    page = Page("insula", 1, "a cloud for many tenants on one Linux host")
    page.heading("SYNOPSIS")
    page.synopsis("insula", "[-T TENANT] [--json] VERB ...")
    page.heading("DESCRIPTION")
    page.paragraph(
        "Gives tenants who do not trust each other containers on private networks with any addresses, within limits of "
        "their own. The command asks insulad(8), which does the work. A tenant `default` with a network `default` "
        "always exists, so that `insula run busybox echo hi` works at once."
    )
    page.paragraph(
        "Durations are seconds, or written as in 1m30s; sizes are bytes, or written as in 64m. Options may stand "
        "anywhere among the arguments; -- ends them."
    )
    page.heading("VERBS")
    for verb, (_, summary) in VERBS.items():
        page.entry(f"\\fB{text(verb)}\\fR", f"{_sentence(summary)} See insula-{verb}(1).")
    _global_options(page)
    page.entries("EXIT STATUS", EXIT_STATUS)
    page.entries("ENVIRONMENT", VARIABLES)
    page.entries("FILES", FILES)
    page.see_also("insulad(8)", "insulad.toml(5)", "insula-oci(1)")
    return page


def verb_page(verb: str) -> Page:
    """Make the page of a verb, or of a family of verbs such as `insula tenant`."""
    found = load(verb)
    commands = {verb: found} if isinstance(found, Command) else {f"{verb} {n}": c for n, c in found.items()}
    page = Page(f"insula-{verb}", 1, VERBS[verb][1])
    page.heading("SYNOPSIS")
    for name, command in commands.items():
        page.synopsis(f"insula {name}", f"[OPTIONS] {command.usage}".rstrip())
    if len(commands) == 1:
        page.heading("DESCRIPTION")
        _describe(page, *commands.values())
    else:
        page.heading("VERBS")
        for name, command in commands.items():
            page.heading(f"insula {name} {command.usage}".rstrip(), ".SS")
            _describe(page, command)
    _global_options(page)
    page.see_also("insula(1)", "insulad(8)")
    return page


def _describe(page: Page, command: Command) -> None:
    page.paragraph(_sentence(command.help))
    for part in filter(None, command.details.strip().split("\n\n")):
        page.paragraph(part) if not part.startswith("  ") else page.example(part)
    for option in command.options:
        page.option(option.names, option.value, _sentence(option.help) + (" Repeatable." if option.many else ""))


def _global_options(page: Page) -> None:
    page.heading("OPTIONS OF EVERY VERB")
    for option in [*GLOBAL, VERSION]:
        page.option(option.names, option.value, _sentence(option.help))


def _sentence(words: str) -> str:
    """Make a sentence: with a capital letter, unless it begins with code or a sign, and a full stop."""
    return words[:1].upper() + words[1:] + ("" if words.endswith((".", ":", "!")) else ".")


def oci_page() -> Page:
    """Make insula-oci(1)."""
    page = Page("insula-oci", 1, "an OCI runtime: the container runtime of Insula as a command")
    page.heading("SYNOPSIS")
    page.synopsis("insula-oci", "[OPTIONS] VERB [OPTIONS] [ARGUMENTS]")
    page.heading("DESCRIPTION")
    page.paragraph(
        "Creates and runs containers from bundles as the OCI runtime-spec has them, for Podman, Docker and containerd, "
        "without insulad(8). The options are those of runc(8) and crun(1)."
    )
    _oci_options(page, "OPTIONS", oci.GLOBAL, ".SH")
    page.heading("VERBS")
    for verb, (usage, summary, _) in oci.COMMANDS.items():
        _oci_options(page, f"insula-oci {verb} {usage}".rstrip(), oci.table(verb), ".SS", summary)
    page.entries("EXIT STATUS", {"0": "Success.", "1": "An error. `run` and `exec` exit as the process did."})
    page.see_also("insula(1)", "runc(8)", "crun(1)")
    return page


def _oci_options(page: Page, title: str, table: Sequence[tuple[str, str]], level: str, summary: str = "") -> None:
    page.heading(title, level)
    if summary:
        page.paragraph(_sentence(summary))
    _options(page, table)


def _options(page: Page, table: Sequence[tuple[str, str]]) -> None:
    """Convert options from text: ``("-f --format table|json", "what it is for")``."""
    for names, words in table:
        flags = [word for word in names.split() if word.startswith("-")]
        page.option(flags, " ".join(names.split()[len(flags) :]) or None, _sentence(words))


def daemon_page() -> Page:
    """Make insulad(8)."""
    page = Page("insulad", 8, "the daemon of Insula")
    page.heading("SYNOPSIS")
    page.synopsis("insulad", "[--config FILE] [--check] [--log-level LEVEL]")
    page.heading("DESCRIPTION")
    page.paragraph(
        "Serves the API on a unix socket and makes what tenants want so. It runs as root until SIGTERM. Instances keep "
        "running without it, and the next start adopts them; it may be killed at any time."
    )
    page.heading("OPTIONS")
    _options(page, daemon.OPTIONS)
    page.entries(
        "EXIT STATUS",
        {
            "0": "It was ended by SIGTERM, or --check found the settings valid.",
            "1": "It can't start, or its settings are invalid. One line on standard error has the reason.",
            "2": "The command line is wrong.",
        },
    )
    found = {name: f"Overrides {key} of the settings." for name, key in ENVIRONMENT.items()}
    page.entries("ENVIRONMENT", {"INSULA_CONFIG": "The file with the settings.", **found})
    page.entries("FILES", FILES)
    page.see_also("insula(1)", "insulad.toml(5)")
    return page


def settings_page() -> Page:
    """Make insulad.toml(5)."""
    page = Page("insulad.toml", 5, "settings of insulad")
    page.heading("SYNOPSIS")
    page.lines.append(bold(str(FILE)))
    page.heading("DESCRIPTION")
    page.paragraph(
        "A file in TOML that insulad(8) reads when it starts. Every setting is optional. Environment variables count "
        "more than the file. An unknown key, a value of another type and one out of bounds are errors: insulad ends "
        "with status 1 before it has changed anything. `insulad --check` says whether a file can be used."
    )
    page.heading("SETTINGS")
    variables = {key: name for name, key in ENVIRONMENT.items()}
    for setting in DOCUMENTED:
        value = default_of(setting.key)
        default = "" if setting.key in ("socket", "network.resolvers") or value == "" else f" Default: {value}."
        variable = f" Variable: {variables[setting.key]}." if setting.key in variables else ""
        page.entry(f"{bold(setting.key)} ({text(setting.takes)})", f"{setting.text}{default}{variable}")
    page.heading("EXAMPLE")
    page.example('spares = 4\n\n[network]\nrange4 = "10.99.0.0/16"\nresolvers = ["192.0.2.53"]')
    page.see_also("insulad(8)", "insula(1)")
    return page


def pages() -> list[Page]:
    """Make all manual pages."""
    return [overview(), *map(verb_page, VERBS), oci_page(), daemon_page(), settings_page()]


def main() -> int:
    """Write the pages below the directory that the command line names."""
    if len(sys.argv) != 2:
        print("error: one argument, the directory, is needed; hint: as in insula.manual share/man", file=sys.stderr)
        return 2
    for page in pages():
        page.write(Path(sys.argv[1]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
