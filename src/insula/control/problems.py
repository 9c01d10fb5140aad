"""What is wrong on this host and could not be repaired: for `insula status`, and for the log as it comes and goes."""

from __future__ import annotations

import logging
from collections.abc import Awaitable

from insula.model.errors import InsulaError

log = logging.getLogger("insula.problems")


class Problems(dict[str, str]):
    """What is wrong, by what it is wrong with, as in ``problems["network acme/web"] = "the bridge can't be made"``."""

    def __setitem__(self, name: str, what: str) -> None:
        name, what = _plain(name), _plain(what)
        if self.get(name) != what:
            log.error("%s: %s", name, what)
        super().__setitem__(name, what)

    def report(self, name: str, error: BaseException) -> None:
        """`error`, with its traceback in the log unless it is one that is meant for users."""
        if not isinstance(error, InsulaError | OSError):
            log.error("%s: a defect of insulad", name, exc_info=error)
        self[name] = str(error) or type(error).__name__

    def solved(self, name: str) -> None:
        """Nothing is wrong with `name` any more; nothing happens if nothing was."""
        if super().pop(_plain(name), None) is not None:
            log.info("%s: solved", _plain(name))

    async def guard(self, name: str, work: Awaitable[object]) -> None:
        """Await `work`; if it fails, whatever it is, that is a problem with `name`, and no more."""
        try:
            await work
        except Exception as error:
            self.report(name, error)
        else:
            self.solved(name)


def _plain(text: str) -> str:
    """One line that any terminal and any encoder takes: file names of strangers may be in it."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
