"""Declared state: files are sent as they are, since the server reads them."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Any

    Object = dict[str, Any]


class DeclaredResource:
    """Declared state. `files` are {"name", "format" (yaml, toml, json), "text"}; `tenant` is None for the host and all
    tenants. `options`: set, prune, force, replace, allow_empty, yes."""

    def __init__(self, client: Any) -> None:
        self.client = client

    def apply(self, tenant: str | None, files: Sequence[Object], **options: object) -> Iterator[Object]:
        """Yield what was done about each object: {"kind", "name", "operation", "state", "reason", …}."""
        return self.client.lines("POST", *_within(tenant), "apply", body={"files": [*files], **options})  # type: ignore[no-any-return]

    def diff(self, tenant: str | None, files: Sequence[Object], **options: object) -> list[Object]:
        """Return what `apply` would do, with differences."""
        return self.client.call("POST", *_within(tenant), "diff", body={"files": [*files], **options})  # type: ignore[no-any-return]

    def dump(self, tenant: str | None) -> Iterator[bytes]:
        """Yield what there is as YAML, which `apply` takes, in pieces as they arrive."""
        with self.client.stream("GET", *_within(tenant), "dump") as response:
            yield from response

    def schema(self) -> Object:
        """Return the JSON Schema of a document."""
        return self.client.call("GET", "schema")  # type: ignore[no-any-return]


def _within(tenant: str | None) -> tuple[str, ...]:
    return () if tenant is None else ("tenants", tenant)
