"""`insula login`, by another device and with a browser, at a real provider of OpenID Connect."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from base64 import urlsafe_b64decode
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest

from insula.client.oidc import Issuer
from insula.model.errors import Unauthenticated
from tests.support.cli import REPOSITORY
from tests.support.cloud import API, PORT, SETTINGS, Cloud
from tests.support.machine import Namespaces
from tests.support.provider import CLIENT, ISSUER, Browser, installed
from tests.support.wait import patiently, until

pytestmark = pytest.mark.skipif(not installed(), reason="scripts/provider has installed no provider")
HOST = f"https://127.0.0.1:{PORT}"

PROGRAM = """
import asyncio
from insula.sdk import AsyncInsula, Insula

async def main():
    async with AsyncInsula.remote("lab") as cloud:
        print((await cloud.identities.whoami()).user)

with Insula.remote("lab") as cloud:
    print(cloud.identities.whoami().user)
asyncio.run(main())
"""


class Machine:
    """The machine of a user who logs in, with a home directory. It reaches the host and the provider by loopback."""

    def __init__(self, cloud: Cloud, home: Path) -> None:
        self.cloud, self.home = cloud, home
        self.environment = {"PATH": os.environ["PATH"], "HOME": str(home), "INSULA_RUN": str(home / "none")}
        self.opened = home / "opened"
        browser = home / "browser"
        browser.write_text(f'#!/bin/sh\nprintf "%s" "$1" > "{self.opened}"\n')
        browser.chmod(0o700)
        self.environment["BROWSER"] = str(browser)

    @contextmanager
    def start(self, *words: str) -> Iterator[subprocess.Popen[str]]:
        command = Namespaces.wrap(self.cloud.daemon.namespaces.host, *self.cloud.daemon.cli.command(*words))
        pipe = subprocess.PIPE
        with subprocess.Popen(
            command, env=self.environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True
        ) as process:
            try:
                yield process
            finally:
                process.kill()  # it waits for a browser, if the test has failed

    def run(self, *words: str) -> tuple[int, str, str]:
        with self.start(*words) as process:
            out, err = process.communicate(timeout=patiently(60))
            return process.returncode, out.strip(), err

    def login(self, *words: str, account: str = "ann", approve: bool = True) -> tuple[int, str, str]:
        """Log in by the device grant: take the address that is shown to another machine, and consent there."""
        with self.start("login", HOST, "--allow-loopback", "--provider", "oidc", *words) as process:
            assert process.stderr
            url = next((line.split()[-1] for line in process.stderr if line.startswith("or open ")), None)
            if url is not None:
                act = self.cloud.provider.approve if approve else self.cloud.provider.refuse
                act(url, account)
            out, err = process.communicate(timeout=patiently(60))
            return process.returncode, out.strip(), err

    def whoami_of_the_sdk(self) -> list[str]:
        """The user's name, by a program, for threads and for asyncio."""
        command = Namespaces.wrap(self.cloud.daemon.namespaces.host, sys.executable, "-c", PROGRAM)
        environment = {**self.environment, "PYTHONPATH": str(REPOSITORY / "src")}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=patiently(60))
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    @property
    def file(self) -> Path:
        return self.home / ".config/insula/remotes/lab.json"

    def kept(self) -> dict[str, Any]:
        return dict(json.loads(self.file.read_text())["login"])

    def expire(self) -> None:
        """Make the command line take its token for one that ends soon."""
        remote = json.loads(self.file.read_text())
        remote["login"]["expires"] = 0.0
        self.file.write_text(json.dumps(remote))


@pytest.fixture
def machine(cloud: Cloud, tmp_path: Path) -> Machine:
    cloud.provider.accounts = {"ann": {"name": "Ann", "groups": ["devs"]}}
    cloud.provider.write()
    until(cloud.knows_keys, "insulad knows the keys", 90)
    return Machine(cloud, tmp_path)


@pytest.fixture
def fingerprint(cloud: Cloud) -> str:
    found = cloud.daemon.cli.ok("remote", "fingerprint").strip()
    assert found.startswith("SHA256:")
    return found


def test_nobody_is_trusted_at_first_sight(machine: Machine, fingerprint: str) -> None:
    status, _, error = machine.run("login", HOST, "--allow-loopback")
    assert status == 1 and "nobody is trusted at first sight" in error and "remote fingerprint" in error
    wrong = fingerprint[:-1] + ("0" if fingerprint[-1] != "0" else "1")
    status, _, error = machine.run("login", HOST, "--fingerprint", wrong)
    assert status == 1 and fingerprint in error and wrong in error, "both are named"
    status, _, error = machine.run("login", HOST, "--fingerprint", fingerprint, "--provider", "oidc")
    assert status == 1 and "is no https address" in error, "a provider on loopback takes an option"
    assert not (machine.home / ".config/insula/remotes").exists() or not machine.file.exists()


