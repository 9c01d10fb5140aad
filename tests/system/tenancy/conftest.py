"""Fixtures of the tests of tenancy: two tenants, and people who are bound to them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from insula.client import Client
from insula.model.errors import Unavailable
from tests.support.cli import Cli
from tests.support.cloud import API, SETTINGS, Cloud, problems
from tests.support.daemon import Daemon
from tests.support.machine import Run
from tests.support.provider import IdentityProvider
from tests.support.wait import patiently, until
from tests.system.conftest import TenantFactory

_numbers = itertools.count()


class Person(NamedTuple):
    """A user with a token in a file."""

    name: str
    token: Path
    cli: Cli
    client: Client

    @property
    def secret(self) -> str:
        return self.token.read_text().strip()


class People:
    """Makes users with one role each, and removes them."""

    def __init__(self, daemon: Daemon, directory: Path) -> None:
        self.daemon = daemon
        self.directory = directory
        self.operator = Client(str(daemon.run / "insulad.sock"), timeout=60)
        self._made: list[str] = []

    def person(self, role: str, tenant: str | None = None, uid: int | None = None, **token: object) -> Person:
        """A new user with this role in a tenant, or on the host, and with a token. `uid` is its user of the host."""
        name = f"{role}-{next(_numbers)}"
        self.operator.identities.create_user(name, uid)
        self._made.append(name)
        self.operator.identities.bind(name, role, tenant)
        return self.with_token(name, tenant, **token)

    def with_token(self, name: str, tenant: str | None = None, **token: object) -> Person:
        """A user that is there, with a new token."""
        made = self.operator.identities.create_token(name, **token)
        file = self.directory / f"{name}-{made['id']}"
        file.write_text(made["token"] + "\n")
        file.chmod(0o600)
        cli = self.daemon.cli.by(file)
        return Person(name, file, cli.of(tenant) if tenant else cli, self.client(made["token"]))

    def client(self, token: str) -> Client:
        return Client(str(self.daemon.run / "users.sock"), token=token, timeout=60)

    def remove(self) -> None:
        there = {view["principal"]["name"] for view in self.operator.identities.users()}
        for name in self._made:
            if name in there:
                self.operator.identities.remove_user(name)


@pytest.fixture(scope="module")
def people(daemon: Daemon, tmp_path_factory: pytest.TempPathFactory) -> Iterator[People]:
    people = People(daemon, tmp_path_factory.mktemp("tokens"))
    yield people
    people.remove()


class Houses(NamedTuple):
    acme: Cli
    globex: Cli


@pytest.fixture(scope="module")
def houses(tenants: TenantFactory) -> Houses:
    """Two tenants, as the operator; each has an instance `web` that runs."""
    houses = Houses(tenants(), tenants())
    for cli in houses:
        cli.ok("run", "-d", "--name", "web", "busybox", "sleep", "600")
    return houses


@pytest.fixture(scope="package")
def cloud(run_: Run, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    daemon = Daemon(run_)
    provider = IdentityProvider(tmp_path_factory.mktemp("provider"), daemon.namespaces.host)
    mode = daemon.path.parent.stat().st_mode & 0o7777
    try:
        for path in (daemon.path.parent, daemon.path):
            path.chmod(0o711)
        daemon.configure(API + SETTINGS)
        daemon.start()
        operator = Client(str(daemon.run / "insulad.sock"), timeout=patiently(60))
        until(lambda: "provider oidc:" in problems(operator), "it has tried to fetch keys")
        with pytest.raises(Unavailable) as caught:
            Client(str(daemon.run / "users.sock"), token=provider.token()).identities.whoami()
        cloud = Cloud(daemon, provider, operator, problems(operator), caught.value)
        provider.start()
        operator.tenants.create("acme")
        operator.tenants.create("globex")
        until(cloud.knows_keys, "the provider's tokens are accepted", 30)
        yield cloud
    finally:
        provider.stop()
        daemon.remove()
        daemon.path.parent.chmod(mode)
