"""A real provider of OpenID Connect (npm oidc-provider, certified) for the tests, and somebody who logs in there.

`scripts/provider` installs it. It listens on loopback in the network namespace of a daemon, whose issuer it is. Its
keys are the test's own, so that a test can sign tokens as the provider would not.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Callable
from html import unescape
from http.cookiejar import CookieJar
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlencode, urljoin, urlsplit
from urllib.request import HTTPCookieProcessor, ProxyHandler, build_opener

from joserfc import jwt
from joserfc.jwk import ECKey, Key, OKPKey, RSAKey

from insula.kernel.netns import call_in
from tests.support.machine import Namespaces
from tests.support.wait import patiently, until

INSTALLED = Path(__file__).parents[2] / ".provider"
SCRIPT = Path(__file__).parent / "oidc_provider" / "provider.mjs"
CLIENT = "insula"
PORT = 8080
ISSUER = f"http://127.0.0.1:{PORT}"
DEVICE_CODE = "urn:ietf:params:oauth:grant-type:device_code"
T = TypeVar("T")


def installed() -> bool:
    return (INSTALLED / ".complete").exists()


def make_key(kid: str, algorithm: str = "RS256") -> Key:
    fields: Any = {"kid": kid, "alg": algorithm, "use": "sig"}
    if algorithm == "ES256":
        return ECKey.generate_key("P-256", fields)
    return OKPKey.generate_key("Ed25519", fields) if algorithm == "EdDSA" else RSAKey.generate_key(2048, fields)


class IdentityProvider:
    """The provider, in the network namespace at `namespace`. `accounts` are the claims of its users, which it reads at
    each login."""

    def __init__(self, directory: Path, namespace: str) -> None:
        self.namespace = namespace
        self.config, self.log = directory / "provider.json", directory / "provider.log"
        self.keys = [make_key("first")]
        self.accounts: dict[str, dict[str, Any]] = {}
        self.ttl = 600
        self._process: subprocess.Popen[bytes] | None = None

    def write(self) -> None:
        """Write its configuration; it has to be started again for other keys."""
        grants = ["authorization_code", "refresh_token", DEVICE_CODE]
        client = {"client_id": CLIENT, "token_endpoint_auth_method": "none", "application_type": "native"}
        client |= {"grant_types": grants, "response_types": ["code"], "redirect_uris": ["http://127.0.0.1/callback"]}  # type: ignore[dict-item]
        client["id_token_signed_response_alg"] = self.keys[0].as_dict()["alg"]  # type: ignore[assignment]
        own = {"port": PORT, "modules": str(INSTALLED), "ttl": self.ttl, "accounts": self.accounts, "clients": [client]}
        text = json.dumps({**own, "jwks": {"keys": [each.as_dict(private=True) for each in self.keys]}})
        self.config.with_suffix(".new").write_text(text)
        self.config.with_suffix(".new").rename(self.config)

    def start(self) -> None:
        self.write()
        with self.log.open("wb") as log:
            command = Namespaces.wrap(self.namespace, "node", str(SCRIPT), str(self.config))
            self._process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)

        def listens() -> bool:
            assert self._process is not None and self._process.poll() is None, self.log.read_text()
            return "listening" in self.log.read_text()

        until(listens, "the provider listens", 30)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def rotate(self, *keys: Key) -> None:
        """Have it sign with the first of these keys, and publish them alone."""
        self.stop()
        self.keys = list(keys)
        self.start()

    @property
    def fetches(self) -> int:
        """How often its keys were fetched since it was started."""
        return self.log.read_text().count("keys fetched")

    def token(self, subject: str = "ann", key: Key | None = None, header: Any = None, **claims: Any) -> str:
        """Sign an ID token as the provider does, with other claims where they are given; None leaves one out."""
        key, now = key or self.keys[0], int(time.time())
        own = {"iss": ISSUER, "aud": CLIENT, "sub": subject, "iat": now, "exp": now + 300, **claims}
        head = {"alg": key.as_dict()["alg"], "kid": key.as_dict()["kid"], **(header or {})}
        wanted = {name: value for name, value in head.items() if value is not None}
        return jwt.encode(
            wanted,
            {n: v for n, v in own.items() if v is not None},
            key,
            algorithms=["RS256", "PS256", "ES256", "EdDSA"],
        )

    def there(self, function: Callable[[], T]) -> T:
        """Call a function in its network namespace."""
        fd = os.open(self.namespace, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return call_in(fd, function)
        finally:
            os.close(fd)

    def approve(self, url: str, account: str) -> str:
        """Log in at a page of the provider as a browser does, and consent; returns the last page."""
        return self.there(lambda: Browser().through(url, account))

    def refuse(self, url: str, account: str) -> str:
        """Log in, and refuse."""
        return self.there(lambda: Browser().through(url, account, abort=True))


class Browser:
    """Somebody who fills in forms."""

    def __init__(self) -> None:
        self._opener = build_opener(HTTPCookieProcessor(CookieJar()), ProxyHandler({}))

    def open(self, url: str, data: dict[str, str] | None = None) -> tuple[str, str]:
        """Follow redirects; returns the last URL and the page."""
        body = urlencode(data).encode() if data is not None else None
        with self._opener.open(url, body, timeout=patiently(20)) as response:
            return response.url, response.read().decode()

    def through(self, url: str, account: str, *, abort: bool = False) -> str:
        where, page = self.open(url)
        for _ in range(8):
            form = re.search(r"<form[^>]*action=\"([^\"]*)\"[^>]*>(.*?)</form>", page, re.S)
            if form is None:
                return page
            fields = {
                name: unescape(value)
                for name, value in re.findall(r'name="([^"]+)"(?:[^>]*?value="([^"]*)")?', form[2])
                if name != "abort"
            }
            if "login" in fields:
                fields |= {"login": account, "password": "any"}
            elif abort and "/device" in urlsplit(where).path:
                fields["abort"] = "yes"
            where, page = self.open(urljoin(where, unescape(form[1])), fields)
            if abort and "abort" in fields:
                return page
        raise AssertionError(f"no end of forms at {where}:\n{page}")
