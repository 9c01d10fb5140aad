"""JSON without the package `json`, whose import alone takes 6 ms: half of what starting Python takes.

`json` is a shell in Python, with regular expressions, around a scanner and an encoder in C. These two functions call
the C parts of CPython, `_json`, directly; what they accept and write is the same, and errors are left to `json`.
"""

from __future__ import annotations

from _json import encode_basestring_ascii, make_encoder, make_scanner

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_SPACE = " \t\n\r"


class _Decoding:
    """What the scanner asks its json.JSONDecoder for."""

    strict = True
    object_hook = None
    object_pairs_hook = None
    parse_float = float
    parse_int = int

    @staticmethod
    def parse_constant(name: str) -> object:
        raise ValueError(f"{name} is not JSON")


def loads(data: bytes | str) -> Any:
    """The value that `data` is, in UTF-8 if it is bytes; ValueError if it is no JSON, or too deep to be read."""
    text = data if isinstance(data, str) else data.decode()
    start = len(text) - len(text.lstrip(_SPACE))
    try:
        value, end = make_scanner(_Decoding)(text, start)  # type: ignore[arg-type]
        if not text[end:].strip(_SPACE):
            return value
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except (StopIteration, ValueError, SystemError):  # the scanner makes its errors with `json`, if that is loaded
        pass
    return _explain(text)


def _explain(text: str) -> Any:
    """Raises what json.loads has to say about it."""
    import json

    return json.loads(text, parse_constant=_Decoding.parse_constant)


def dumps(value: object) -> str:
    """`value` as JSON, in ASCII and on one line; TypeError for what JSON has no word for."""
    encoder = make_encoder(None, _refuse, encode_basestring_ascii, None, ":", ",", False, False, False)
    return "".join(encoder(value, 0))


def _refuse(value: object) -> object:
    raise TypeError(f"{type(value).__name__} is not JSON")
