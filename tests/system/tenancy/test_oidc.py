"""Users of a real provider of OpenID Connect, and those who forge its tokens.

One daemon and one provider on loopback, in a network namespace of their own. Tokens are the provider's where its own
behaviour counts; else the test signs them with the provider's key, so that they may say anything.
"""

from __future__ import annotations

import base64
import hmac
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from joserfc.jwk import RSAKey

from insula.client import Client
from insula.model.errors import Denied, InsulaError, NotFound, Unauthenticated
from tests.support.cloud import PORT, Cloud, problems
from tests.support.provider import CLIENT, ISSUER, installed, make_key
from tests.support.wait import patiently, until
from tests.system.tenancy.test_local_users import as_user

pytestmark = pytest.mark.skipif(not installed(), reason="scripts/provider has installed no provider")


def test_insulad_serves_while_a_provider_is_down(cloud: Cloud) -> None:
    assert "provider oidc: " in cloud.problems and "is the provider up" in cloud.problems
    assert "keys of the provider oidc are not known" in str(cloud.refusal)
    assert "provider oidc:" not in problems(cloud.operator), "it is up now"
    assert "provider other:" in problems(cloud.operator), "the positive control: that one never is"


def test_who_has_no_role_is_known_and_stored_nowhere(cloud: Cloud) -> None:
    before = cloud.operator.host.status()["revision"]
    found = [cloud.whoami(cloud.provider.token(f"stranger-{number}", name="root")) for number in range(20)]
    assert [each["user"] for each in found] == [f"oidc#stranger-{number}" for number in range(20)]
    assert len({each["id"] for each in found}) == 20
    assert all((each["host"], each["tenants"], each["display"]) == ([], {}, "root") for each in found)
    assert cloud.operator.host.status()["revision"] == before
    with pytest.raises(NotFound):
        cloud.client(cloud.provider.token()).instances.list("acme")


@pytest.mark.parametrize("subject", ["root", "operator", "0", "insula", "nobody"])
def test_a_name_makes_nobody_special(cloud: Cloud, subject: str) -> None:
    sender = cloud.whoami(cloud.provider.token(subject, name="operator", email="root@localhost"))
    assert (sender["user"], sender["host"], sender["tenants"]) == (f"oidc#{subject}", [], {})


def test_a_user_is_a_subject_of_an_issuer(cloud: Cloud) -> None:
    """Not a name, nor an address; the same subject of another provider is another user."""
    identities = cloud.operator.identities
    identities.create_user("ann", provider="oidc", subject="4711")
    identities.create_user("other-ann", provider="other", subject="4711")
    identities.bind("ann", "member", "acme")
    identities.bind("other-ann", "admin", "globex")
    try:
        sender = cloud.whoami(cloud.provider.token("4711", name="Ann", email="x@example.com"))
        assert (sender["user"], sender["tenants"], sender["proof"]) == ("ann", {"acme": "member"}, "oidc oidc")
        assert sender["display"] == "Ann"
        assert cloud.whoami(cloud.provider.token("4712", name="ann"))["tenants"] == {}
        with pytest.raises(InsulaError, match="that of another user"):
            identities.create_user("twin", provider="oidc", subject="4711")
        first = identities.user("ann")["principal"]["id"]
        identities.remove_user("ann")
        assert cloud.whoami(cloud.provider.token("4711"))["tenants"] == {}
        identities.create_user("ann", provider="oidc", subject="4711")
        again = cloud.whoami(cloud.provider.token("4711"))
        assert again["id"] != first and again["tenants"] == {}, "it inherits nothing"
    finally:
        for name in ("ann", "other-ann"):
            identities.remove_user(name)


def test_groups_have_roles(cloud: Cloud) -> None:
    identities, provider = cloud.operator.identities, cloud.provider
    identities.bind("oidc:/devs/team a", "member", "acme")
    identities.bind("oidc:ops", "viewer", "acme")
    identities.bind("oidc:ops", "auditor")
    try:
        assert cloud.whoami(provider.token(groups=["/devs/team a"]))["tenants"] == {"acme": "member"}
        both = cloud.whoami(provider.token(groups=["ops", "/devs/team a", "x"]))
        assert (both["tenants"], both["host"]) == ({"acme": "member"}, ["auditor"]), "the higher role of both"
        assert cloud.whoami(provider.token(groups=["devs", "OPS", "other:ops"]))["tenants"] == {}
        member = cloud.client(provider.token(groups=["/devs/team a"]))
        assert member.networks.create("acme", "mine", "10.9.0.0/24")
        member.networks.remove("acme", "mine")
        with pytest.raises(Denied, match="a token can't"):
            member.identities.create_token()
        shown = {(each["user"], each["kind"], each["role"]) for each in identities.bindings("acme")}
        assert {("oidc:/devs/team a", "group", "member"), ("oidc:ops", "group", "viewer")} <= shown
        assert cloud.whoami(provider.token())["tenants"] == {}, "removed from the group: the next token has no rights"
    finally:
        for name, tenant in (("oidc:/devs/team a", "acme"), ("oidc:ops", "acme"), ("oidc:ops", None)):
            identities.unbind(name, tenant)
    assert cloud.whoami(provider.token(groups=["/devs/team a", "ops"]))["tenants"] == {}
    assert [each for each in identities.users() if each["principal"]["issuer"]] == []


