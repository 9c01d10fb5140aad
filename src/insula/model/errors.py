"""The exceptions for users.

    InsulaError                 a message, and a hint what to do about it
    ├── Invalid                 the input is wrong; nothing was changed        HTTP 400
    ├── Unauthenticated         the proof of who the caller is is not valid    HTTP 401
    ├── Denied                  the caller may not do this                     HTTP 403
    ├── NotFound                no object of that name                         HTTP 404
    ├── Conflict                the name, address or state is taken            HTTP 409
    ├── QuotaExceeded           a limit of the tenant forbids it               HTTP 422
    ├── IdempotencyKeyReused    the key belongs to another request             HTTP 422
    ├── TooManyRequests         too many at a time; `retry_after` says when    HTTP 429
    ├── Failed                  the engine tried, failed, and undid its work   HTTP 500
    └── Unavailable             this host lacks a requirement                  HTTP 503

On the command line each is one line: ``error: what; hint: what to do``. In the API it is a problem (RFC 9457).
"""

from __future__ import annotations


class InsulaError(Exception):
    """An error: `message` says what is wrong, `hint` what to do; `status` is its HTTP status, `title` a summary of its
    kind. `retry_after` are the seconds after which the same request may succeed, if that is known."""

    status = 500
    title = "Something failed"
    retry_after: float | None = None
    exit_status: int | None = None
    """The exit status of `insula run` and `exec` for it: 126 and 127 as in a shell; None means 125."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = _encodable(message)
        self.hint = hint and _encodable(hint)

    def __str__(self) -> str:
        return f"{self.message}; hint: {self.hint}" if self.hint else self.message

    def to_dict(self) -> dict[str, str | None]:
        data = {"error": self.code, "message": self.message, "hint": self.hint}
        return data if self.exit_status is None else {**data, "exit_status": str(self.exit_status)}

    @property
    def code(self) -> str:
        """The name of its kind: the class of this module that it is of."""
        return next(kind.__name__ for kind in type(self).__mro__ if kind.__module__ == __name__)

    @property
    def http_status(self) -> int:
        """Its HTTP status: 422 if the program that was to be run is at fault, else `status`."""
        return self.status if self.exit_status is None else 422

    def to_problem(self, status: int | None = None) -> dict[str, str | int | None]:
        """Return the members of a problem (RFC 9457) with `code` and `hint`. Clients before it read those of
        `to_dict`."""
        return {
            "type": f"urn:insula:error:{self.code}",
            "title": self.title,
            "status": status or self.http_status,
            "detail": self.message,
            "code": self.code,
            **self.to_dict(),
        }


def _encodable(text: str) -> str:
    """Escape surrogates, which names of files that are not UTF-8 contain (PEP 383), and JSON can't have."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode("utf-8")


class Invalid(InsulaError):
    status = 400
    title = "The request is wrong"


class Unauthenticated(InsulaError):
    status = 401
    title = "The proof of who you are is not valid"


class Denied(InsulaError):
    status = 403
    title = "You may not do this"


class NotFound(InsulaError):
    status = 404
    title = "There is no such object"


class Conflict(InsulaError):
    status = 409
    title = "The state does not allow this"


class QuotaExceeded(InsulaError):
    status = 422
    title = "A limit of the tenant is reached"


class IdempotencyKeyReused(InsulaError):
    status = 422
    title = "The idempotency key belongs to another request"


class TooManyRequests(InsulaError):
    status = 429
    title = "Too many requests"

    def __init__(self, message: str, hint: str | None = None, retry_after: float = 1.0) -> None:
        super().__init__(message, hint or f"try again in {max(1, round(retry_after))} s")
        self.retry_after = retry_after


class Failed(InsulaError):
    status = 500
    title = "Insula tried and failed"


class Unavailable(InsulaError):
    status = 503
    title = "This host can't do this now"


KINDS: dict[str, type[InsulaError]] = {each.__name__: each for each in InsulaError.__subclasses__()}
"""The kinds of errors by their codes: those of this module, as no other is imported yet."""


def defect(error: BaseException) -> Failed:
    """Return the error for clients of an exception that was not expected."""
    return Failed(f"insulad has a defect: {type(error).__name__}", "see insulad's log, and report it")


def from_dict(data: dict[str, str | None]) -> InsulaError:
    """Make an error from the result of `InsulaError.to_dict`, or of `to_problem`, for clients; an unknown kind becomes
    `Failed`."""
    kind = KINDS.get(data.get("error") or data.get("code") or "", Failed)
    error = kind(data.get("message") or data.get("detail") or "unknown error", data.get("hint"))
    exit_status = data.get("exit_status") or ""
    error.exit_status = int(exit_status) if exit_status.isdigit() else None
    return error
