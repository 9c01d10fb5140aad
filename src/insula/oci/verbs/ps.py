"""``ps ID``: print the processes of a container as ps(1) of the host shows them, or their IDs as JSON."""

from __future__ import annotations

from insula.model.errors import Invalid, Unavailable
from insula.oci.state import Container
from insula.oci.verbs.pause import group_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from insula.oci.options import VerbArguments


def run(arguments: VerbArguments) -> int:
    pids = group_of(Container(arguments.root, arguments.id).load()).processes()
    if arguments.format == "json":
        print(pids)
        return 0
    for line in select(_ps(arguments.options or ["-ef"]), pids):
        print(line)
    return 0


def _ps(options: list[str]) -> list[str]:
    import subprocess

    try:
        done = subprocess.run(["ps", *options], capture_output=True, text=True, errors="replace", check=False)
    except FileNotFoundError:
        raise Unavailable("ps is not installed", "use --format json, or apt-get install procps") from None
    if done.returncode:
        raise Invalid(f"ps refuses {' '.join(options)[:60]!r}: {done.stderr.strip()[:100]}", "see ps(1)")
    return done.stdout.splitlines()


def select(lines: list[str], pids: list[int]) -> list[str]:
    """The heading, and the lines whose PID is one of `pids`."""
    heading = lines[0].split() if lines else []
    if "PID" not in heading:
        raise Invalid("ps shows no column PID", "use options that show it, as in -ef")
    column = heading.index("PID")
    wanted = {str(pid) for pid in pids}
    return [
        lines[0],
        *(line for line in lines[1:] if line.split()[column : column + 1] and line.split()[column] in wanted),
    ]
