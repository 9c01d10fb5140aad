"""The command: makes mutants of the modules in targets.toml and runs their tests, one mutant at a time.

    python -m tests.mutants [--count N] [--seed S] [MODULE…]

At most N mutants of each module are tried (8), chosen by the seed (0). A MODULE is a part of a path in targets.toml.
The work is done in a copy of the checkout with an environment of its own, so that daemons that the tests start are
mutants too, and in mounts of its own, in which the rest of the host's disk is read-only. Survivors are printed as
FILE:LINE, before and after. The exit status is 0 whatever survives: a person judges.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Literal

from tests.mutants.operators import Mutant, mutants

CHECKOUT = Path(__file__).parents[2]
TARGETS = Path(__file__).with_name("targets.toml")
FACTOR, LEAST = 5.0, 60.0
"""A mutant's tests may take so many times what they take without a change, and so many seconds at least."""
CONFINE = """
mount --bind "$1" "$1" && mount --bind "$1/tmp" /tmp && mount -t tmpfs run /run || exit 1
mkdir /run/dev && mount -t tmpfs -o mode=755 dev /run/dev && cp -a --one-file-system /dev/. /run/dev || exit 1
mount --rbind /dev/pts /run/dev/pts && mount --move /run/dev /dev && mount -o remount,bind,ro / || exit 1
cd "$1" || exit 1  # the directory that it starts in is below the mount that is read-only now
shift
exec "$@" </dev/null >"$OUTPUT" 2>&1
"""
"""A mutant runs as root and may do anything, as chmod the host's root directory or chown its /dev/null: so the host's
disk is read-only, devices have nodes of their own, and no descriptor of the host's is passed on."""

Outcome = Literal["killed", "hangs", "survives"]


class Copy:
    """A copy of the checkout whose Python imports the copy's modules."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "tmp").mkdir(mode=0o1777)
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=CHECKOUT,
            check=True,
            capture_output=True,
        ).stdout
        subprocess.run(
            ["cp", "--parents", "-t", path, "--", *listed.decode().split("\0")[:-1]], cwd=CHECKOUT, check=True
        )
        environment = path / ".venv"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
        self.python = environment / "bin" / "python"
        (site,) = environment.glob("lib/python*/site-packages")
        # ours first: then the editable install of the checkout, among the others' packages, is never looked at
        packages = next(entry for entry in sys.path if entry.endswith("site-packages"))
        (site / "copy.pth").write_text(f"{path / 'src'}\n{packages}\n")

    def source(self, module: str) -> Path:
        return self.path / "src" / module

    @property
    def output(self) -> Path:
        """The output of the last run."""
        return self.path / "tmp" / "output"

    def run(self, tests: list[str], timeout: float) -> Outcome:
        """Run these tests on the copy as it is now."""
        confined = ["unshare", "--mount", "--propagation", "private", "sh", "-c", CONFINE, "sh", str(self.path)]
        command = [str(self.python), "-B", "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
        process = subprocess.Popen(
            [*confined, *command],
            cwd=self.path,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env={
                "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
                "HYPOTHESIS_STORAGE_DIRECTORY": f"{self.path}/.hypothesis",
                "OUTPUT": str(self.output),
            },
            start_new_session=True,
        )
        try:
            return "killed" if process.wait(timeout) else "survives"
        except subprocess.TimeoutExpired:
            return "hangs"
        finally:
            with contextlib.suppress(ProcessLookupError):  # the first process of its PID namespace takes along the rest
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def try_module(copy: Copy, module: str, tests: list[str], count: int, seed: int) -> tuple[int, list[Mutant]]:
    """How many mutants of the module were tried, and those that survived. The copy is as before afterwards."""
    path = copy.source(module)
    source = path.read_text()
    started = time.monotonic()
    if copy.run(tests, timeout=1800) != "survives":
        print(copy.output.read_text(errors="replace")[-4000:])
        raise SystemExit(f"error: the tests of {module} fail without any change; hint: see their lines above")
    timeout = max(LEAST, FACTOR * (time.monotonic() - started))
    every = list(mutants(source))
    chosen = random.Random(f"{seed} {module}").sample(every, min(count, len(every)))
    survivors = []
    try:
        for mutant in chosen:
            path.write_text(mutant.source)
            for cached in path.parent.glob(f"__pycache__/{path.stem}.*"):
                cached.unlink()
            if copy.run(tests, timeout) == "survives":
                survivors.append(mutant)
                print(f"survives  {module}:{mutant.line}  {_shown(mutant)}", flush=True)
    finally:
        path.write_text(source)
    print(f"{module}: {len(chosen) - len(survivors)} of {len(chosen)} killed ({len(every)} possible)", flush=True)
    return len(chosen), survivors


def _shown(mutant: Mutant) -> str:
    """The change in one line: both versions, or the line that a text of many lines has lost."""
    if "\n" in mutant.before and (texts := _texts(mutant)):
        before, after = (text.splitlines() for text in texts)
        lost = next((line for line, other in zip(before, [*after, ""], strict=False) if line != other), "")
        return f"without the line  {_line(lost)}"
    return f"{_line(mutant.before)}  →  {_line(mutant.after)}"


def _texts(mutant: Mutant) -> tuple[str, str] | None:
    try:
        before, after = ast.literal_eval(mutant.before), ast.literal_eval(mutant.after)
    except (ValueError, SyntaxError):
        return None
    return (before, after) if isinstance(before, str) and isinstance(after, str) else None


def _line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) < 80 else f"{text[:77]}…"


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/test mutants", description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", metavar="MODULE", help="a part of a path in targets.toml; default: all")
    parser.add_argument("--count", type=int, default=8, help="mutants of a module")
    parser.add_argument("--seed", type=int, default=0, help="chooses other ones")
    options = parser.parse_args()
    targets: dict[str, list[str]] = tomllib.loads(TARGETS.read_text())
    chosen = {m: t for m, t in targets.items() if not options.modules or any(part in m for part in options.modules)}
    if not chosen:
        parser.error(f"no module in {TARGETS.name} has a path with any of these: {' '.join(options.modules)}")
    tried = survived = 0
    with tempfile.TemporaryDirectory(prefix="insula-mutants-", dir="/var/tmp") as scratch:
        copy = Copy(Path(scratch))
        for module, tests in chosen.items():
            count, survivors = try_module(copy, module, tests, options.count, options.seed)
            tried += count
            survived += len(survivors)
    print(f"{tried - survived} of {tried} mutants killed: {100 * (tried - survived) // tried} %")
    return 0


if __name__ == "__main__":
    sys.exit(main())
