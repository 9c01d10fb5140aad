"""The command line's parser: accepted and refused words, and the help of every verb."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from insula import __version__
from insula.cli.main import ELSEWHERE, VERBS, find, load, main
from insula.cli.options import Arguments, Command, Option, UsageError, help_text, nearest, parse, split_global, whole
from insula.model.errors import Invalid

LEAF = Command(
    lambda _: 0,
    "help",
    "NAME [OTHER]",
    [
        Option("-i --interactive", "flag"),
        Option("-t --tty", "flag"),
        Option("-e --env", "many", "X", many=True),
        Option("-n --number", "number", "N", parse=int, default=7),
    ],
)
REST = Command(
    lambda _: 0, "help", "IMAGE [CMD...]", [Option("-d --detach", "flag"), Option("--name", "name", "N")], rest=True
)


def read(command: Command, *words: str) -> Arguments:
    return parse(command, "verb", words, split_global([])[0])


@pytest.mark.parametrize(
    "words", [("-it", "web"), ("web", "-i", "-t"), ("--tty", "web", "--interactive"), ("-ti", "--", "web")]
)
def test_options_stand_anywhere_and_combine(words: tuple[str, ...]) -> None:
    arguments = read(LEAF, *words)
    assert (arguments.name, arguments.other, arguments.interactive, arguments.tty) == ("web", None, True, True)


@pytest.mark.parametrize(
    "words", [("-n", "5"), ("-n5",), ("-n=5",), ("--number", "5"), ("--number=5",), ("-itn", "5"), ("-in5",)]
)
def test_values(words: tuple[str, ...]) -> None:
    assert read(LEAF, *words, "web").number == 5
    assert read(LEAF, "web").number == 7


@pytest.mark.parametrize("text", ["2", "4"])
def test_whole_numbers_in_a_range(text: str) -> None:
    assert whole(2, 4)(text) == int(text)


@pytest.mark.parametrize("text", ["1", "5", "-2", "2.5", "", "٣", "9" * 30])
def test_whole_numbers_out_of_a_range(text: str) -> None:
    with pytest.raises(Invalid, match="from 2 to 4"):
        whole(2, 4)(text)


def test_repeated_options_collect() -> None:
    assert read(LEAF, "-e", "A=1", "web", "--env=B=2").env == ["A=1", "B=2"]
    assert read(LEAF, "web").env == []


def test_options_of_the_instances_command_are_left_alone() -> None:
    arguments = read(REST, "-d", "--name", "x", "busybox", "ls", "-d", "--name", "--", "-z")
    assert (arguments.detach, arguments.name, arguments.image) == (True, "x", "busybox")
    assert arguments.cmd == ["ls", "-d", "--name", "--", "-z"]


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (("busybox", "--", "ls", "-l"), ["ls", "-l"]),
        (("--name", "x", "busybox", "--", "--", "x"), ["--", "x"]),
        (("--", "busybox", "--", "ls"), ["--", "ls"]),
        (("-d", "--", "busybox", "ls"), ["ls"]),
        (("busybox", "ls", "--", "x"), ["ls", "--", "x"]),
        (("busybox", "--"), []),
    ],
)
def test_dashes_may_part_the_name_from_the_command(words: tuple[str, ...], command: list[str]) -> None:
    """As with kubectl, ``exec NAME -- CMD``; only the first ones count (utility syntax guideline 10 of POSIX)."""
    arguments = read(REST, *words)
    assert (arguments.image, arguments.cmd) == ("busybox", command)


def test_dashes_after_the_verb_end_the_options() -> None:
    _, rest = split_global(["rm", "--", "-x"])
    name, command, rest = find(rest)
    assert command is not None
    assert parse(command, name, rest, split_global([])[0]).name == ["-x"]


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("--memroy", "--memory"),
        ("--mem", "--memory"),
        ("--interac", "--interactive"),
        ("--cpu", "--cpus"),
        ("--workingdir", "--workdir"),
        ("--read-olny", "--read-only"),
        ("--pid-limit", None),
        ("--zzz", None),
        ("--link", None),
        ("--gpus", "--cpus"),
        ("--runtime", None),
        ("--isolation", None),
        ("--x", None),
    ],
)
def test_only_near_names_are_suggested(word: str, meant: str | None) -> None:
    run = load("run")
    assert isinstance(run, Command)
    with pytest.raises(UsageError) as caught:
        read(run, word, "busybox")
    assert caught.value.hint == (meant and f"did you mean {meant}?")


@given(st.text(alphabet="abcdefghijklmnopqrstuvwxyz-", max_size=12))
def test_what_is_suggested_has_most_letters_in_common(word: str) -> None:
    run = load("run")
    assert isinstance(run, Command)
    names = [name for option in run.options for name in option.names if name.startswith("--")]
    if meant := nearest(f"--{word}", names):
        bare, ours = word.lstrip("-"), meant.lstrip("-")
        common = sum((Counter(bare) & Counter(ours)).values())
        assert ours.startswith(bare) or 2 * common >= 0.7 * (len(bare) + len(ours))


@pytest.mark.parametrize("zero", ["0", "0.0", "00", "0.000"])
def test_no_limit_can_be_written_as_0(zero: str) -> None:
    run, update = load("run"), load("update")
    assert isinstance(run, Command)
    assert isinstance(update, Command)
    assert read(run, "--cpus", "0.5", "-m", "64m", "busybox").cpus == 0.5
    arguments = read(run, "--cpus", zero, "-m", zero, "busybox")
    assert (arguments.cpus, arguments.memory) == (None, None)
    arguments = read(update, "--cpus", zero, "-m", zero, "web")
    assert (arguments.cpus, arguments.memory) == ("none", "none")


@pytest.mark.parametrize("wrong", ["", ".", "0.001", "-0", "0m"])
def test_other_zeros_are_refused(wrong: str) -> None:
    run = load("run")
    assert isinstance(run, Command)
    with pytest.raises(UsageError, match="is not a number of CPUs"):
        read(run, "--cpus", wrong, "busybox")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("-x", "web"), "no option '-x'"),
        (("--nope", "web"), "no option '--nope'"),
        (("-ix", "web"), "no option '-x'"),
        (("--tty=yes", "web"), "takes no value"),
        (("web", "-n"), "needs a value"),
        (("web", "-n", "many"), "takes N, not 'many'"),
        ((), "needs NAME"),
        (("a", "b", "c"), "no argument 'c'"),
    ],
)
def test_wrong_usage(words: tuple[str, ...], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        read(LEAF, *words)


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (("images",), "`insula image ls`"),
        (("stauts",), "`insula status`"),
        (("xyzzy",), "`insula --help`"),
        (("run", "--memroy", "1g", "busybox"), "--memory"),
        (("run", "-p", "80", "busybox"), "8080:80"),
        (("run", "--volume", "/a:/b", "busybox"), "insula cp"),
        (("run", "--label", "=x", "busybox"), "`insula run --help`"),
        (("ps", "-p"), "`insula ps --help`"),
    ],
)
def test_wrong_command_lines_have_a_hint(words: tuple[str, ...], hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert hint in capsys.readouterr().err.partition("; hint: ")[2]


def test_verbs_of_other_programs_have_a_hint() -> None:
    for word, ours in ELSEWHERE.items():
        assert word not in VERBS
        assert find(ours.split())[1] is not None


@pytest.mark.parametrize("words", [["--version"], ["version"]])
def test_version(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    assert capsys.readouterr().out == f"insula {__version__}\n"


@given(st.lists(st.text(max_size=8), max_size=8))
def test_any_words_are_parsed_or_refused(words: list[str]) -> None:
    try:
        arguments = read(REST, *words)
    except UsageError:
        return
    assert arguments.help or arguments.image in words


def test_global_options_stand_before_and_after_the_verb() -> None:
    given_, rest = split_global(["-T", "acme", "ps", "--json"])
    name, command, rest = find(rest)
    assert command is not None
    arguments = parse(command, name, rest, given_)
    assert (arguments.tenant, arguments.json) == ("acme", True)


def leaves() -> list[tuple[str, Command]]:
    found: list[tuple[str, Command]] = []
    for verb in VERBS:
        commands = load(verb)
        family = {verb: commands} if isinstance(commands, Command) else {f"{verb} {k}": v for k, v in commands.items()}
        found += family.items()
    return found


@pytest.mark.parametrize(("name", "command"), leaves())
def test_every_verb_explains_itself(name: str, command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*name.split(), "--help"]) == 0
    text = capsys.readouterr().out
    assert text == help_text(name, command) + "\n"
    for option in command.options:
        assert option.names[-1] in text
    assert all(len(line) <= 120 for line in text.splitlines())


@pytest.mark.parametrize("name", ["run", "tenant create"])
def test_help_may_stand_first(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help", *name.split()]) == 0
    assert capsys.readouterr().out.startswith(f"usage: insula {name} ")


@pytest.mark.parametrize("verb", [verb for verb in VERBS if not isinstance(load(verb), Command)])
def test_families_list_their_verbs(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: insula {verb} VERB")
    assert main([verb]) == 2
    assert main([verb, "nope"]) == 2
    assert capsys.readouterr().err.count("error: ") == 2


@pytest.mark.parametrize(
    "words",
    [
        ["nope"],
        ["run"],
        ["run", "--memory", "lots", "busybox"],
        ["run", "--cpus", "-1", "busybox"],
        ["run", "--pids", "0", "busybox"],
        ["run", "--restart", "sometimes", "busybox"],
        ["run", "--restart", "always:3", "busybox"],
        ["run", "--ulimit", "nofile=x", "busybox"],
        ["run", "--tmpfs", "/x:mode=9", "busybox"],
        ["run", "--tmpfs", "/x:size=big", "busybox"],
        ["run", "--label", "=x", "busybox"],
        ["kill", "-s", "NOPE", "web"],
        ["network", "create", "net"],
        ["tenant", "create", "x", "--bandwidth", "fast"],
        ["stop", "--timeout", "soon", "web"],
        ["whois", "me"],
        ["whois", "0"],
        ["whois", "99999999999999999999999"],
        ["logs", "--tail", "-1", "web"],
        ["logs", "--since", "yesterday", "web"],
        ["cp", "a", "b"],
        ["cp", "web:", "b"],
        ["completion", "csh"],
        ["inspect", "--type", "planet", "x"],
        ["image", "save", "--format", "zip", "x"],
        ["image", "inspect", "x"],
    ],
)
def test_bad_input_is_one_line_with_a_hint_and_status_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--socket", "/nonexistent", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert "; hint: " in err
    assert err.count("\n") == 1


def test_a_password_can_only_be_asked_for_in_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("INSULA_REGISTRY_PASSWORD", raising=False)
    with open("/dev/null") as nothing:
        monkeypatch.setattr("insula.cli.verbs.image.STDIN", nothing.fileno())
        assert main(["--socket", "/nonexistent", "image", "pull", "-u", "me", "r.example/app"]) == 1
    assert "; hint: set INSULA_REGISTRY_PASSWORD" in capsys.readouterr().err


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_is_one_line(unbuffered: str) -> None:
    command = [sys.executable, "-m", "insula.cli.main", "--help"]
    environment = {"PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_no_daemon_is_one_line_with_a_hint(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--socket", "/nonexistent/sock", "ps"]) == 1
    assert main(["--socket", "/nonexistent/sock", "run", "busybox"]) == 125
    err = capsys.readouterr().err
    assert err.count("insulad does not answer at /nonexistent/sock") == 2
    assert err.count("; hint: start the daemon: ") == 2


@pytest.mark.parametrize("words", [["ps"], ["run", "--rm", "busybox", "true"], ["exec", "web", "true"]])
def test_the_hot_verbs_import_almost_nothing(words: list[str]) -> None:
    """Modules that cost more than all of the rest: each of `light` alone takes 2 to 6 ms of processor time."""
    code = "import sys; sys.path.append(sys.argv[1]); from insula.cli.main import main; "
    code += "main(['--socket', '/no', *sys.argv[2:]]); print(*sys.modules)"
    source = str(Path(__file__).parents[2] / "src")
    python = "/usr/bin/python3" if Path("/usr/bin/python3").exists() else sys.executable
    done = subprocess.run([python, "-ISE", "-c", code, source, *words], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert f"insula.cli.verbs.{words[0]}" in loaded
    heavy = {"argparse", "http", "http.client", "email", "typing", "dataclasses", "inspect", "pathlib", "subprocess"}
    assert not loaded & {*heavy, "tarfile", "asyncio", "logging", "msgspec", "tty", "insula.cli.verbs.cp"}
    light = {"collections", "contextlib", "enum", "functools", "json", "re", "selectors", "signal", "socket"}
    assert not loaded & light
    assert ("insula.cli.verbs.run" in loaded) is (words[0] != "ps")


def test_all_output_is_written_before_the_end() -> None:
    """The program ends without the interpreter's own end, which flushes streams."""
    done = subprocess.run([sys.executable, "-m", "insula.cli.main", "--help"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.rstrip().endswith("the options of a verb")
    failed = subprocess.run([sys.executable, "-m", "insula.cli.main", "no-such-verb"], capture_output=True, text=True)
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.startswith("error: there is no verb") and failed.stderr.endswith("\n")
