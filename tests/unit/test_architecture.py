"""Rules of the code base that a machine can check: import arrows, sizes, docstrings, names.

The arrows are read from the source with ast, not by importing, so that imports inside functions count as well.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from insula.model.quotas import QUOTAS

REPOSITORY = Path(__file__).parents[2]
SOURCE = REPOSITORY / "src"
MODULES = sorted((SOURCE / "insula").rglob("*.py"))
FILES = [*MODULES, *sorted((REPOSITORY / "tests").rglob("*.py")), *sorted((REPOSITORY / "bench").rglob("*.py"))]

LIBRARIES = {"container", "machine", "image", "volume", "network", "store"}
LIGHT = {"insula.model.errors", "insula.model.rules", "insula.model.units", "insula.model.stream"}
# What the runtime takes of the vocabulary: nothing of the cloud. packaging/oci makes a wheel of it, which
# tests/system/oci/test_alone.py runs.
RUNTIME = {*LIGHT, "insula.model.cpython"}

# What each package may import of Insula: whole packages, or single modules.
ARROWS: dict[str, set[str]] = {
    "model": set(),
    "log": set(),
    "audit": set(),
    "manual": {"cli", "oci", "api", "settings"},
    "settings": {"model"},
    "kernel": {"log", *RUNTIME},
    "tree": LIGHT,
    **{package: {"kernel", "model"} for package in LIBRARIES},
    "container": {"tree", "kernel", "log", *RUNTIME},
    "agent": {"container", "machine", "kernel", "log", *RUNTIME},
    "control": {*LIBRARIES, "kernel", "model", "settings"},
    "api": {"control", *LIBRARIES, "kernel", "model", "settings", "log", "audit"},
    "oci": {"container", "kernel", *RUNTIME},
    "client": RUNTIME,
    "sdk": {"client", "model"},
    "cli": {
        "client",
        "tree",
        "insula.model.publishing",
        "insula.model.quotas",
        *RUNTIME,
        "insula.audit",
    },  # audit is the standard library alone
}
# What each may import of others' packages; the command line starts in milliseconds because it has none.
PACKAGES: dict[str, set[str]] = {
    "client": set(),
    "cli": set(),
    "oci": set(),
    "agent": set(),
    "tree": set(),
    "sdk": {"msgspec"},
    "api": {"msgspec", "prometheus_client", "litestar", "uvicorn", "h11", "cryptography"},
    "control": {"msgspec", "yaml", "joserfc"},
}
UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")


def module_name(path: Path) -> str:
    """``src/insula/model/units.py`` → ``insula.model.units``."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of everything that `source` imports, wherever it stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: None if is_package and node.level == 1 else -node.level + is_package]
                base = ".".join([*parents, base] if base else parents)
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """One line for each import that the arrows forbid."""
    package = module.split(".")[1] if "." in module else ""
    found = []
    for line, name in imports(source, module, is_package):
        top, *rest = name.split(".")
        if top == "insula":
            target = rest[0] if rest else ""
            inside = target in {"", package} or target.startswith("__")
            arrows = ARROWS[package]
            allowed = inside or target in arrows or any(f"{name}.".startswith(f"{m}.") for m in arrows)
        else:
            allowed = top in sys.stdlib_module_names or top in PACKAGES.get(package, {"msgspec"})
        if not allowed:
            found.append(f"{module}:{line} imports {name}")
    return found


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_run_downward_only(path: Path) -> None:
    assert violations(path.read_text(), module_name(path), path.name == "__init__.py") == []


# Inside of container, in this order: none imports what comes after it.
LAYERS = ("config", "create", "service")


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_the_packages_of_the_runtime_are_layers(path: Path) -> None:
    assert upward(path.read_text(), module_name(path), path.name == "__init__.py") == []


