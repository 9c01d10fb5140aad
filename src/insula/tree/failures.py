"""What the kernel refused, told with the name of the entry and what stands in the way; also at the end of an archive.

An archive that breaks off can't tell why by its HTTP status any more. So it ends with a global header (pax(1)) that has
the error as JSON in a record of our own, and without the end marker.
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
    errno.EACCES: "see who owns it, and its mode",
    errno.EPERM: "see who owns it; only root may give files away",
    errno.EBUSY: "something is mounted on it: unmount that, or write to it in place",
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room there",
    errno.ENAMETOOLONG: "choose shorter names",
    errno.EXDEV: "copy it without its other name: they would be on two file systems",
}


@contextmanager
def naming(shown: str) -> Iterator[None]:
    """OSError becomes Failed, or Conflict where it is read-only, and names the entry; other errors pass."""
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
    """What an archive ends with that breaks off between two entries because of `error`."""
    return tarfile.TarInfo.create_pax_global_header({_RECORD: json.dumps(error.to_dict())})


def why(records: Mapping[str, str]) -> InsulaError | None:
    """The error that an archive with these global records ends with."""
    try:
        said = json.loads(records.get(_RECORD, "null"))
    except ValueError:
        return None
    return from_dict(said) if isinstance(said, dict) else None