@pytest.mark.parametrize("label", ["nobody:x", "oidc:", "oidc:a\nb", "oidc:" + "x" * 257])
def test_what_is_no_group(cloud: Cloud, label: str) -> None:
    with pytest.raises(InsulaError, match=r"is no group|there is no provider"):
        cloud.operator.identities.bind(label, "member", "acme")


def test_a_group_gets_what_its_binder_holds(cloud: Cloud) -> None:
    """An admin of a tenant, who is a user of the host, gives roles of that tenant, and none of another or the host."""
    cloud.operator.identities.create_user("boss", 61011)
    cloud.operator.identities.bind("boss", "admin", "acme")
    boss, bind = 61011, ("user", "bind", "oidc:team")
    try:
        assert as_user(cloud.daemon, boss, *bind, "admin", tenant="acme").returncode == 0
        assert "there is no tenant" in as_user(cloud.daemon, boss, *bind, "viewer", tenant="globex").stderr
        assert "user.write" in as_user(cloud.daemon, boss, *bind, "auditor").stderr
        assert cloud.whoami(cloud.provider.token(groups=["team"]))["tenants"] == {"acme": "admin"}
        cloud.operator.identities.unbind("oidc:team", "acme")
    finally:
        cloud.operator.identities.remove_user("boss")


def now() -> int:
    return int(time.time())


FORGED: dict[str, tuple[dict[str, Any], str]] = {
    "another audience": ({"aud": "another"}, "for another client"),
    "another issuer": ({"iss": "https://evil.example"}, "of no provider"),
    "another party": ({"azp": "another"}, "issued to another client"),
    "two audiences without a party": ({"aud": [CLIENT, "another"]}, "issued to another client"),
    "no end": ({"exp": None}, "no time exp"),
    "an end that is no number": ({"exp": "tomorrow"}, "no time exp"),
    "an end far away": ({"exp": 10**12}, "out of bounds"),
    "valid for ever": ({"exp": now() + 3 * 86400}, "valid for"),
    "no subject": ({"sub": None}, "no subject"),
    "a subject of two lines": ({"sub": "a\nb"}, "no subject"),
    "an access token": ({"header": {"typ": "at+jwt"}}, "no ID token"),
    "an unknown extension": ({"header": {"b64": True}}, "extensions"),
    "groups that are none": ({"groups": {"a": "b"}}, "no list of texts"),
}


@pytest.mark.parametrize(("claims", "why"), FORGED.values(), ids=FORGED)
def test_what_a_token_must_say(cloud: Cloud, claims: dict[str, Any], why: str) -> None:
    with pytest.raises(Unauthenticated, match=why):
        cloud.whoami(cloud.provider.token(**claims))
    assert cloud.whoami(cloud.provider.token(aud=[CLIENT, "another"], azp=CLIENT)), "the positive control"


def test_clocks_may_differ_by_a_minute(cloud: Cloud) -> None:
    token = cloud.provider.token
    assert cloud.whoami(token(iat=now() - 300, exp=now() - 50))
    assert cloud.whoami(token(iat=now() + 50, nbf=now() + 50))
    with pytest.raises(Unauthenticated, match=r"expired at 20\d\d-.*Z, and the clock of this host says 20\d\d-.*Z"):
        cloud.whoami(token(iat=now() - 300, exp=now() - 62))
    with pytest.raises(Unauthenticated, match=r"issued 20\d\d-.*Z by the provider's clock, and the clock of this host"):
        cloud.whoami(token(iat=now() + 70))
    with pytest.raises(Unauthenticated, match=r"valid from 20\d\d-.*Z by the provider's clock"):
        cloud.whoami(token(nbf=now() + 70))


def unsigned(cloud: Cloud) -> str:
    return f"eyJhbGciOiJub25lIn0.{cloud.provider.token().split('.')[1]}."


def with_the_public_key(cloud: Cloud) -> str:
    """HS256 with the public key as its secret (CVE-2015-9235)."""
    public = cloud.provider.keys[0]
    assert isinstance(public, RSAKey)
    header = base64.urlsafe_b64encode(b'{"alg":"HS256","kid":"first"}').decode().rstrip("=")
    signed = f"{header}.{cloud.provider.token().split('.')[1]}"
    digest = hmac.digest(public.as_pem(private=False), signed.encode(), "sha256")
    return f"{signed}.{base64.urlsafe_b64encode(digest).decode().rstrip('=')}"


def with_its_own_key(cloud: Cloud) -> str:
    """Its key stands in its header, where it must not be looked for."""
    key = make_key("mine")
    return cloud.provider.token(key=key, header={"kid": "mine", "jwk": key.as_dict(private=False)})


def with_a_known_kid(cloud: Cloud) -> str:
    return cloud.provider.token(key=make_key("first"))


