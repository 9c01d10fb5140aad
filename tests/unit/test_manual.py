"""Manual pages: every verb, option and setting has an entry, and groff has no warnings."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from insula.api.daemon import OPTIONS
from insula.cli.main import VERBS, load
from insula.cli.options import GLOBAL, Command
from insula.manual import pages, text
from insula.oci.commands import COMMANDS, table
from insula.settings import DOCUMENTED


@pytest.fixture(scope="module")
def manual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("man")
    for page in pages():
        page.write(directory)
    return directory


def groff(file: Path) -> subprocess.CompletedProcess[str]:
    if shutil.which("groff") is None:
        pytest.skip("groff is not installed")
    # overstriking off (-c): letters stay beside each other
    command = ["groff", "-man", "-ww", "-Tutf8", "-P-cbou", "-rLL=200n", str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=True)


def rendered(file: Path) -> str:
    return groff(file).stdout.replace("‐", "-")


def test_groff_has_no_warnings(manual: Path) -> None:
    files = sorted(manual.rglob("*.*"))
    assert {file.relative_to(manual).as_posix() for file in files if file.is_file()} == {
        "man1/insula.1",
        "man1/insula-oci.1",
        "man5/insulad.toml.5",
        "man8/insulad.8",
        *(f"man1/insula-{verb}.1" for verb in VERBS),
    }
    assert {str(file): groff(file).stderr for file in files if groff(file).stderr} == {}


def test_groff_would_warn_of_a_wrong_page(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.1"
    wrong.write_text('.TH WRONG 1 "" "x" "y"\n.NOSUCH\n\\fQx\n')
    assert "NOSUCH" in groff(wrong).stderr


def test_every_verb_has_an_entry_and_a_page_with_its_options(manual: Path) -> None:
    overview = rendered(manual / "man1/insula.1")
    for verb in VERBS:
        assert re.search(rf"^ +{verb}(\n| )", overview, re.M), verb
        assert f"insula-{verb}(1)" in overview
        page = rendered(manual / f"man1/insula-{verb}.1")
        found = load(verb)
        commands = {verb: found} if isinstance(found, Command) else {f"{verb} {n}": c for n, c in found.items()}
        for name, command in commands.items():
            assert f"insula {name}" in page
            for option in [*command.options, *GLOBAL]:
                line = ", ".join(option.names) + (f" {option.value}" if option.value else "")
                assert re.search(rf"^ +{re.escape(line)}( |$)", page, re.M), (name, line)


def test_insula_oci_has_every_verb_and_option(manual: Path) -> None:
    page = rendered(manual / "man1/insula-oci.1")
    for verb in COMMANDS:
        section = page.split(f"   insula-oci {verb}", 1)[1]
        for names, _ in table(verb):
            assert names.split()[0] in section, (verb, names)


def test_insulad_and_its_settings(manual: Path) -> None:
    page = rendered(manual / "man8/insulad.8")
    assert all(names.split()[0] in page for names, _ in OPTIONS)
    page = rendered(manual / "man5/insulad.toml.5")
    assert all(re.search(rf"^ +{re.escape(setting.key)} \(", page, re.M) for setting in DOCUMENTED)


@pytest.mark.parametrize(
    "words", [".TH at the beginning", "'quoted", "a \\ backslash", '-x ~ ^ ` "', "`code`", "é …", "a\n.b"]
)
def test_no_text_is_taken_for_a_request(words: str, tmp_path: Path) -> None:
    page = tmp_path / "page.1"
    page.write_text(f'.TH X 1 "" "x" "y"\n.SH NAME\n.PP\n{text(words)}\n', encoding="ascii")
    done = groff(page)
    assert done.stderr == ""
    said = words.replace("`code`", "code").replace("\n", " ")
    assert said in done.stdout.replace("‐", "-")