def upward(source: str, module: str, is_package: bool = False) -> list[str]:
    """One line for each import of a later package of container in an earlier one; oci needs no service."""
    parts = module.split(".")
    if parts[1:2] == ["oci"]:
        later: tuple[str, ...] = LAYERS[2:]
    elif parts[1:2] == ["container"] and parts[2:3] and parts[2] in LAYERS:
        later = LAYERS[LAYERS.index(parts[2]) + 1 :]
    else:
        return []
    forbidden = tuple(f"insula.container.{each}" for each in later)
    return [
        f"{module}:{line} imports {name}"
        for line, name in imports(source, module, is_package)
        if forbidden and name.startswith(forbidden)
    ]


def test_that_check_sees_an_import_upward() -> None:
    assert upward("from insula.container.service import relay", "insula.container.create.init")
    assert upward("from insula.container.service.client import Runtime", "insula.oci.main")
    assert not upward("from insula.container.create import init", "insula.container.service.warm_pool")


@pytest.mark.parametrize("path", [path for path in MODULES if "container" in module_name(path).split(".")[1:2]])
def test_the_runtime_knows_no_tenant(path: Path) -> None:
    words = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
    words |= {node.arg for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.arg)}
    assert [word for word in words if re.search("tenant|Instance(Spec|Status)", word)] == []


# In control, drivers alone import what they drive; the doctor looks at the kernel by its nature.
DRIVING = ("insula.control.instances.drivers", "insula.control.doctor")


def driven(source: str, module: str, is_package: bool = False) -> list[str]:
    """One line for each import of the runtime or the kernel outside of drivers."""
    if not module.startswith("insula.control") or any(f"{module}.".startswith(f"{each}.") for each in DRIVING):
        return []
    return [
        f"{module}:{line} imports {name}"
        for line, name in imports(source, module, is_package)
        if name.startswith(("insula.container", "insula.kernel"))
    ]


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_only_drivers_import_what_they_drive(path: Path) -> None:
    assert driven(path.read_text(), module_name(path), path.name == "__init__.py") == []