def with_another_body(cloud: Cloud) -> str:
    head, _, signature = cloud.provider.token("ann").split(".")
    return f"{head}.{cloud.provider.token('bob').split('.')[1]}.{signature}"


@pytest.mark.parametrize(
    "forge", [unsigned, with_the_public_key, with_its_own_key, with_a_known_kid, with_another_body]
)
def test_a_token_that_the_provider_has_not_signed(cloud: Cloud, forge: Any) -> None:
    with pytest.raises(Unauthenticated, match="not signed by"):
        cloud.whoami(forge(cloud))


@pytest.mark.parametrize(
    "text", ["eyJ.eyJ.", "ey..", "eyJhbGciOiJSUzI1NiJ9.bnVsbA.x", "e" + "y" * 20000 + "..", "ey.ey.ey"]
)
def test_what_is_no_token(cloud: Cloud, text: str) -> None:
    with pytest.raises(Unauthenticated):
        cloud.whoami(text)


@pytest.mark.parametrize(
    "claims",
    [{"_claim_names": {"groups": "src1"}, "_claim_sources": {"src1": {"endpoint": "https://x"}}}, {"hasgroups": True}],
)
def test_groups_that_are_left_out_are_said_to_be(cloud: Cloud, claims: dict[str, Any]) -> None:
    with pytest.raises(Denied, match="too many groups: the provider has left them out"):
        cloud.whoami(cloud.provider.token(**claims))


def test_a_stream_ends_with_its_token(cloud: Cloud) -> None:
    cloud.operator.identities.bind("oidc:watchers", "auditor")
    try:
        token = cloud.provider.token(groups=["watchers"], iat=now() - 300, exp=now() - 55)
        with pytest.raises(Unauthenticated, match="not valid any more"):
            for _ in cloud.client(token).host.events():
                pass
    finally:
        cloud.operator.identities.unbind("oidc:watchers")


def test_a_stream_ends_when_its_group_loses_the_role(cloud: Cloud) -> None:
    cloud.operator.identities.bind("oidc:watchers", "auditor")
    token = cloud.provider.token(groups=["watchers"])
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(lambda: list(cloud.client(token).host.events()))
        until(lambda: cloud.whoami(token)["host"] == ["auditor"], "it has the role")
        time.sleep(0.2)
        assert not done.done()
        cloud.operator.identities.unbind("oidc:watchers")
        with pytest.raises(Denied, match="a role of yours was taken"):
            done.result(patiently(30))


def test_keys_are_rotated_under_load(cloud: Cloud) -> None:
    """Tokens of the old key and of the new one are accepted, without a failed request, also from an algorithm to
    another; and known keys go on while the provider is down."""
    cloud.restart()
    old = cloud.provider.token()
    failed: list[InsulaError] = []
    stop: list[bool] = []

    def ask(_: int) -> int:
        count = 0
        while not stop:
            try:
                cloud.whoami(old)
            except InsulaError as error:
                failed.append(error)
            count += 1
        return count

    with ThreadPoolExecutor(3) as pool:
        counts = pool.map(ask, range(3))
        try:
            cloud.provider.rotate(make_key("second", "ES256"), make_key("third", "EdDSA"))
            first = cloud.whoami(cloud.provider.token())
            assert cloud.whoami(cloud.provider.token(key=cloud.provider.keys[1]))
            cloud.provider.stop()
            assert cloud.whoami(cloud.provider.token())["id"] == first["id"]
        finally:
            stop.append(True)  # else the pool waits for ever
        assert min(counts) > 0
    assert failed == []
    cloud.provider.start()


def test_a_thousand_unknown_keys_are_one_fetch(cloud: Cloud) -> None:
    cloud.restart()
    before = cloud.provider.fetches
    tokens = [cloud.provider.token(header={"kid": f"random-{number}"}) for number in range(1000)]

    def refused(token: str) -> bool:
        with pytest.raises(Unauthenticated, match="not signed by a key"):
            cloud.whoami(token)
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(refused, tokens))
    assert cloud.provider.fetches - before == 1
    assert cloud.whoami(cloud.provider.token()), "the positive control"


def test_who_asks_how_to_log_in_is_told_nothing_else(cloud: Cloud) -> None:
    from insula.api.tls.certificates import Certificates
    from insula.client.https import HttpsRemote

    authority = Certificates(cloud.daemon.root / "pki").trusted("server").decode()
    stranger = Client(remote=HttpsRemote([f"127.0.0.1:{PORT}"], authority), timeout=patiently(60))
    found = cloud.provider.there(stranger.identities.login)
    assert found.keys() == {"authority", "providers"}
    assert found["authority"] == authority
    assert found["providers"][0] == {
        "name": "oidc",
        "issuer": ISSUER,
        "client_id": CLIENT,
        "audience": "",
        "scopes": ["openid", "profile", "groups", "offline_access"],
        "authority": "",
    }
    for ask in (stranger.identities.whoami, stranger.host.status, stranger.tenants.list):
        with pytest.raises(Unauthenticated, match="no proof"):
            cloud.provider.there(ask)
