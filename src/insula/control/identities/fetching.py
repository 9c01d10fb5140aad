"""Fetches small documents of providers of OpenID Connect: their metadata and their keys.

It blocks, and is run in a thread. The certificate is verified, redirects are refused, and the size and the whole time
are bounded: the other side, and the network, may be anything.
"""

from __future__ import annotations

import http.client
import json
import ssl
import time
from typing import Any
from urllib.parse import urlsplit

from insula.model.errors import Unavailable
from insula.model.oidc import is_provider_url

MAX_SIZE = 1 << 20
MAX_TIME = 10.0
"""Seconds for one document."""


def fetch(url: str, authorities: str, *, loopback: bool) -> dict[str, Any]:
    """Return the JSON object at a URL. `authorities` is a file with PEM; empty: those of the system. Unavailable."""
    if not is_provider_url(url, loopback=loopback):
        raise Unavailable(f"{url[:200]!r} is no https URL", "see the provider's metadata")
    try:
        found = json.loads(_read(url, authorities))
    except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
        raise Unavailable(f"{url}: {error or type(error).__name__}", "is the provider up, and reachable?") from None
    if not isinstance(found, dict):
        raise Unavailable(f"{url} has no JSON object", "is it the URL of a provider?")
    return found


def _read(url: str, authorities: str) -> bytes:
    """Return the body of a response of status 200. OSError, ValueError, http.client.HTTPException."""
    end, parts = time.monotonic() + MAX_TIME, urlsplit(url)
    host, port = parts.hostname or "", parts.port
    connection: http.client.HTTPConnection
    if parts.scheme == "https":
        context = ssl.create_default_context(cafile=authorities or None)
        connection = http.client.HTTPSConnection(host, port, timeout=MAX_TIME / 2, context=context)
    else:
        connection = http.client.HTTPConnection(host, port, timeout=MAX_TIME / 2)
    try:
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", target, headers={"accept": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise ValueError(f"status {response.status}")
        data = bytearray()
        while piece := response.read1(65536):
            data += piece
            if len(data) > MAX_SIZE:
                raise ValueError(f"it is larger than {MAX_SIZE} bytes")
            if time.monotonic() > end:
                raise TimeoutError(f"it takes more than {MAX_TIME:g} s")
        return bytes(data)
    finally:
        connection.close()
