"""The command line of `insula-oci`: command lines of engines are parsed, and errors are one line."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from insula import oci
from insula.model import cpython
from insula.model.errors import Invalid
from insula.oci.commands import COMMANDS, GLOBAL, IN_ORDER, table
from insula.oci.log import debug, one_line
from insula.oci.main import main
from insula.oci.options import CommandLineError, TableOption, VerbArguments, assign, parse
from insula.oci.verbs.kill import signal_number
from insula.oci.verbs.ps import select

SOURCE = str(Path(__file__).parents[2] / "src")


def read(*words: str) -> VerbArguments:
    """As `main` reads a command line."""
    arguments = VerbArguments()
    verb, *rest = parse(GLOBAL, words, arguments, in_order=True)
    rest = parse(table(verb), rest, arguments, in_order=verb in IN_ORDER)
    assign(COMMANDS[verb][0], rest, arguments)
    return arguments


# what callers were seen to pass: containerd's go-runc, conmon, crictl and people
CALLS: dict[str, tuple[str, dict[str, object]]] = {
    "containerd creates": (
        "--root /run/r --log /b/log.json --log-format json --systemd-cgroup create --bundle /b --pid-file /b/init.pid "
        "--console-socket /tmp/s --no-pivot --no-new-keyring web",
        {"root": "/run/r", "log_format": "json", "systemd_cgroup": True, "bundle": "/b", "pid_file": "/b/init.pid"},
    ),
    "containerd execs": (
        "--root=/run/r --rootless=true exec --process /p --console-socket /s --detach --pid-file /f web",
        {"process": "/p", "console_socket": "/s", "detach": True, "pid_file": "/f", "id": "web", "command": []},
    ),
    "containerd kills": ("--debug kill --all web 9", {"all": True, "id": "web", "signal": "9"}),
    "containerd lists": ("ps --format json web", {"format": "json", "options": []}),
    "containerd updates": ("update --resources - web", {"resources": "-", "id": "web", "memory": None}),
    "containerd deletes": ("delete --force web", {"force": True}),
    "conmon creates": (
        "--cgroup-manager=systemd --log-format=json --log=/l create --bundle /b --pid-file /f --preserve-fds 2 web",
        {"cgroup_manager": "systemd", "preserve_fds": 2, "no_pivot": False, "log": "/l"},
    ),
    "conmon execs": ("exec --pid-file /f --process /p --detach --tty web", {"tty": True, "process": "/p"}),
    "people exec": (
        "exec -t -e A=1 --env B=2 --cwd /tmp web ls -l --all",
        {"env": ["A=1", "B=2"], "cwd": "/tmp", "command": ["ls", "-l", "--all"]},
    ),
    "people run": ("run -b /b -d web", {"bundle": "/b", "detach": True}),
    "people ps": ("ps web -ef", {"options": ["-ef"], "format": None}),
    "people kill": ("kill web", {"signal": None, "all": False}),
    "people update": (
        "update --memory 64m --memory-swap -1 --cpu-share 512 --pids-limit -1 web",
        {"memory": 64 << 20, "memory_swap": -1, "cpu_share": 512, "pids_limit": -1},
    ),
    "people watch": ("events --stats --interval 500ms web", {"stats": True, "interval": 0.5}),
}


@pytest.mark.parametrize("name", CALLS)
def test_command_lines_of_engines_are_parsed(name: str) -> None:
    words, expected = CALLS[name]
    found = vars(read(*words.split()))
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize(
    "words",
    ["-b /x c", "-b=/x c", "-b/x c", "--bundle=/x c", "c --bundle /x", "-bundle /x c", "-bundle=/x c", "-b /x -- c"],
)
def test_one_option_in_many_ways(words: str) -> None:
    arguments = read("create", *words.split())
    assert (arguments.bundle, arguments.id) == ("/x", "c")


@pytest.mark.parametrize(
    ("word", "value"), [("--detach", True), ("--detach=true", True), ("--detach=0", False), ("-dt", True)]
)
def test_flags(word: str, value: bool) -> None:
    assert read("exec", word, "web").detach is value


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("create", "ID is missing"),
        ("create a b", "unexpected argument 'b'"),
        ("create --bundel /b web", "did you mean --bundle?"),
        ("create web --bundle", "needs a value"),
        ("create --preserve-fds x web", "not a whole number"),
        ("exec --detach=maybe web", "there is no 'maybe'"),
        ("ps --format yaml web", "choose one of table, json"),
        ("--log-format xml list", "choose one of text, json"),
        ("--cgroup-manager docker list", "choose one of cgroupfs, systemd, disabled"),
        ("update --memory lots web", "'lots' is not a size"),
        ("events --interval soon web", "'soon' is not a duration"),
        ("delete -x web", "there is no option '-x'"),
    ],
)
def test_wrong_command_lines_are_refused(words: str, complaint: str) -> None:
    with pytest.raises(CommandLineError) as caught:
        read(*words.split())
    assert complaint in str(caught.value)


@given(
    st.sampled_from(sorted(COMMANDS)),
    st.lists(st.text(max_size=12) | st.sampled_from(["-", "--", "-x", "--all=", "web"])),
)
def test_any_words_are_read_or_refused(verb: str, words: list[str]) -> None:
    try:
        read(verb, *words)
    except CommandLineError as problem:
        assert problem.hint


def test_every_verb_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    for verb, (_, summary, options) in COMMANDS.items():
        assert main([verb, "--help"]) == 0
        shown = capsys.readouterr().out
        assert summary in shown
        assert all(text in shown for text, _ in options)
    assert main([]) == 0
    overview = capsys.readouterr().out
    assert all(f"\n  {verb} " in overview for verb in COMMANDS)


def test_options_have_one_meaning_each() -> None:
    for verb in COMMANDS:
        names = [name for text, _ in table(verb) for name in TableOption(text).names]
        assert len(names) == len(set(names)), verb


# -- errors ------------------------------------------------------------------------------------------------------------


def test_an_error_is_one_line_on_stderr_and_in_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log.json"
    for _ in range(2):
        assert main(["--root", str(tmp_path), "--log", str(log), "--log-format", "json", "state", "web"]) == 1
    out, err = capsys.readouterr()
    first, second = err.splitlines()
    assert first == second and first.startswith("error: container does not exist: web; hint: ") and out == ""
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(entry["level"], entry["msg"]) for entry in entries] == [("error", first.removeprefix("error: "))] * 2
    assert entries[0]["time"].endswith("Z") and len(entries[0]["time"]) == 20


def test_the_log_as_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log"
    assert main(["--root", str(tmp_path), "--log", str(log), "state", "we b"]) == 1
    assert " level=error msg=\"container ID 'we b': invalid characters or length; " in log.read_text()


def test_a_log_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever the verb: an engine would wait for the cause of a failure there."""
    assert main(["--root", str(tmp_path), "--log", str(tmp_path / "log"), "list", "--quiet"]) == 0
    assert (tmp_path / "log").read_bytes() == b""
    assert main(["--root", str(tmp_path), "--log", str(tmp_path / "no" / "log"), "list", "--quiet"]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --log: {tmp_path}/no/log can't be written: No such file or directory; hint: ")


def test_a_hostile_name_stays_on_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["state", "a\nerror: \x1b[31mb\udcff"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.strip().isprintable()


@given(st.text(st.characters(exclude_categories=())))
def test_one_line(text: str) -> None:
    line = one_line(text)
    assert line.isprintable() and line.encode() is not None


def test_the_version_is_in_runcs_form(capsys: pytest.CaptureFixture[str]) -> None:
    """dockerd reads "NAME version X" and "commit: X" of it, and containerd "spec: X"."""
    assert main(["--version"]) == 0
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.startswith("insula-oci version ") and third == "spec: 1.3.0"
    assert second == f"commit: insula-{first.split()[-1]}"


def test_installed_under_a_peers_name_it_uses_that_name(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scripts look for "runc version"; the commit shows that it is insula-oci."""
    monkeypatch.setattr(sys, "argv", ["/usr/local/sbin/runc"])
    assert main(["--version"]) == 0
    first, second, _ = capsys.readouterr().out.splitlines()
    assert first.startswith("runc version ") and second.startswith("commit: insula-")
    assert main(["help"]) == main(["-h"]) == 0
    overview, again = capsys.readouterr().out.split("NAME:\n")[1:]
    assert overview == again and overview.startswith("   runc - Open Container Initiative runtime")
    for words in (["create", "-h"], ["help", "create"]):
        assert main(words) == 0
        assert capsys.readouterr().out.splitlines()[:2] == ["NAME:", f"   runc create - {COMMANDS['create'][1]}"]
    monkeypatch.setattr(sys, "argv", ["/usr/bin/crun"])
    assert main(["--version"]) == 0
    first, second, third, features = capsys.readouterr().out.splitlines()
    assert first.startswith("crun version ") and second.startswith("commit: insula-") and third == "spec: 1.3.0"
    assert features.startswith("+SYSTEMD ")
    monkeypatch.setattr(sys, "argv", ["/usr/local/bin/other"])  # the control
    assert main(["--version"]) == 0 and capsys.readouterr().out.startswith("insula-oci version ")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("nope", "there is no verb 'nope'"),
        ("nope -h", "No help topic for 'nope'"),
        ("help nope", "No help topic for 'nope'"),
    ],
)
def test_an_unknown_verb(words: str, complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words.split()) == 1
    assert capsys.readouterr().err.startswith(f"error: {complaint}; hint: one of create, ")


def test_an_error_of_exec_has_a_status_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """runc-exec(8): 255 if an error occurred; of the other verbs it is 1."""
    assert main(["--root", str(tmp_path), "exec", "web", "true"]) == 255
    assert main(["--root", str(tmp_path), "exec", "--nope", "web", "true"]) == 255
    assert main(["--root", str(tmp_path), "start", "web"]) == 1
    assert capsys.readouterr().err.count("container does not exist: web") == 2


def test_debug_lines_go_to_the_log_if_there_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """runc(8), --debug and --log; without --debug there are none."""
    arguments = VerbArguments()
    parse(GLOBAL, ["list"], arguments, in_order=True)
    debug("a step\n", arguments)
    assert capsys.readouterr().err == ""
    arguments.debug = True
    debug("a step\n", arguments)
    assert re.fullmatch(r'time="[-:TZ0-9]+" level=debug msg="a step\\\\n"\n', capsys.readouterr().err)
    arguments.log, arguments.log_format = str(tmp_path / "log"), "json"
    debug("a step", arguments)
    assert capsys.readouterr().err == ""
    entry = json.loads((tmp_path / "log").read_text())
    assert (entry["level"], entry["msg"]) == ("debug", "a step")


def test_state_starts_in_milliseconds_because_it_imports_little() -> None:
    """Slow modules are not imported; modules are counted, since time depends on the machine."""
    code = "import sys; from insula.oci.main import main; main(['state', 'nobody']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    slow = {
        "json",
        "argparse",
        "subprocess",
        "asyncio",
        "dataclasses",
        "pathlib",
        "shutil",
        "inspect",
        "msgspec",
        "logging",
    }
    before = subprocess.run([sys.executable, "-c", "import sys; print(*sys.modules)"], capture_output=True, text=True)
    assert not (set(done.stdout.split()) - set(before.stdout.split())) & slow


@pytest.mark.parametrize("verb", ["create", "run", "exec", "start", "state", "kill", "delete"])
def test_verbs_of_engines_load_no_slow_modules(verb: str) -> None:
    """Those whose import costs milliseconds; `-ISE` as in packaging/insula-oci."""
    slow = {"contextlib", "enum", "functools", "hashlib", "json", "re", "selectors", "signal", "socket", "typing"}
    late = "" if verb in ("start", "state", "kill", "delete") else ", insula.kernel.seccomp.cache"
    if verb == "kill":
        slow -= {"enum", "functools", "re", "signal"}  # names of signals are parsed
    code = f"import sys; sys.path.append({SOURCE!r}); import insula.oci.main, insula.oci.verbs.{verb}{late}"
    show = "; print(*sys.modules)"
    done = subprocess.run(["/usr/bin/python3", "-ISEc", code + show], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert f"insula.oci.verbs.{verb}" in loaded
    assert loaded & slow == set()


# -- parts of verbs ----------------------------------------------------------------------------------------------------


def test_signal_0_is_for_kill_alone() -> None:
    assert (signal_number("0"), signal_number("sigrtmin+3")) == (0, 37)
    with pytest.raises(Invalid, match="there is no signal"):
        signal_number("32")


def test_ps_shows_the_containers_lines_only() -> None:
    lines = ["UID   PID  CMD", "root    1  init", "root   11  sh 1", "root  111  1 11"]
    assert select(lines, [11]) == [lines[0], lines[2]]
    with pytest.raises(Invalid, match="no column PID"):
        select(["USER CMD", "root init"], [1])


# -- JSON --------------------------------------------------------------------------------------------------------------

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(values)
def test_plain_json_is_json(value: object) -> None:
    text = cpython.dumps(value)
    assert "\n" not in text and json.loads(text) == value
    assert cpython.loads(text) == cpython.loads(json.dumps(value, indent=1).encode()) == value


@given(
    st.binary(max_size=20)
    | st.text(max_size=20).map(str.encode)
    | st.text(alphabet='{}[]",:0123truefalsn \t', max_size=12).map(str.encode)
)
def test_plain_json_accepts_what_json_accepts(data: bytes) -> None:
    def outcome(loads: object) -> object:
        try:
            return loads(data)  # type: ignore[operator]
        except ValueError:
            return ValueError

    def strictly(raw: bytes) -> object:
        return json.loads(raw.decode(), parse_constant=lambda name: int(name))  # NaN and Infinity are no JSON

    assert outcome(cpython.loads) == outcome(strictly)


def test_plain_json_explains_an_error_though_json_was_not_loaded() -> None:
    code = "from insula.model.cpython import loads\ntry: loads('{')\nexcept ValueError as error: print(error)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Expecting property name")


def test_an_interpreter_without_the_parts_in_c_has_the_public_modules() -> None:
    """The same values and errors, from `json`, `socket`, `signal` and `hashlib`."""
    code = """
import sys
for name in ("_json", "_socket", "_signal", "_blake2"):
    hidden = sys.modules[name] = None
import json, types
from importlib import import_module
for name in ("signal", "socket", "hashlib"):
    sys.modules[name] = types.SimpleNamespace(blake2b=None)
from insula import oci
from insula.model import cpython
assert cpython.socket is sys.modules["socket"] and cpython.signal is sys.modules["signal"]
print(cpython.dumps({"a": [1, None, "\u00e4"]}), cpython.loads(b' {"a": 1.5} '))
for text in ("NaN", "{", "[" * 100_000):
    try:
        cpython.loads(text)
    except ValueError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, *errors = done.stdout.splitlines()
    assert first == '{"a":[1,null,"\\u00e4"]} {\'a\': 1.5}'
    assert errors[0] == "NaN is not JSON" and errors[1].startswith("Expecting property name")
    assert errors[2] == "nested too deeply"


@pytest.mark.parametrize("data", [b"", b"NaN", b"[1] 2", b"[" * 100_000, b"1" * 5000])
def test_plain_json_refuses(data: bytes) -> None:
    with pytest.raises(ValueError):
        cpython.loads(data)
    with pytest.raises(TypeError):
        cpython.dumps({"x": object()})


def _uses(tree: ast.Module) -> dict[str, tuple[set[str], set[str]]]:
    """For each function: the attributes of `arguments` that it reads, and the functions that it passes them to."""
    found: dict[str, tuple[set[str], set[str]]] = {}
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        attributes, calls = found[function.name] = set(), set()
        for node in ast.walk(function):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "arguments":
                attributes.add(node.attr)
            if isinstance(node, ast.Call) and any(isinstance(a, ast.Name) and a.id == "arguments" for a in node.args):
                calls.add(ast.unparse(node.func))
    return found


@pytest.mark.parametrize("verb", COMMANDS)
def test_a_verb_has_all_options_that_its_functions_read(verb: str) -> None:
    """Also those of other verbs' functions that it calls: an option that is missing fails only when it is read."""
    sources = {path.stem: _uses(ast.parse(path.read_text())) for path in Path(oci.__file__).parent.rglob("*.py")}
    table = COMMANDS[verb][2] + GLOBAL
    known = (
        {TableOption(text).key for text, _ in table}
        | {"verb", "named_root"}
        | {word.lower() for word in re.findall(r"[A-Z]+", COMMANDS[verb][0])}
    )
    seen, left = set(), [(verb, "run")]
    while left:
        module, name = left.pop()
        if (module, name) in seen:
            continue
        seen.add((module, name))
        attributes, calls = sources.get(module, {}).get(name, (set(), set()))
        assert attributes <= known, f"{module}.{name} reads {attributes - known} for {verb}"
        for call in calls:
            where, _, what = call.rpartition(".")
            left.append((where or module, what))
    assert verb not in ("create", "run", "checkpoint", "restore", "delete") or len(seen) > 1, "calls are followed"
