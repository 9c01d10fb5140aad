"""The modules of a verb in one file, which `packaging/insula-oci` reads in place of sixty.

For each imported module, Python searches the path, compares the times of two files, reads one and turns it into code
objects (marshal). That takes a tenth of a millisecond each, and half of the time of `insula-oci run`. So scripts/up has
each verb that engines call import its modules once, and writes the code of Insula's modules to a file, in the order in
which their import was complete. Executed in this order, each finds the modules that it imports. Modules that are in no
such file, such as other verbs, and Python's own, are imported as usual.

    insula-oci.run.cpython-311    the length of the first part, in four bytes; the modules that `sealed.ensure` takes;
                                  the rest. A part is a marshalled list of (name, directory of a package or None, code)
"""

from __future__ import annotations

import marshal
import os
import subprocess
import sys
from types import ModuleType

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import CodeType

    Entry = tuple[str, str | None, CodeType]

FIRST = ("__future__", "insula", "insula.kernel", "insula.kernel.sealed")
"""The modules that are executed before it is known whether Python starts once more."""

_SMALL = ("__future__", "struct")  # Python's own modules that are small, and that all verbs import

_GROUP = "insula.kernel.cgroups.v{version}"
_NEW = ("insula.kernel.seccomp.cache", _GROUP)
VERBS: dict[str, tuple[str, ...]] = {
    # verb: what it nearly always imports besides, later than at its beginning
    "create": _NEW,
    "run": _NEW,
    "exec": _NEW,
    "start": (),
    "state": (_GROUP,),
    "kill": (_GROUP,),
    "delete": (_GROUP,),
}


def write(directory: str) -> None:
    """Write the file of each verb into `directory`."""
    library = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    code = "import sys; sys.path.append(sys.argv[1]); from insula.oci import preload; preload.write_one(*sys.argv[2:])"
    for verb in VERBS:
        subprocess.run(
            [sys.executable, "-ISE", "-X", "no_debug_ranges", "-c", code, library, directory, verb], check=True
        )


def write_one(directory: str, verb: str) -> None:
    """Write the file of one verb, in an interpreter that has imported no other module of Insula than this one."""
    from insula.kernel.cgroups import hierarchy

    for name in (*FIRST, "insula.oci.main", f"insula.oci.verbs.{verb}", *VERBS[verb]):
        __import__(name.format(version=hierarchy().version))
    ours = [name for name in sys.modules if name.partition(".")[0] == "insula" and name != __name__]
    with open(f"{directory}/insula-oci.{verb}.{sys.implementation.cache_tag}", "wb") as file:
        rest = [name for name in (*_SMALL, *ours) if name not in FIRST]
        parts = [marshal.dumps([_entry(name, sys.modules[name]) for name in names]) for names in (FIRST, rest)]
        file.write(b"".join([len(parts[0]).to_bytes(4, "little"), *parts]))


def _entry(name: str, module: ModuleType) -> Entry:
    path = getattr(module, "__path__", None)
    file = module.__file__ or ""
    with open(file, "rb") as source:
        code = compile(source.read(), file, "exec", dont_inherit=True, optimize=2)  # docstrings are a fifth of it
    return name, path[0] if path else None, code


if __name__ == "__main__":
    write(sys.argv[1])
