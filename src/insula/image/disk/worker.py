"""The child process that converts a disk image: what is in it comes from outside.

It has namespaces of its own (no network, no other processes), an empty directory as its root, no capability, a user who
owns nothing, limited resources, and a filter that lets it read and write what it has open, and little else
(`insula.image.confine`). It opens no file by name.

It runs as ``python -m insula.image.disk.worker``, with a job in JSON on the standard input; `run` is the parent's side.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import os
import signal
import sys
import zlib
from typing import TYPE_CHECKING, Any, BinaryIO

from insula.image import confine
from insula.image.disk.convert import MAX_DISK, ConvertedDisk, DiskFormat, convert, open_source
from insula.image.limits import MEMORY, ExtractionLimits
from insula.model.errors import Failed, InsulaError, Invalid

if TYPE_CHECKING:
    from insula.image.job import Job

MODULE = "insula.image.disk.worker"


def run(
    source: BinaryIO, target: BinaryIO, empty: int, kind: DiskFormat, limits: ExtractionLimits, work: Job
) -> ConvertedDisk:
    """Convert `source` to the new file `target`, in a child process of `work`. `empty` is an empty directory.

    Invalid, Failed.
    """
    from insula.image.worker import answer, start

    fds = [source.fileno(), target.fileno(), empty]
    job = {
        "source": fds[0],
        "target": fds[1],
        "empty": empty,
        "kind": kind,
        "limits": limits,
        "filter": base64.b64encode(confine.system_calls()).decode() if os.geteuid() == 0 else None,
    }
    child = start(MODULE, fds)
    return ConvertedDisk(**answer(child, *work.communicate(child, json.dumps(job).encode()), "converts disk images"))


def main() -> None:
    """Read the job, run it, and print the result."""
    job = json.load(sys.stdin)
    confine.end_with_parent()
    signal.signal(signal.SIGXCPU, _out_of_time)
    limits = ExtractionLimits(*job["limits"])
    confine.limit(limits._replace(tar=limits.tar + MAX_DISK))  # of the sizes of files, which have holes
    zlib.decompressobj(-12), hashlib.sha256()  # nothing can be loaded later
    try:
        result: dict[str, Any] = _convert(job, limits)._asdict()
    except InsulaError as error:
        result = dict(error.to_dict())
    except MemoryError:
        result = dict(Invalid(f"the disk image needs more than {MEMORY} bytes of memory", "convert it").to_dict())
    json.dump(result, sys.stdout)


def _convert(job: dict[str, Any], limits: ExtractionLimits) -> ConvertedDisk:
    if job["filter"] is not None:
        confine.enter_empty(job["empty"], base64.b64decode(job["filter"]))
    try:
        made = convert(open_source(job["source"], job["kind"]), job["target"], limits.bytes)
        os.fsync(job["target"])
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise Failed("the disk is full while importing a disk image", "free some space: insula image rm") from error
        raise Failed(f"importing a disk image failed: {error.strerror}", "see the log of insulad") from error
    return made._replace(cpu=sum(os.times()[:4]))


def _out_of_time(*_: object) -> None:
    raise Invalid("the disk image takes too much processor time", "it is too large, or hostile")


if __name__ == "__main__":
    main()
