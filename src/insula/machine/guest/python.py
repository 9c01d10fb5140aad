"""The files that a Python program needs: the host's own interpreter, its libraries, and modules, without the rest.

A machine's agent is Python, and the host has Python; so nothing is compiled and no binary is kept. A run of the
interpreter that imports the program shows what it takes: modules in `sys.modules`, and libraries in
/proc/self/maps. All modules go, compiled, into one archive, from which Python imports too (zipimport).
"""

from __future__ import annotations

import io
import os
import py_compile
import subprocess
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

PYTHON = "/usr/bin/python3"
_TIMEOUT = 60
_LISTING = """\
import importlib, json, os, sys
sys.path[0:0] = {paths!r}
for name in {names!r}: importlib.import_module(name)
files = {{name: getattr(module, "__file__", None) for name, module in list(sys.modules.items())}}
maps = sorted({{line.split(maxsplit=5)[5].rstrip() for line in open("/proc/self/maps") if line.count("/") > 1}})
print(json.dumps([os.path.realpath(sys.executable), sys.version_info[:2], files, maps, os.path.dirname(os.__file__)]))
"""
_ALWAYS = ("encodings.ascii", "encodings.latin_1", "encodings.cp437")
"""Modules that the interpreter imports by name, for file names in archives and for C's locale."""


class Closure(NamedTuple):
    """An interpreter by its path in the guest, and files by theirs; links have the path that they lead to."""

    interpreter: str
    files: dict[str, bytes]
    links: dict[str, str]


def closure(modules: Iterable[str], source: Path) -> Closure:
    """The files for a program of these modules, which are below the directory `source` or in the standard library.
    RuntimeError if they can't be imported by the host's interpreter alone."""
    code = _LISTING.format(paths=[str(source)], names=[*modules, *_ALWAYS])
    command = [PYTHON, "-ISB", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT)
    if done.returncode:
        raise RuntimeError(f"{PYTHON} can't import the agent: {done.stderr.strip()[-300:]}")
    interpreter, version, found, maps, standard = msgspec.json.decode(done.stdout)
    roots = [Path(source), Path(standard)]
    sources = {Path(file) for file in found.values() if file and file.endswith(".py")}
    files = {interpreter: Path(interpreter).read_bytes()}
    files[f"{Path(standard).parent}/python{version[0]}{version[1]}.zip"] = _archive(sources, roots)
    links: dict[str, str] = {}
    for path in maps:
        if path != interpreter and ".so" in path:
            files[path] = Path(path).read_bytes()
            links |= dict.fromkeys(_names_of(Path(path)), path)
    return Closure(interpreter, files, links)


def _archive(sources: Iterable[Path], roots: list[Path]) -> bytes:
    """A zip with the modules, compiled without docstrings, which are used whatever the time of their source."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as zipped, tempfile.TemporaryDirectory() as directory:
        compiled = Path(directory, "compiled")
        for path in sorted(sources):
            root = next((each for each in roots if path.is_relative_to(each)), None)
            if root is None:  # of -c
                continue
            unchecked = py_compile.PycInvalidationMode.UNCHECKED_HASH
            py_compile.compile(str(path), str(compiled), doraise=True, optimize=2, invalidation_mode=unchecked)
            entry = zipfile.ZipInfo(f"{path.relative_to(root)}c")
            zipped.writestr(entry, compiled.read_bytes())
    return archive.getvalue()


def _names_of(library: Path) -> Iterator[str]:
    """Other names by which the dynamic linker looks for a library: links to it in its directory, and /lib64."""
    for entry in os.scandir(library.parent):
        if entry.is_symlink() and os.path.realpath(entry.path) == str(library):
            yield entry.path
    if library.name.startswith("ld-linux-x86-64"):
        yield f"/lib64/{library.name}"
