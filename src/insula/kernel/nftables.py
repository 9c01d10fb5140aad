"""Nftables through libnftables(3), the library behind nft(8), without starting a process.

A command is text in the language of nft(8). One `run` is one transaction: it is applied as a whole or not at all.
Adding elements to sets takes less than 0.1 ms. A handle holds a netlink socket, so it belongs to the network namespace
that it was made in, whichever thread uses it later.
"""

from __future__ import annotations

import ctypes
import json
import threading
from typing import Any, Final

from insula.kernel import descriptors
from insula.kernel.netlink import port_ids
from insula.model.errors import Unavailable

_STATELESS: Final = 1 << 2
_JSON: Final = 1 << 4
_NUMERIC_PRIO: Final = 1 << 8
_TERSE: Final = 1 << 11

_lock = threading.Lock()  # the library's parser has global state
_library: ctypes.CDLL | None = None


class NftError(OSError):
    """A command that nft refused; the message is nft's first line of output."""

    def __init__(self, message: str, command: str) -> None:
        super().__init__(message)
        self.command = command


def _load() -> ctypes.CDLL:
    global _library
    if _library is None:
        try:
            library = ctypes.CDLL("libnftables.so.1")
        except OSError as error:
            raise Unavailable("libnftables is missing", "install Debian's package libnftables1") from error
        pointer, text = ctypes.c_void_p, ctypes.c_char_p
        library.nft_ctx_new.restype = pointer
        library.nft_ctx_new.argtypes = [ctypes.c_uint32]
        library.nft_run_cmd_from_buffer.argtypes = [pointer, text]
        library.nft_ctx_output_set_flags.argtypes = [pointer, ctypes.c_uint]
        for name in ("nft_ctx_free", "nft_ctx_buffer_output", "nft_ctx_buffer_error"):
            getattr(library, name).argtypes = [pointer]
        for name in ("nft_ctx_get_output_buffer", "nft_ctx_get_error_buffer"):
            getattr(library, name).argtypes = [pointer]
            getattr(library, name).restype = text
        _library = library
    return _library


class Nft:
    """A handle in the network namespace of the calling thread. Its methods may be called from any thread."""

    def __init__(self) -> None:
        with _lock:
            self._library = _load()
            self._descriptor = descriptors.require_selectable("libnftables")
            self._port = 0
            self._context: int | None = self._library.nft_ctx_new(0)
            if not self._context:
                raise Unavailable("cannot open nftables", "use a kernel with nf_tables")
            self._library.nft_ctx_buffer_output(self._context)
            self._library.nft_ctx_buffer_error(self._context)

    def close(self) -> None:
        with _lock:
            if self._context:
                self._library.nft_ctx_free(self._context)
                port_ids.discard(self._port)
            self._context = None

    def __enter__(self) -> Nft:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, command: str, flags: int = _NUMERIC_PRIO) -> str:
        """Run commands as one transaction and return their output. `NftError`; Unavailable once closed."""
        with _lock:
            if self._context is None:  # another thread has closed it; the library does not check for a null pointer
                raise Unavailable("the handle of nftables is closed", "try again")
            self._library.nft_ctx_output_set_flags(self._context, flags)
            failed = self._library.nft_run_cmd_from_buffer(self._context, command.encode())
            if not self._port and (port := port_ids.of(self._descriptor)):  # it has one since it was used
                self._port = port
                port_ids.add(port)
            output: bytes = self._library.nft_ctx_get_output_buffer(self._context) or b""
            errors: bytes = self._library.nft_ctx_get_error_buffer(self._context) or b""
        if failed:
            lines = errors.decode(errors="replace").strip().splitlines() or ["refused without a reason"]
            raise NftError(f"nftables: {lines[0]}", command)
        return output.decode(errors="replace")

    def tables(self) -> list[tuple[str, str]]:
        """Return (family, name) of all tables."""
        listed = self._json("list tables")
        return [(item["table"]["family"], item["table"]["name"]) for item in listed if "table" in item]

    def rules(self, family: str, table: str) -> str:
        """Return a table's static part as text, without elements of sets and counters; "" if there is no such table."""
        if (family, table) not in self.tables():
            return ""
        return self.run(f"list table {family} {table}", _STATELESS | _TERSE | _NUMERIC_PRIO)

    def elements(self, family: str, table: str) -> dict[str, set[tuple[str, ...]]]:
        """Return the elements of all sets of a table by the set's name, each as the tuple of its concatenated parts."""
        listed = self._json(f"list sets {family}")
        sets = [item["set"] for item in listed if "set" in item and item["set"]["table"] == table]
        return {s["name"]: {_element(e) for e in s.get("elem", [])} for s in sets}

    def _json(self, command: str) -> list[dict[str, Any]]:
        listed: list[dict[str, Any]] = json.loads(self.run(command, _JSON))["nftables"]
        return listed


def _element(value: Any) -> tuple[str, ...]:
    if isinstance(value, dict) and "elem" in value:  # with a comment, timeout or counter
        value = value["elem"]["val"]
    if isinstance(value, dict) and "concat" in value:
        return tuple(str(part) for part in value["concat"])
    return (str(value),)
