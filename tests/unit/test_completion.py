"""Completion: the candidates, and the bash script in a real bash."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from insula.cli.main import main
from insula.cli.verbs.completion import SCRIPTS, candidates
from tests.unit.conftest import StubDaemon

SOURCE = str(Path(__file__).parents[2] / "src")
SYNTAX = {"bash": ["bash", "-n"], "zsh": ["zsh", "-n"], "fish": ["fish", "--no-execute"]}


def complete(line: str) -> set[str]:
    *before, current = line.split(" ")
    return set(candidates(before, current))


def test_verbs_and_options() -> None:
    assert {"run", "restart", "rm"} <= complete("r")
    assert "ps" not in complete("r")
    assert complete("tenant ") == {"create", "update", "ls", "show", "rm"}
    assert complete("tenant cr") == {"create"}
    assert {"--cpus", "--memory", "--pids"} <= complete("update --")
    assert {"pause", "unpause", "update", "stats"} <= complete("")
    assert {"--detach", "--detach-keys"} == complete("run --det")
    assert {"--json", "--all"} <= complete("ps --")
    assert complete("run --restart on") == {"on-failure"}
    assert complete("run --restart=on") == {"--restart=on-failure"}
    assert complete("run --name ") == set()
    assert complete("completion ") == {"bash", "zsh", "fish"}
    assert complete("image load ") == {":file"}
    assert complete("run --dns") == {"--dns", "--dns-search"}
    assert complete("run --env-file ") == complete("exec --env-file ") == complete("run --cidfile ") == {":file"}
    assert {"--shm-size", "--add-host", "--group-add", "--tmpfs", "--cidfile"} <= complete("run --")
    assert complete("exec --deta") == {"--detach", "--detach-keys"}
    assert complete("tenant rm --fo") == {"--force"}
    assert "rename" in complete("re")
    assert complete("run busybox --det") == set(), "these are the instance's own words"


def test_names_come_from_the_daemon(stub: StubDaemon) -> None:
    stub.client.tenants.create("acme")
    for tenant, name in (("acme", "web"), ("acme", "worker"), ("default", "other")):
        stub.client.instances.run(tenant, "x", ["true"], name=name, start=False)
    here = f"--socket {stub.path}"
    assert complete(f"{here} -T ") == {"acme"}
    assert complete(f"{here} -T acme stop w") == {"web", "worker"}
    assert complete(f"{here} -T acme stop web wo") == {"worker"}
    assert complete(f"{here} -T acme update w") == complete(f"{here} -T acme pause w") == {"web", "worker"}
    assert complete(f"{here} -T acme stats web wo") == {"worker"}
    assert complete(f"{here} tenant update ") == {"acme"}
    assert complete(f"{here} rm -f ") == {"other"}
    assert complete(f"{here} -T acme exec web ") == set()
    assert complete(f"{here} -T acme run --pid ") == {"container:web", "container:worker"}
    assert complete(f"{here} cp ") == {"other:", ":file"}
    assert complete(f"{here} run --network d") == {"default"}


def test_nothing_is_offered_without_a_daemon(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["__complete", "--", "--socket", "/nonexistent", "stop", ""]) == 0
    assert main(["__complete", "--", "nonsense", ""]) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("shell", SCRIPTS)
def test_the_scripts_are_valid(shell: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    script = tmp_path / "script"
    script.write_text(SCRIPTS[shell])
    subprocess.run([*SYNTAX[shell], str(script)], check=True)


@pytest.fixture
def place(stub: StubDaemon, tmp_path: Path) -> Path:
    """A directory with a launcher `insula`, a file, and a daemon that has an instance `web`."""
    stub.client.instances.run("default", "x", ["true"], name="web", start=False)
    launcher = tmp_path / "insula"
    launcher.write_text(
        f"#!{sys.executable} -ISE\nimport sys; sys.path.append({SOURCE!r})\n"
        "from insula.cli.main import main; sys.exit(main())\n"
    )
    launcher.chmod(0o755)
    (tmp_path / "file.tar").touch()
    return tmp_path


PRESS_TAB = {
    "bash": """source <(insula completion bash)
        COMP_WORDS=(insula "$@") COMP_CWORD=$#; _insula; printf '%s\\n' "${COMPREPLY[@]}" """,
    "zsh": """compdef() { }; compadd() { shift; print -l -- "$@" }; _files() { print -l -- *.tar }
        source <(insula completion zsh); words=(insula "$@"); CURRENT=$#words; _insula | grep "^${words[-1]}" """,
    "fish": """source (insula completion fish | psub); complete -C "insula $(string join ' ' -- $argv)" """,
}


@pytest.mark.parametrize("shell", PRESS_TAB)
def test_shells_really_complete(shell: str, stub: StubDaemon, place: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    environment = {"INSULA_SOCKET": str(stub.path), "PATH": f"{place}:/usr/bin:/bin", "HOME": str(place)}

    def press_tab(*words: str) -> list[str]:
        command = [shell, "-c", PRESS_TAB[shell], *([] if shell == "fish" else [shell]), *words]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=place)
        assert done.stderr == ""
        return [line.split("\t")[0] for line in done.stdout.split("\n") if line]

    assert press_tab("net") == ["network"]
    assert press_tab("stop", "w") == ["web"]
    assert press_tab("run", "--read") == ["--read-only"]
    assert press_tab("image", "load", "fi") == ["file.tar"]
    assert press_tab("run", "busybox", "ls", "nothing-such") == []
