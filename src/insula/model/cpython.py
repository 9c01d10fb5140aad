"""The parts of standard library modules that are written in C, without their Python parts, which load slowly.

`insula-oci run` is to take at most 1.3 times as long as `crun run` with a plain config, which leaves it about three
milliseconds; `insula exec` is to take a third of `docker exec`. The public modules take more, in processor time
(medians of 60 starts each, Python 3.11):

    signal       3.9 ms    its enumerations
    socket       6.0 ms    the same, and selectors
    json         6.9 ms    regular expressions
    hashlib      3.0 ms    OpenSSL
    all four    12.9 ms    the parts in C: 0.6 ms

With them `insula ps` takes 25 ms of processor time, of which 8 are Python's own start, and without them 13 (30 rounds).

No other module imports them. On an interpreter that lacks them the public modules are used, which are slower.
`socket.socket` has neither accept() nor `with` here; signals are integers.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket as socket
    import signal
    from hashlib import blake2b
    from typing import Any
else:
    try:
        import _signal as signal
        import _socket as socket
        from _blake2 import blake2b
    except ImportError:
        import signal
        import socket
        from hashlib import blake2b
try:
    from _json import encode_basestring_ascii, make_encoder, make_scanner

    _HAS_JSON = True
except ImportError:
    _HAS_JSON = False

__all__ = ["blake2b", "dumps", "loads", "signal", "socket"]

_SPACE = " \t\n\r"


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


class _Decoding:
    """The options that the scanner reads from its json.JSONDecoder."""

    strict = True
    object_hook = None
    object_pairs_hook = None
    parse_float = float
    parse_int = int
    parse_constant = staticmethod(_refuse_constant)


def loads(data: bytes | str) -> Any:
    """Decode JSON text, in UTF-8 if it is bytes; ValueError if it is malformed, or nested too deeply."""
    text = data if isinstance(data, str) else data.decode()
    if _HAS_JSON:
        start = len(text) - len(text.lstrip(_SPACE))
        try:
            value, end = make_scanner(_Decoding)(text, start)  # type: ignore[arg-type]
            if not text[end:].strip(_SPACE):
                return value
        except RecursionError:
            raise ValueError("nested too deeply") from None
        except (StopIteration, ValueError, SystemError):  # the scanner makes its errors with `json`, if that is loaded
            pass
    return _loads_by_json(text)


def _loads_by_json(text: str) -> Any:
    """Decode with the public module, whose errors are better."""
    import json

    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def dumps(value: object) -> str:
    """Encode `value` as JSON, in ASCII and on one line; TypeError for a value that JSON can't represent."""
    if not _HAS_JSON:
        import json

        return json.dumps(value, separators=(",", ":"), check_circular=False)
    encoder = make_encoder(None, _refuse, encode_basestring_ascii, None, ":", ",", False, False, False)
    return "".join(encoder(value, 0))


def _refuse(value: object) -> object:
    raise TypeError(f"{type(value).__name__} is not JSON")
