"""Pages and filters of lists: the parameters `limit`, `cursor`, `prefix`, `label` and `state`.

A list stays an array. If there are more items, the answer has the field Link with the target of the next page
(RFC 8288). A page is what follows the last item of the page before in the order of names, so that an item that is
created or removed meanwhile neither repeats nor hides others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, TypeVar
from urllib.parse import quote, urlencode

from litestar import Request
from litestar.di import NamedDependency, Provide
from litestar.params import QueryParameter

from insula.api.cursors import MAX_CURSOR, PATTERN, Cursors, context_of
from insula.api.parameters import Sender
from insula.control.identities.authority import Authority
from insula.model import rules
from insula.model.errors import Invalid
from insula.model.rules import anchored

T = TypeVar("T")
MAX_LIMIT = 1000
_LABEL = rf"{rules.LABEL_NAME}(=[^\x00-\x1f]*)?"
STATES = ("created", "starting", "running", "paused", "stopping", "exited", "failed")

Limit = Annotated[
    int | None,
    QueryParameter(ge=1, le=MAX_LIMIT, description="items of a page; default: all. Link has the next page"),
]
CursorText = Annotated[
    str | None,
    QueryParameter(schema_extra={"pattern": PATTERN, "max_length": MAX_CURSOR}, description="from Link: the next page"),
]
Prefix = Annotated[
    str | None,
    QueryParameter(schema_extra={"max_length": 256}, description="only those whose names begin with this"),
]
LabelFilters = Annotated[
    list[str] | None,
    QueryParameter(
        name="label",
        schema_extra={
            "items": {"type": "string", "pattern": anchored(_LABEL), "maxLength": 1200, "examples": ["team=blue"]},
            "max_items": rules.MAX_LABELS,
        },
        description="only those with this label: NAME=VALUE, or NAME with any value; all of them if repeated",
    ),
]
StateName = Annotated[
    str | None,
    QueryParameter(name="state", schema_extra={"enum": list(STATES)}, description="only those in this state"),
]


class ListPage:
    """The part of a list that a request asks for."""

    def __init__(
        self,
        request: Request[Any, Any, Any],
        sender: Authority,
        limit: int | None,
        cursor: str | None,
        prefix: str | None,
        labels: Iterable[str] = (),
        state: str | None = None,
    ) -> None:
        self._request = request
        self._limit = limit
        self._prefix = prefix or ""
        labels = [*dict.fromkeys(labels)]
        if len(labels) > rules.MAX_LABELS:  # each is compared with all items
            raise Invalid(f"{len(labels)} filters by label are too many", f"use at most {rules.MAX_LABELS}")
        self._labels = [text.partition("=") for text in labels]
        self._state = state
        self._filters = [*(("label", text) for text in labels), *([("prefix", prefix)] if prefix else [])]
        if state is not None:
            if state not in STATES:
                raise Invalid(f"{state[:60]!r} is no state", f"use one of {', '.join(STATES)}")
            self._filters.append(("state", state))
        self._context = context_of(sender, request.url.path, urlencode(self._filters))
        self._cursors: Cursors = request.app.state.cursors
        self._after = None if cursor is None else self._cursors.open(cursor, self._context)

    def of(
        self,
        items: Iterable[T],
        name: Callable[[T], str],
        *,
        key: Callable[[T], str] | None = None,
        labels: Callable[[T], Mapping[str, str]] | None = None,
        state: Callable[[T], str] | None = None,
    ) -> list[T]:
        """Return the items of this page, in the order of `key`, which is unique; by default that of names."""
        key = key or name
        found = [item for item in items if name(item).startswith(self._prefix)]
        if labels is not None and self._labels:
            found = [item for item in found if self._has_labels(labels(item))]
        if state is not None and self._state is not None:
            found = [item for item in found if state(item) == self._state]
        if self._limit is None and self._after is None:
            return found
        found.sort(key=key)
        if self._after is not None:
            after = self._after
            found = [item for item in found if key(item) > after]
        if self._limit is not None and len(found) > self._limit:
            found = found[: self._limit]
            self._tell_next(key(found[-1]))
        return found

    def _has_labels(self, labels: Mapping[str, str]) -> bool:
        return all(name in labels and (not equals or labels[name] == value) for name, equals, value in self._labels)

    def _tell_next(self, last: str) -> None:
        """Have the answer name the page after the item `last`."""
        query = [*self._filters, ("limit", str(self._limit)), ("cursor", self._cursors.seal(last, self._context))]
        target = quote(self._request.url.path, safe="/:@,+~") + "?" + urlencode(query)
        self._request.scope["state"]["link"] = f'<{target}>; rel="next"'


async def _page(
    request: Request[Any, Any, Any],
    sender: Sender,
    limit: Limit = None,
    cursor: CursorText = None,
    prefix: Prefix = None,
) -> ListPage:
    return ListPage(request, sender, limit, cursor, prefix)


async def _labelled_page(
    request: Request[Any, Any, Any],
    sender: Sender,
    limit: Limit = None,
    cursor: CursorText = None,
    prefix: Prefix = None,
    labels: LabelFilters = None,
) -> ListPage:
    return ListPage(request, sender, limit, cursor, prefix, labels or ())


async def _instances_page(
    request: Request[Any, Any, Any],
    sender: Sender,
    limit: Limit = None,
    cursor: CursorText = None,
    prefix: Prefix = None,
    labels: LabelFilters = None,
    in_state: StateName = None,
) -> ListPage:
    return ListPage(request, sender, limit, cursor, prefix, labels or (), in_state)


Paged = NamedDependency[ListPage]
"""The page of a list, as the parameter `page`; `labelled` of objects with labels, `selected` of instances."""
PAGES = {"page": Provide(_page), "labelled": Provide(_labelled_page), "selected": Provide(_instances_page)}
