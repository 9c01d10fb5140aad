"""Errors of skopeo as one line."""

from __future__ import annotations

import pytest

from insula.image.egress import Egress
from insula.image.reference import parse
from insula.image.registry import Auth, explain
from insula.model.errors import Denied, Failed, InsulaError, Invalid, NotFound, Unavailable


def fatal(message: str) -> list[str]:
    return ["some warning", f'time="2026-01-01T00:00:00Z" level=fatal msg="{message}"']


@pytest.mark.parametrize(
    ("lines", "kind"),
    [
        (["setpriv: failed to execute skopeo: No such file or directory"], Unavailable),
        (fatal("writing blob: write /x/y: no space left on device"), Failed),
        (fatal(r"initializing source: pinging container registry r: Get \"https://r/v2/\": x509: bad"), Unavailable),
        (fatal("pinging container registry r: http: server gave HTTP response to HTTPS client"), Unavailable),
        (fatal("dial tcp: lookup r: no such host"), Unavailable),
        (fatal("reading manifest x in r/app: unauthorized: authentication required"), Denied),
        (fatal("reading manifest x in r/app: manifest unknown"), NotFound),
        (fatal("no image found in manifest list for architecture amd64"), Invalid),
        (fatal("choosing an image from manifest list docker://r: no image found in image index for amd64"), Invalid),
        (fatal("something\\nnew"), Failed),
        ([], Failed),
    ],
)
def test_errors_are_explained(lines: list[str], kind: type[InsulaError]) -> None:
    error = explain(parse("r.example/app:1"), lines)
    assert type(error) is kind
    assert error.hint
    assert "\n" not in str(error)


@pytest.mark.parametrize("name", ["127.0.0.1:40423/known:1", "r.example/denied/not-found:404", "403.example/x509:403"])
def test_the_images_name_is_not_taken_for_a_reason(name: str) -> None:
    """Numbers of ports and parts of names look like statuses of HTTP."""
    where = f"initializing source docker://{name}: "
    for why, kind in [
        ("pinging container registry: http: server gave HTTP response to HTTPS client", Unavailable),
        ("reading manifest: manifest unknown", NotFound),
        ("no image found in image index for amd64", Invalid),
        ("unexpected status: 404 not here", NotFound),
        ("unexpected status: 403 Forbidden", Denied),
        ("something new", Failed),
    ]:
        assert type(explain(parse(name), fatal(where + why))) is kind


def test_the_cause_is_not_cut_within_a_word() -> None:
    """skopeo says first what it wanted, and last why not; what is cut is cut between two of these."""
    where = "initializing source docker://r.example/app:1: reading manifest 1 in r.example/app"
    why = r"Get \"https://r.example/v2/\": proxyconnect tcp: EOF, said by the proxy"
    plain = why.replace("\\", "")
    assert explain(parse("r.example/app:1"), fatal(f"{'x' * 150}: {why}")).message.endswith(f"failed: '{plain}'")
    assert explain(parse("r.example/app:1"), fatal(f"{where}: {why}")).message.endswith(f"failed: '{where}: {plain}'")
    long = explain(parse("r.example/app:1"), fatal("start: " + "y" * 500)).message
    assert "'yyy" in long and long.endswith("...'") and "start" not in long


def test_a_login_shows_no_password() -> None:
    login = Auth(username="ada", password="correct horse")
    assert "correct" not in f"{login} {login!r} {login!s}"
    assert "ada" in repr(login)


@pytest.mark.parametrize(
    "detail",
    [
        "open /mnt/pull-home/etc/policy.json: permission denied",
        "dial tcp: lookup r.example on 10.0.0.1:53: server misbehaving",
        "dial tcp 127.0.0.1:80: connect: invalid argument",
        r"Get \"http://10.1.2.3/token\": EOF",
        "something new at host.example",
        "something new at ::1",
    ],
)
def test_a_tenant_is_told_nothing_of_the_host(detail: str) -> None:
    """The operator is; and a tenant is told a reason that names no place."""
    tenant = Egress(-1, ["10.0.0.1"])
    where = "reading blob: "
    told = explain(parse("r.example/app:1"), fatal(where + detail), tenant)
    text = f"{told} {told.hint}".replace("r.example", "")
    assert not any(part in text for part in ("/mnt", "10.", "127.", "host.example", "::1", "resolv"))
    assert "toomanyrequests" in explain(parse("r.example/app:1"), fatal(f"{where}toomanyrequests"), tenant).message
    assert "/srv/x" in explain(parse("r.example/app:1"), fatal("stat /srv/x: strange")).message, "the operator is told"
