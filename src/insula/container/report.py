"""What the keeper and the spawner say on standard error, which is insulad's log or the journal."""

from __future__ import annotations

import os
import sys
import time


def report(who: str, what: str, error: BaseException | None = None) -> None:
    """A line as insulad writes them: time, level, who, what; with `error`, where it was raised."""
    # the journal notes the time itself (systemd.exec(5), JOURNAL_STREAM)
    when = "" if "JOURNAL_STREAM" in os.environ else time.strftime("%Y-%m-%d %H:%M:%S ")
    text = f"{when}ERROR {who}: {what}{': ' + repr(error) if error else ''}\n"
    if error and not isinstance(error, OSError):
        import traceback

        text += "".join(traceback.format_exception(error))
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except OSError:  # a full disk: it is worse to end over it
        return
