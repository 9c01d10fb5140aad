"""The table of permissions and roles, and what follows from it: what nobody may do, whatever roles they have."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from insula.cli.verbs.user import HOST_ROLES as CLI_HOST_ROLES
from insula.cli.verbs.user import TENANT_ROLES as CLI_TENANT_ROLES
from insula.control.identities.authority import NOBODY, OPERATOR, Authority
from insula.model.errors import Denied, NotFound
from insula.model.permissions import (
    BY_INVITATION,
    HOST_ROLES,
    NOT_BY_TOKEN,
    OF_EVERYBODY,
    PERMISSIONS,
    TABLE,
    TENANT_ROLES,
    Permission,
    Role,
    permissions_of,
)
from insula.model.principals import Principal

ANN = Principal(id="1" * 16, name="ann", created=0.0)
ROLES: tuple[Role, ...] = (*HOST_ROLES, *TENANT_ROLES)


def holder(role: Role, tenant: str = "acme", **more: object) -> Authority:
    """Somebody with one role."""
    if role in HOST_ROLES:
        return Authority(proof="uid 1000", principal=ANN, host=frozenset({role}), **more)  # type: ignore[arg-type]
    return Authority(proof="uid 1000", principal=ANN, tenants={tenant: role}, **more)  # type: ignore[arg-type]


def test_no_permission_is_a_pattern_and_none_is_there_twice() -> None:
    assert len(PERMISSIONS) == len(TABLE)
    for permission in TABLE:
        assert "*" not in permission.name and permission.allows
        assert set(permission.roles) <= {*HOST_ROLES, *TENANT_ROLES}
        assert "operator" in permission.roles or permission.scope == "self"


def test_roles_of_tenants_hold_nothing_of_the_host() -> None:
    for role in TENANT_ROLES:
        assert {PERMISSIONS[name].scope for name in permissions_of(role)} == {"tenant"}


def test_an_auditor_reads_and_changes_nothing() -> None:
    for name in permissions_of("auditor"):
        assert name.endswith(".read"), name


def test_roles_of_tenants_contain_each_other() -> None:
    assert permissions_of("viewer") < permissions_of("member") < permissions_of("admin") < permissions_of("operator")


@pytest.mark.parametrize("role", ROLES)
def test_a_token_makes_no_other_rights(role: Role) -> None:
    by_token = holder(role, token="2" * 16)
    assert not NOT_BY_TOKEN & by_token.held("acme")
    assert by_token.held("acme") == holder(role).held("acme") - NOT_BY_TOKEN


@pytest.mark.parametrize(("who", "given"), [*product(ROLES, ROLES)])
def test_nobody_gives_what_they_do_not_hold(who: Role, given: Role) -> None:
    """For each pair of roles: in the holder's tenant, in another one, and on the host."""
    sender = holder(who)
    assert sender.covers(permissions_of(given), "acme") == (permissions_of(given) <= permissions_of(who))
    assert sender.covers(permissions_of(given), "globex") == (
        who in HOST_ROLES and sender.covers(permissions_of(given), "acme")
    )
    assert sender.covers(permissions_of("operator"), None) == (who == "operator")


@pytest.mark.parametrize(("role", "permission"), [*product(ROLES, TABLE)])
def test_what_is_not_held_is_refused(role: Role, permission: Permission) -> None:
    """A tenant in which somebody has no role is the same as one that doesn't exist, whatever is asked."""
    name, scope, roles, _ = permission
    sender = holder(role)
    tenant = "acme" if scope == "tenant" else None
    if name in BY_INVITATION:
        with pytest.raises(Denied, match=name):
            sender.check(name, tenant)
    elif role in roles or scope == "self":
        sender.check(name, tenant)
    else:
        with pytest.raises(Denied, match=name):
            sender.check(name, tenant)
    if role in TENANT_ROLES and scope == "tenant":
        for foreign in ("globex", "absent"):
            with pytest.raises(NotFound, match=f"there is no tenant {foreign}") as raised:
                sender.check(name, foreign)
            assert raised.value.to_dict()["hint"] == "`insula tenant ls` lists them"


def test_the_operator_may_everything_and_nobody_nothing() -> None:
    for permission in TABLE:
        tenant = "acme" if permission.scope == "tenant" else None
        if permission.name in BY_INVITATION:
            continue
        OPERATOR.check(permission.name, tenant)
        if permission.scope != "self":
            with pytest.raises((Denied, NotFound)):
                NOBODY.check(permission.name, tenant)


def test_an_invitation_is_good_for_its_exchange_alone() -> None:
    invited = holder("operator", token="2" * 16, invited=True)
    assert invited.held("acme") == BY_INVITATION == {"self.join"}


def test_a_token_for_some_instances_gives_nothing_else() -> None:
    limited = holder("admin", token="2" * 16, labels={"job": "7"})
    held = limited.held("acme")
    assert {"instance.write", "instance.exec", "image.read"} <= held
    assert not {"network.write", "image.write", "image.export", "binding.read", "service-account.read"} & held
    assert OF_EVERYBODY & held == {"self.read"}
    assert not replace(OPERATOR, labels={"job": "7"}).sees_host and OPERATOR.sees_host


def test_the_table_in_the_docs_is_the_one_in_the_code() -> None:
    text = (Path(__file__).parents[2] / "docs" / "tenancy.md").read_text()
    for name, scope, roles, allows in TABLE:
        cells = ["✓" if role in roles or scope == "self" else "" for role in ROLES]
        assert f"| `{name}` | {scope} | {' | '.join(cells)} | {allows} |\n" in text
    assert len(re.findall(r"^\| `[a-z-]+\.[a-z]+` \|", text, re.M)) == len(TABLE)


def test_the_command_line_knows_the_roles() -> None:
    assert (CLI_HOST_ROLES, CLI_TENANT_ROLES) == (HOST_ROLES, TENANT_ROLES)
