"""How long requests took until their response began, by route and class of status."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from insula.control.telemetry import Histogram

NONE = "none"
"""The route of requests for which there is none, and of those that were refused before it was looked for."""
_METHODS = frozenset(("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"))


class RequestTimes:
    """A histogram for each route and class of status. What clients choose, such as a path or method, is no label."""

    def __init__(self) -> None:
        self._histograms: dict[tuple[str | None, str, int], Histogram] = {}

    def observe(self, scope: Any, status: int, seconds: float) -> None:
        method, template = scope.get("method"), scope.get("path_template")
        key = (template, method, status // 100) if template and method in _METHODS else (None, "", status // 100)
        histogram = self._histograms.get(key)
        if histogram is None:
            histogram = self._histograms[key] = Histogram()
        histogram.observe(seconds)

    def by_labels(self) -> Mapping[tuple[str, ...], Histogram]:
        """Return them by (route, class of status), as in ``("GET /v1/tenants/{tenant}", "2xx")``."""
        return {
            (f"{method} {plain_route(template)}" if template else NONE, f"{status}xx"): histogram
            for (template, method, status), histogram in self._histograms.copy().items()
        }


@functools.cache  # of the routes that there are
def plain_route(template: str) -> str:
    """Return a route without the types of its parameters, as in ``/v1/tenants/{tenant}``."""
    return template.replace(":str}", "}").replace(":path}", "}").replace(":int}", "}")
