"""The size of a tree of files that no quota counts.

Such a tree may have millions of entries, and be nested deeper than Python recurses. du(1) walks it as a process of its
own, with the lowest priority, so that it neither holds the interpreter's lock nor takes time from instances.
"""

from __future__ import annotations

import asyncio
from asyncio.subprocess import DEVNULL, PIPE
from pathlib import Path

_COMMAND = ("nice", "-n", "19", "du", "--summarize", "--one-file-system")

_LIMIT = 120.0  # seconds: a tree of many millions of files must not keep others from being measured


async def measured(path: Path, *, inodes: bool = False) -> int | None:
    """The bytes that the tree takes on the disk, or the number of its inodes; None if that takes too long."""
    what = "--inodes" if inodes else "--block-size=1"
    child = await asyncio.create_subprocess_exec(
        *_COMMAND, what, "--", path, stdin=DEVNULL, stdout=PIPE, stderr=DEVNULL
    )
    try:
        async with asyncio.timeout(_LIMIT):
            said, _ = await child.communicate()
    except TimeoutError:
        return None
    finally:
        if child.returncode is None:
            child.kill()
    first = said.split(maxsplit=1)[:1]
    return int(first[0]) if first and first[0].isdigit() else None  # status 1: a file went away meanwhile
