"""The library libvirt, imported when a hypervisor of it is configured, and not before.

Debian installs it for its own Python. Insula has an environment of its own, and takes these two modules from there, and
nothing else: sys.path is left alone.
"""

from __future__ import annotations

import sys
import threading
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from typing import Any, Final

from insula.model.errors import Unavailable

DIRECTORY: Final = "/usr/lib/python3/dist-packages"
HINT: Final = "apt-get install python3-libvirt"
_lock = threading.Lock()
_loaded: list[Any] = []


def load() -> Any:
    """Return the module, with its event loop running in a thread. Unavailable if it is not installed."""
    with _lock:
        if not _loaded:
            _import("libvirtmod")
            library = _import("libvirt")
            library.registerErrorHandler(lambda *_: None, None)  # errors are raised; it would print them too
            library.virEventRegisterDefaultImpl()  # before the first connection
            threading.Thread(target=_run_events, args=[library], name="libvirt events", daemon=True).start()
            _loaded.append(library)
    return _loaded[0]


def _import(name: str) -> Any:
    if name in sys.modules:
        return sys.modules[name]
    spec = PathFinder.find_spec(name, [DIRECTORY])
    if spec is None or spec.loader is None:
        raise Unavailable(f"the library libvirt is not in {DIRECTORY}, for this Python", HINT)
    module = module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        del sys.modules[name]
        raise Unavailable(f"the library libvirt can't be loaded: {error}", HINT) from error
    return module


def _run_events(library: Any) -> None:
    """Run the event loop for as long as the process lives: it is one for all connections, and it can't be ended."""
    while True:
        library.virEventRunDefaultImpl()