def test_that_check_sees_an_import_of_a_driven_package() -> None:
    assert driven("from insula.kernel.cgroups import Cgroup", "insula.control.instances.verbs")
    assert driven("from insula.container import runtime", "insula.control.plane")
    assert not driven("from insula.kernel.cgroups import Cgroup", "insula.control.instances.drivers.groups")


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("insula.model.units", "import insula.kernel.syscalls"),
        ("insula.model.units", "from .. import kernel"),
        ("insula.network.fabric", "from insula.store import protocol"),
        ("insula.network.fabric", "def f():\n    from insula.container.service.client import Runtime"),
        ("insula.network.linux.links", "from ...image import store"),
        ("insula.control.plane", "import litestar"),
        ("insula.cli.main", "import msgspec"),
        ("insula.cli.main", "from insula.model.objects import Tenant"),
        ("insula.client.http", "from insula.api import daemon"),
        ("insula.oci.main", "from insula.control import plane"),
        ("insula.oci.state", "import msgspec"),
        ("insula.container.service.client", "from insula.model.objects import InstanceSpec"),
        ("insula.kernel.process", "from insula.model import objects"),
        ("insula.container.create.spawn", "from insula.oci import state"),
        ("insula.kernel.syscalls", "from insula import container"),
    ],
)
def test_the_check_sees_a_wrong_arrow(module: str, source: str) -> None:
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("insula.cli.main", "from insula.model.errors import InsulaError\nfrom insula.client import http\nimport json"),
        ("insula.network.linux.links", "from ..fabric import Fabric\nfrom insula.kernel import netlink"),
        ("insula.control.plane", "from insula.store.protocol import Store\nimport msgspec"),
        ("insula.oci.state", "from insula.container.create import spawn\nfrom insula.kernel import process"),
        ("insula.api.daemon", "import litestar, uvicorn\nfrom insula import __version__"),
    ],
)
def test_the_check_lets_right_arrows_pass(module: str, source: str) -> None:
    assert violations(source, module) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_a_file_has_one_concern(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") < 500
    if path.stem != "__init__" or text.strip():
        assert ast.get_docstring(ast.parse(text)), "a module begins by saying what it is about"
    if path != Path(__file__):
        assert not UNFINISHED.search(text)


# -- the event loop --------------------------------------------------------------------------------------------------

BLOCKING = re.compile(
    r"open|time\.sleep|subprocess\.(run|Popen)|shutil\.(which|rmtree|copyfile)|os\.(open|read|write|l?stat|listdir|scandir"
    r"|walk|unlink|remove|rename|replace|mkdir|makedirs|rmdir|fsync|sync|link|symlink|readlink|truncate|wait\w*"
    r"|path\.(\w*exists|is\w+|getsize|realpath))"
    r"|.*\.(read_text|read_bytes|write_text|write_bytes|unlink|mkdir|rmdir|exists|is_file|is_dir|is_symlink|iterdir|glob"
    r"|rglob|touch|chmod|l?stat)",
    re.DOTALL,
)
# What may stand in a coroutine all the same: it takes microseconds, whatever tenants do.
BRIEF = {
    ("insula.control.instances.drivers.container.request", "shutil.which"),  # two directories of the host
    ("insula.api.streams", "os.open"),  # a file without a name
}


def blocking_calls(source: str) -> Iterator[tuple[int, str]]:
    """Line and name of the calls in bodies of coroutines that may wait for a file or a process.

    Functions inside of them don't count: they are what is given to threads. Nor does what the called functions do.
    """
    for function in ast.walk(ast.parse(source)):
        todo: list[ast.AST] = [*function.body] if isinstance(function, ast.AsyncFunctionDef) else []
        while todo:
            node = todo.pop()
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                continue
            todo += ast.iter_child_nodes(node)
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                if BLOCKING.fullmatch(name):
                    yield node.lineno, name


@pytest.mark.parametrize(
    "path",
    [path for path in MODULES if module_name(path).startswith(("insula.control", "insula.api"))],
    ids=lambda path: module_name(path),
)
def test_no_coroutine_waits_for_a_file_or_a_process(path: Path) -> None:
    found = list(blocking_calls(path.read_text()))
    assert [f"{path}:{line}: {name}" for line, name in found if (module_name(path), name) not in BRIEF] == []


def test_that_check_sees_what_blocks_and_nothing_else() -> None:
    seen = """
async def f(path):
    with open(path) as file:
        os.stat(path)
    if path.exists() or os.path.isdir(path):
        return [subprocess.run([each]) for each in ()]
"""
    unseen = """
def f(path):
    return path.exists()
async def g(path):
    def inner():
        return open(path)
    await asyncio.to_thread(inner)
    await asyncio.to_thread(path.exists)
    await asyncio.to_thread(lambda: os.stat(path))
"""
    assert sorted(name for _, name in blocking_calls(seen)) == [
        "open", "os.path.isdir", "os.stat", "path.exists", "subprocess.run"
    ]  # fmt: skip
    assert list(blocking_calls(unseen)) == []


# -- private modules of CPython --------------------------------------------------------------------------------------

PRIVATE = "insula.model.cpython"
"""The one module that imports them, with what each saves."""


def private(source: str, module: str) -> list[str]:
    """One line for each import of a module of the standard library whose name begins with an underscore."""
    found = [(line, name) for line, name in imports(source, module, False) if re.match(r"_(?!_)", name)]
    return [] if module == PRIVATE else [f"{module}:{line} imports {name}" for line, name in found]


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_private_modules_are_imported_in_one_place(path: Path) -> None:
    assert private(path.read_text(), module_name(path)) == []


def test_that_check_sees_a_private_module() -> None:
    assert len(private("def f():\n    import _socket\nfrom _ctypes import dlopen", "insula.kernel.libc")) == 2
    assert private("from __future__ import annotations\nimport socket", "insula.kernel.libc") == []


# -- circles ---------------------------------------------------------------------------------------------------------


def graph(sources: dict[str, str], packages: frozenset[str] = frozenset()) -> dict[str, set[str]]:
    """Module to the modules among `sources` that it imports, wherever the import stands, `TYPE_CHECKING` included."""
    found: dict[str, set[str]] = {}
    for module, source in sources.items():
        targets = set()
        for _, name in imports(source, module, module in packages):
            target = name if name in sources else name.rpartition(".")[0]
            if target in sources and target != module:
                targets.add(target)
        found[module] = targets
    return found


def circles(edges: dict[str, set[str]]) -> list[set[str]]:
    """The sets of more than one module, each of which reaches each other."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        todo = [start]
        while todo:
            for target in edges[todo.pop()] - seen:
                seen.add(target)
                todo.append(target)
        return seen

    reach = {module: reached(module) for module in edges}
    found = {frozenset(other for other in reach[m] if m in reach[other]) for m in edges if m in reach[m]}
    return sorted(map(set, found), key=min)


def test_no_imports_go_round_in_a_circle() -> None:
    packages = frozenset(module_name(path) for path in MODULES if path.name == "__init__.py")
    assert circles(graph({module_name(path): path.read_text() for path in MODULES}, packages)) == []


def test_that_check_sees_a_circle() -> None:
    sources = {
        "insula.a": "from insula import b",
        "insula.b": "def f():\n    from insula.c import thing",
        "insula.c": "TYPE_CHECKING = False\nif TYPE_CHECKING:\n    from insula.a import Thing",
        "insula.d": "from insula import a",
    }
    assert circles(graph(sources)) == [{"insula.a", "insula.b", "insula.c"}]
    assert circles(graph({**sources, "insula.c": "import os"})) == []


# -- names -----------------------------------------------------------------------------------------------------------


def class_names(source: str) -> set[str]:
    """The public classes and type aliases of a module; type variables are none."""
    tree = ast.parse(source)
    names = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    for node in tree.body:
        if isinstance(node, ast.Assign) and not isinstance(node.value, ast.Call):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return {name for name in names if re.fullmatch(r"[A-Z]\w*[a-z]\w*", name)}


def names_in_two_modules(sources: dict[str, str]) -> list[str]:
    """One line for each class or type alias that more than one module defines."""
    owners: dict[str, list[str]] = {}
    for module, source in sources.items():
        for name in class_names(source):
            owners.setdefault(name, []).append(module)
    return [f"{name}: {', '.join(modules)}" for name, modules in sorted(owners.items()) if len(modules) > 1]


def test_a_class_name_means_one_thing() -> None:
    assert names_in_two_modules({module_name(path): path.read_text() for path in MODULES}) == []


def test_that_check_sees_a_name_in_two_modules() -> None:
    sources = {
        "insula.a": "class Probe: pass\nclass _Mount: pass\nT = TypeVar('T')\nLIMIT = 1",
        "insula.b": "if TYPE_CHECKING:\n    class Probe: pass\nclass _Mount: pass\nT = TypeVar('T')\nLIMIT = 1",
        "insula.c": "State = Literal['on']",
        "insula.d": "State = int\nclass Probes: pass",
    }
    assert names_in_two_modules(sources) == ["Probe: insula.a, insula.b", "State: insula.c, insula.d"]


# -- quotas ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("module", "name"), [("model/objects.py", "Limits"), ("sdk/types.py", "LimitOptions")])
def test_type_checkers_see_every_quota(module: str, name: str) -> None:
    """The struct is made of the table; what a type checker reads is written by hand."""
    tree = ast.parse((SOURCE / "insula" / module).read_text())
    [shown] = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == name]
    fields = {
        ast.unparse(each.target): ast.unparse(each.annotation) for each in shown.body if isinstance(each, ast.AnnAssign)
    }
    wanted = {name: "int | None" if quota.whole else "float | None" for name, quota in QUOTAS.items()}
    assert list(fields.items()) == list(wanted.items()), f"add the new quota to {module}"
