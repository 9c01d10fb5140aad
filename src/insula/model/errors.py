"""What can go wrong, as one tree.

    InsulaError                 what went wrong, and a hint what to do about it
    ├── Invalid                 the input is wrong; nothing was changed        HTTP 400
    ├── Denied                  the caller may not do this                     HTTP 403
    ├── NotFound                no object of that name                         HTTP 404
    ├── Conflict                the name, address or state is taken            HTTP 409
    ├── QuotaExceeded           a limit of the tenant forbids it               HTTP 422
    ├── Failed                  the engine tried, failed, and undid its work   HTTP 500
    └── Unavailable             this host lacks what it takes                  HTTP 503

On the command line each is one line: ``error: what; hint: what to do``.
"""

from __future__ import annotations


class InsulaError(Exception):
    """`message` says what went wrong, `hint` what to do; `status` is the HTTP status it travels as."""

    status = 500
    exit_status: int | None = None
    """What `insula run` and `exec` exit with because of it: 126 and 127 as a shell's; None means 125."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = _encodable(message)
        self.hint = hint and _encodable(hint)

    def __str__(self) -> str:
        return f"{self.message}; hint: {self.hint}" if self.hint else self.message

    def to_dict(self) -> dict[str, str | None]:
        data = {"error": type(self).__name__, "message": self.message, "hint": self.hint}
        return data if self.exit_status is None else {**data, "exit_status": str(self.exit_status)}


def _encodable(text: str) -> str:
    """`text` with surrogates escaped: names of files that are not UTF-8 have them (PEP 383), and no JSON."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode("utf-8")


class Invalid(InsulaError):
    status = 400


class Denied(InsulaError):
    status = 403


class NotFound(InsulaError):
    status = 404


class Conflict(InsulaError):
    status = 409


class QuotaExceeded(InsulaError):
    status = 422


class Failed(InsulaError):
    status = 500


class Unavailable(InsulaError):
    status = 503


_BY_NAME: dict[str, type[InsulaError]] = {
    c.__name__: c for c in (InsulaError, Invalid, Denied, NotFound, Conflict, QuotaExceeded, Failed, Unavailable)
}


def from_dict(data: dict[str, str | None]) -> InsulaError:
    """The inverse of `InsulaError.to_dict`, for clients; an unknown kind becomes `Failed`."""
    kind = _BY_NAME.get(data.get("error") or "", Failed)
    error = kind(data.get("message") or "unknown error", data.get("hint"))
    exit_status = data.get("exit_status") or ""
    error.exit_status = int(exit_status) if exit_status.isdigit() else None
    return error
