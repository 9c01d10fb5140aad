"""`Problems`: faults on this host that could not be repaired. `insula status` shows them; the log has each change."""

from __future__ import annotations

import logging
from collections.abc import Awaitable

from insula.model.errors import InsulaError

log = logging.getLogger("insula.problems")


class Problems(dict[str, str]):
    """Faults by the object that they concern, as in ``problems["network acme/web"] = "the bridge can't be made"``."""

    def __setitem__(self, name: str, what: str) -> None:
        name, what = _plain(name), _plain(what)
        if self.get(name) != what:
            log.error("%s: %s", name, what)
        super().__setitem__(name, what)

    def report(self, name: str, error: BaseException) -> None:
        """Record `error` as the problem of `name`. Unexpected exceptions are logged with their traceback."""
        if not isinstance(error, InsulaError | OSError):
            log.error("%s: a defect of insulad", name, exc_info=error)
        self[name] = str(error) or type(error).__name__

    def solved(self, name: str) -> None:
        """Remove the problem of `name`, if there is one."""
        if super().pop(_plain(name), None) is not None:
            log.info("%s: solved", _plain(name))

    async def guard(self, name: str, work: Awaitable[object]) -> None:
        """Await `work`. Record its exception as the problem of `name`, and don't raise it."""
        try:
            await work
        except Exception as error:
            self.report(name, error)
        else:
            self.solved(name)


def _plain(text: str) -> str:
    """`text` with unprintable characters escaped: it may contain file names that a tenant chose."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