def test_a_login_by_another_device(cloud: Cloud, machine: Machine, fingerprint: str) -> None:
    cloud.operator.identities.bind("oidc:devs", "member", "acme")
    try:
        status, out, error = machine.login("--name", "lab", "--fingerprint", fingerprint)
        assert (status, out) == (0, f"lab: oidc#ann at 127.0.0.1:{PORT}, used from now on"), error
        assert machine.file.stat().st_mode & 0o777 == 0o600
        assert "member of tenant acme" in machine.run("whoami")[1]
        assert machine.run("-T", "acme", "ps")[0] == 0

        first = machine.kept()
        machine.expire()
        for status, out, error in ThreadPoolExecutor(4).map(lambda _: machine.run("whoami"), range(4)):
            assert status == 0 and out.startswith("oidc#ann"), error
        second = machine.kept()
        assert second["refresh"] != first["refresh"], "it was rotated"
        machine.expire()
        assert machine.whoami_of_the_sdk() == ["oidc#ann"] * 2
        assert machine.kept()["refresh"] != second["refresh"], "the SDK refreshes a login, and keeps it"
        machine.expire()
        assert machine.run("whoami")[0] == 0, "the login lives: no refresh token was used twice"

        cloud.provider.accounts = {"ann": {"name": "Ann", "groups": []}}
        cloud.provider.write()
        machine.expire()
        assert "no roles" in machine.run("whoami")[1], "removed from the group: the next token has no rights"

        refresh = machine.kept()["refresh"]
        assert machine.run("logout", "lab")[:2] == (0, "lab")
        assert refresh not in machine.file.read_text()
        status, _, error = machine.run("whoami")
        assert status == 1 and "no proof" in error
        with pytest.raises(Unauthenticated, match="ended at the provider"):
            issuer = Issuer({"issuer": ISSUER, "client_id": CLIENT}, loopback=True)
            cloud.provider.there(lambda: issuer.refresh(refresh))
    finally:
        cloud.operator.identities.unbind("oidc:devs", "acme")


def test_a_login_that_is_refused(machine: Machine, fingerprint: str) -> None:
    status, _, error = machine.login("--name", "lab", "--fingerprint", fingerprint, approve=False)
    assert status == 1 and "access_denied" in error
    assert not machine.file.exists()


def test_a_login_with_a_browser(cloud: Cloud, machine: Machine, fingerprint: str) -> None:
    words = ("--name", "lab", "--fingerprint", fingerprint, "--provider", "oidc", "--allow-loopback", "--browser")
    with machine.start("login", HOST, *words) as process:
        url = until(lambda: machine.opened.exists() and machine.opened.read_text(), "a browser was opened", 30)
        query = parse_qs(urlsplit(str(url)).query)
        assert query["code_challenge_method"] == ["S256"] and len(query["code_challenge"][0]) == 43
        callback = query["redirect_uri"][0]
        with pytest.raises(HTTPError, match="404"):  # a page of somebody else's, that does not know the state
            cloud.provider.there(lambda: Browser().open(f"{callback}?code=stolen&state=x"))
        page = cloud.provider.approve(str(url), "ann")
        assert "You are logged in" in page
        out, error = process.communicate(timeout=patiently(60))
        assert process.returncode == 0 and out.startswith("lab: oidc#ann"), error
    assert machine.run("whoami")[0] == 0


def test_a_hostile_answer_to_the_browser_is_text(cloud: Cloud, machine: Machine, fingerprint: str) -> None:
    words = ("--name", "lab", "--fingerprint", fingerprint, "--provider", "oidc", "--allow-loopback", "--browser")
    with machine.start("login", HOST, *words) as process:
        url = until(lambda: machine.opened.exists() and machine.opened.read_text(), "a browser was opened", 30)
        query = parse_qs(urlsplit(str(url)).query)
        hostile = urlencode({"state": query["state"][0], "error": "x", "error_description": "<script>\x1b[2J"})
        with pytest.raises(HTTPError) as caught:
            cloud.provider.there(lambda: Browser().open(f"{query['redirect_uri'][0]}?{hostile}"))
        assert b"&lt;script&gt;" in caught.value.read()
        _, error = process.communicate(timeout=patiently(60))
    assert process.returncode == 1 and r"\x1b[2J" in error and "\x1b" not in error


def test_access_tokens_where_the_provider_has_them(cloud: Cloud, machine: Machine, fingerprint: str) -> None:
    """With an audience these are the accepted kind (RFC 9068), and ID tokens are none."""
    audience = "https://insula.example"
    cloud.daemon.configure(API + SETTINGS.replace("[[oidc]]", f'[[oidc]]\naudience = "{audience}"', 1))
    cloud.daemon.stop()
    cloud.daemon.start()
    try:
        status, out, error = machine.login("--name", "lab", "--fingerprint", fingerprint)
        assert status == 0 and out.startswith("lab: oidc#ann"), error
        head = json.loads(urlsafe_b64decode(machine.kept()["token"].split(".")[0] + "=="))
        assert head["typ"] == "at+jwt"
        machine.expire()
        assert machine.run("whoami")[0] == 0, "refreshed"
        with pytest.raises(Unauthenticated, match="no access token by RFC 9068"):
            cloud.whoami(cloud.provider.token(aud=audience))
        with pytest.raises(Unauthenticated, match="for another audience"):
            cloud.whoami(cloud.provider.token(header={"typ": "at+jwt"}))
    finally:
        cloud.daemon.configure(API + SETTINGS)
        cloud.restart()
