"""Errors of the kernel with the name of the entry and a hint; also at the end of an archive.

The error of an archive that is cut off can't be sent as HTTP status any more. So such an archive ends with a global
header (pax(1)) that has the error as JSON in a record of its own, and without the end marker.
"""

from __future__ import annotations

import errno
import json
import os
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from insula.model.errors import Conflict, Failed, InsulaError, from_dict
from insula.model.units import shorten

_RECORD = "INSULA.error"

_HINTS = {
    errno.EACCES: "check its owner and mode",
    errno.EPERM: "check its owner; only root may change owners",
    errno.EBUSY: "something is mounted on it: unmount that, or write to it in place",
    errno.ENOSPC: "free some space there",
    errno.EDQUOT: "free some space there",
    errno.ENAMETOOLONG: "choose shorter names",
    errno.EXDEV: "copy it without its other name: they would be on two file systems",
}


@contextmanager
def naming(shown: str) -> Iterator[None]:
    """Convert an OSError in the block to Failed, or to Conflict if it is read-only, with the name of the entry."""
    try:
        yield
    except OSError as error:
        number = error.errno or 0
        if number == errno.EROFS:
            raise Conflict(f"{shorten(shown, 200)} is read-only", "choose a place that isn't, as a tmpfs") from None
        why = os.strerror(number) if number else str(error)
        raise Failed(
            f"copying {shorten(shown, 200)} failed: {why}", _HINTS.get(number, "look at what is there")
        ) from None


def last_words(error: InsulaError) -> bytes:
    """Make the end of an archive that is cut off between two entries because of `error`."""
    return tarfile.TarInfo.create_pax_global_header({_RECORD: json.dumps(error.to_dict())})


def why(records: Mapping[str, str]) -> InsulaError | None:
    """Return the error in the global records at the end of an archive; None without one."""
    try:
        said = json.loads(records.get(_RECORD, "null"))
    except ValueError:
        return None
    return from_dict(said) if isinstance(said, dict) else None
