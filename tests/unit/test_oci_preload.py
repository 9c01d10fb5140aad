"""The files from which `insula-oci` loads the modules of a verb: they are complete, and not required."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SOURCE = REPOSITORY / "src"
ARGUMENTS = {"create": ["--bundle", "/nowhere", "x"], "run": ["--bundle", "/nowhere", "x"], "exec": ["x", "true"]}
VERBS = ["create", "run", "exec", "start", "state", "kill", "delete"]
EXPECTED = {"create": "/nowhere/config.json", "run": "/nowhere/config.json"}


def launcher(directory: Path, library: Path, preload: Path) -> Path:
    text = (REPOSITORY / "packaging" / "insula-oci").read_text().replace("@SEALED@", "/usr/bin")
    program = directory / "insula-oci"
    program.write_text(text.replace("@LIBRARY@", str(library)).replace("@PRELOAD@", str(preload)))
    program.chmod(0o755)
    return program


def run(program: Path, root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, "--root", root, *arguments], capture_output=True, text=True)


@pytest.fixture(scope="module")
def preloaded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("preload")
    subprocess.run(["/usr/bin/python3", "-ISE", SOURCE / "insula/oci/preload.py", target], check=True)
    return target


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_needs_no_other_file_up_to_its_first_answer(preloaded: Path, tmp_path: Path, verb: str) -> None:
    nothing = tmp_path / "nothing"
    done = run(launcher(tmp_path, nothing, preloaded), tmp_path, verb, *ARGUMENTS.get(verb, ["x"]))
    assert done.stderr.startswith(f"error: {EXPECTED.get(verb, 'container does not exist: x')}"), done.stderr
    assert done.returncode == (255 if verb == "exec" else 1)
    assert "ModuleNotFoundError" in run(launcher(tmp_path, nothing, nothing), tmp_path, verb, "x").stderr


@pytest.mark.parametrize("verb", [*VERBS, "list"])
def test_without_the_files_everything_works_the_same(preloaded: Path, tmp_path: Path, verb: str) -> None:
    arguments = ["--format", "json"] if verb == "list" else ARGUMENTS.get(verb, ["x"])
    outcomes = []
    for preload in (preloaded, tmp_path / "nothing"):
        done = run(launcher(tmp_path, SOURCE, preload), tmp_path, verb, *arguments)
        outcomes.append((done.returncode, done.stdout, done.stderr))
    assert outcomes[0] == outcomes[1]


def test_modules_missing_in_the_file_are_found_in_the_package(preloaded: Path, tmp_path: Path) -> None:
    done = run(launcher(tmp_path, SOURCE, preloaded), tmp_path, "run", "--nope", "x")  # its hint takes difflib
    assert done.stderr.startswith("error: there is no option '--nope'"), done.stderr
    done = run(
        launcher(tmp_path, SOURCE, preloaded), tmp_path, "list", "state"
    )  # the verb is not the one that it seems
    assert done.stderr.startswith("error: unexpected argument 'state'"), done.stderr
