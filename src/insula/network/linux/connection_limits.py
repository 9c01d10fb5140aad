"""Limits of tracked connections, as rules.

The kernel counts the connections of an element by a list of them, which it looks through whenever one more is opened.
With thousands in one list that takes milliseconds of the host's processors, so a list is short here: a limit is spread
over buckets, and a connection belongs to one of these by its random number in the kernel (`ct id`). Those that their
bucket has no room for go to a spare bucket, which several share, so that the buckets need not fill evenly. All of them
together have room for the limit. Who is refused opens no further connection for `PAUSE`, which costs one look-up: else
each refused packet would be in a list until the kernel finds that it has no connection.

Only the first packet of a connection is counted. Its place is in the list until it ends.
"""

from __future__ import annotations

from typing import Final

PAUSE: Final = "20ms"
BUCKET: Final = 128  # connections of the limit for each bucket
SPARE: Final = 1024  # connections of the limit for each spare bucket
_FIRST_SPARE: Final = 512  # the number of the first spare bucket, in the same set
FIRST: Final = "ct state new ct status ! confirmed"
"""Matches a packet that opens a connection: later ones are new as well until there is an answer."""


def sets(name: str, key: str) -> str:
    """Return the sets of a limit for each `key`."""
    return f"""set {name} {{ typeof {key} . meta mark; size 1048576; flags dynamic; }}
    set {name}_full {{ typeof {key}; size 65535; flags dynamic,timeout; timeout {PAUSE}; }}"""


def rules(name: str, key: str, most: int, match: str = "") -> str:
    """Return rules that drop a packet which opens a connection, if there are `most` of the same key. They are for
    packets that match `FIRST` and `match`."""
    buckets, spares = max(1, most // BUCKET), max(1, most // SPARE)
    each = most * 7 // 8 // buckets
    spare = (most - each * buckets) // spares
    bucket = f"{key} . jhash ct id mod {buckets} seed 0x1 ct count over {each}"
    other = f"{key} . jhash ct id mod {spares} seed 0x2 offset {_FIRST_SPARE} ct count over {spare}"
    match = match and f"{match} "
    return f"""{match}{key} @{name}_full drop
        {match}add @{name} {{ {bucket} }} add @{name} {{ {other} }} add @{name}_full {{ {key} }} drop"""
