"""Check a config.json before a container is made of it: the OCI runtime-spec 1.3 for Linux.

There are two steps. `schema` has the spec as a table of types, ranges and words, and `shape` checks a config against
it. Then `rules` checks what one field says about another, such as ID mappings without a user namespace, or a sysctl of
the host.

Without this the kernel would refuse a bad config half-way, with mounts made and hooks run, and the caller would get an
errno instead of the name of a field. So all that can be known beforehand is refused here, in one line that begins with
the field's path, as in ``linux.resources.memory.limit: '1g' is not a whole number``.

All of it runs in every `insula-oci create`, and so needs well under a millisecond and imports next to nothing.
"""

from __future__ import annotations

from insula.container.config import rules, shape
from insula.container.config.shape import Wrong

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


def check(config: object, *, bundle: str, warn: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Check a config, and return it without its nulls; it is changed in place.

    `bundle` is the directory that a relative root is in. `warn` is told of what the spec lets pass with a warning:
    unknown capabilities, which are left out. Raises Invalid with the field's path; nothing was made.
    """
    try:
        shape.walk(config, shape.CONFIG)
        assert isinstance(config, dict)
        rules.check(config, bundle, warn or _ignore)
    except Wrong as wrong:
        raise wrong.invalid() from None
    return config


def check_process(
    process: object, config: dict[str, Any], *, warn: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Check a process that joins the container of `config`, as of `exec --process`."""
    try:
        shape.walk(process, shape.PROCESS)
        assert isinstance(process, dict)
        rules.check_process(process, config, warn or _ignore)
    except Wrong as wrong:
        raise wrong.invalid("process") from None
    return process


def check_resources(resources: object, *, alone: bool = True) -> dict[str, Any]:
    """Check limits, as of `update --resources`. Unless they stand `alone`, only their shape is checked."""
    try:
        shape.walk(resources, shape.RESOURCES)
        assert isinstance(resources, dict)
        if alone:
            rules.check_resources(resources)
    except Wrong as wrong:
        raise wrong.invalid("resources") from None
    return resources


def since(config: dict[str, Any], minor: int) -> bool:
    """Whether a config, which has been checked, is of version 1.`minor` of the runtime-spec or later."""
    return int(config.get("ociVersion", "1.0.0").split(".")[1]) >= minor


def no_more_processes(resources: dict[str, Any]) -> None:
    """Make a `pids.limit` of 0 a limit, as in runtime-spec 1.3. Until 1.2 it meant that there is none.

    It becomes 1, as in runc: the kernel would make no first process in a group whose limit is 0.
    """
    if (resources.get("pids") or {}).get("limit") == 0:
        resources["pids"]["limit"] = 1


def _ignore(warning: str) -> None:
    pass
