"""Where a proof may come from: files and descriptors, never arguments, variables, queries or an instance."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from insula.control.tenants import FIRST_ID
from insula.model.errors import Invalid
from insula.model.principals import DEFAULT_TTL, MAX_CERTIFICATE_TTL, MAX_TTL
from tests.support.daemon import Daemon
from tests.system.tenancy.conftest import Houses, People, Person
from tests.system.tenancy.http import exchange
from tests.system.tenancy.test_quotas import as_user

STRANGER = 61041
DOCS = Path(__file__).parents[3] / "docs" / "tenancy.md"


@pytest.fixture(scope="module")
def ann(people: People, houses: Houses) -> Person:
    return people.person("member", houses.acme.tenant)


@pytest.fixture(scope="module")
def reachable(daemon: Daemon) -> Iterator[None]:
    """Others may enter the directories of the tests, as they may /run/insula."""
    modes = {path: path.stat().st_mode & 0o7777 for path in (daemon.path, daemon.path.parent)}
    for path in modes:
        path.chmod(0o711)
    yield
    for path, mode in modes.items():
        path.chmod(mode)


def test_a_token_comes_from_standard_input_or_a_descriptor(ann: Person) -> None:
    expected = f"{ann.name}, by token {ann.secret.split('_')[1]}"
    anonymous = ann.cli.by(Path("/dev/stdin"))
    assert anonymous.ok("whoami", stdin=ann.secret + "\n").startswith(expected)
    ours, theirs = os.pipe()
    os.write(theirs, ann.secret.encode())
    os.close(theirs)
    try:
        command = ann.cli.command("--token-file", f"/dev/fd/{ours}", "whoami")
        environment = {name: text for name, text in ann.cli.environment().items() if name != "INSULA_TOKEN_FILE"}
        done = subprocess.run(command, env=environment, pass_fds=[ours], capture_output=True, text=True)
    finally:
        os.close(ours)
    assert done.stdout.startswith(expected), done


def test_a_token_is_no_argument_and_no_variable(daemon: Daemon, ann: Person) -> None:
    for words in (("--token", ann.secret, "whoami"), (f"--token={ann.secret}", "whoami")):
        refused = daemon.cli.run(*words)
        assert refused.status == 2 and ann.secret not in refused.out, refused
    environment = {**daemon.cli.environment(), "INSULA_TOKEN": ann.secret}
    done = subprocess.run(daemon.cli.command("whoami"), env=environment, capture_output=True, text=True)
    assert done.stdout.startswith("operator, by socket"), done
    given = daemon.cli.run("--token-file", ann.secret, "whoami")
    assert given.status == 1 and "No such file" in given.err


@pytest.mark.parametrize("name", ["token", "access_token", "authorization"])
def test_a_token_in_a_query_is_none(name: str, daemon: Daemon, ann: Person, reachable: None) -> None:
    """As RFC 6750, 2.3, would have it: it would be in logs, and in histories."""
    where, secret = daemon.run / "users.sock", ann.secret
    with as_user(STRANGER):
        assert exchange(where, "GET", "/v1/whoami", token=secret).status == 200, "the control"
        refused = exchange(where, "GET", f"/v1/whoami?{name}={secret}")
        assert exchange(where, "POST", "/v1/tokens", {"access_token": secret}).status == 403
    assert refused.status == 403 and secret not in refused.body.decode()


def test_user_ids_of_instances_are_refused_at_both_sockets(daemon: Daemon, ann: Person, reachable: None) -> None:
    """Root of an instance, at a socket that is visible in it, is such a user of the host."""
    for uid in (FIRST_ID, FIRST_ID + 1000):
        with as_user(uid):
            refused = exchange(daemon.run / "users.sock", "GET", "/v1/whoami")
            assert (refused.status, refused.json["detail"]) == (403, f"user {uid} may not use insulad")
            with pytest.raises(PermissionError):
                exchange(daemon.run / "insulad.sock", "GET", "/v1/whoami")


def test_nothing_in_an_instance_proves_anything(ann: Person, houses: Houses) -> None:
    """Who may run processes in it gets no rights by that."""
    ann.cli.ok("run", "-d", "--name", "searched", "busybox", "sleep", "600")
    search = (
        "cat /proc/1/environ /proc/mounts /etc/hosts /etc/resolv.conf | tr '\\0' '\\n';"
        "find / -xdev -type s; grep -rlE 'insula_[0-9a-f]{16}_' /etc /run /root /tmp /home 2>/dev/null; echo searched"
    )
    found = ann.cli.ok("exec", "searched", "sh", "-c", search)
    assert found.endswith("searched") and "PATH=" in found
    assert not re.search(r"insula_[0-9a-f]{16}|\.sock\b|INSULA", found), found
    ann.cli.ok("rm", "-f", "searched")


# -- lives and forms -------------------------------------------------------------------------------------------------


def test_every_token_ends(people: People, ann: Person) -> None:
    now, operator = time.time(), people.operator.identities
    made = operator.create_token(ann.name)
    assert made["expires"] == pytest.approx(now + DEFAULT_TTL, abs=60) and DEFAULT_TTL == 30 * 86400
    longest = operator.create_token(ann.name, ttl=MAX_TTL)
    assert longest["expires"] == pytest.approx(now + 366 * 86400, abs=60)
    for wrong in (MAX_TTL + 1, 0, -1, 1e300):
        with pytest.raises(Invalid):
            operator.create_token(ann.name, ttl=wrong)
    assert MAX_CERTIFICATE_TTL == 90 * 86400
    listed = {each["id"]: each["expires"] for each in ann.client.identities.tokens()}
    assert listed[made["id"]] == made["expires"], "and its owner sees when"
    assert ann.client.identities.whoami()["expires"] in listed.values()
    for each in (made, longest):
        operator.revoke_token(each["id"])


def test_searchers_for_leaked_secrets_find_it(ann: Person) -> None:
    """By the expression that the documentation has."""
    (expression,) = re.findall(r"`(insula_\[[^`]*)`", DOCS.read_text())
    assert re.fullmatch(expression, ann.secret)
    assert not re.search(expression, ann.secret[:-1]) and not re.search(expression, ann.secret.upper())
