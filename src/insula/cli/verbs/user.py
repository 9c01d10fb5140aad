"""insula user: users, service accounts and their roles."""

from __future__ import annotations

from insula.cli.connection import connect
from insula.cli.options import Arguments, Command, Option, UsageError, whole
from insula.cli.output import age, clean, listing
from insula.cli.verbs.lifecycle import each
from insula.client import Client

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


TENANT_ROLES = ("admin", "member", "viewer")  # as in model/permissions.py, which takes longer to import
HOST_ROLES = ("operator", "auditor")


def create(arguments: Arguments) -> int:
    identities = connect(arguments).identities
    if arguments.service_account:
        if arguments.uid is not None or arguments.subject is not None:
            raise UsageError("a service account is no person", "leave out --uid and --subject")
        view = identities.create_service_account(arguments.tenant, arguments.name)
    else:
        view = identities.create_user(
            arguments.name, arguments.uid, provider=arguments.provider, subject=arguments.subject
        )
    return listing(arguments.json, view, HEADER, [row(view)])


def ls(arguments: Arguments) -> int:
    identities = connect(arguments).identities
    views = identities.service_accounts(arguments.tenant) if arguments.service_account else identities.users()
    return listing(arguments.json, views, HEADER, map(row, views))


HEADER = ["NAME", "ID", "UID", "ROLES", "AGE"]


def row(view: dict[str, Any]) -> list[Any]:
    principal = view["principal"]
    tenant = principal["tenant"]
    name = f"{tenant}/{principal['name']}" if tenant else principal["name"]
    roles = [f"{each['role']} of {each['tenant'] or 'the host'}" for each in view["bindings"]]
    return [name, principal["id"], principal["uid"], ", ".join(roles) or None, age(principal["created"])]


def rm(client: Client, arguments: Arguments, user: str) -> None:
    tenant, slash, name = user.rpartition("/")
    if slash:
        client.identities.remove_service_account(tenant, name)
    else:
        client.identities.remove_user(name)


def bind(arguments: Arguments) -> int:
    tenant = None if arguments.role in HOST_ROLES else arguments.tenant
    view = connect(arguments).identities.bind(arguments.user, arguments.role, tenant)
    return listing(arguments.json, view, BINDINGS, [binding(view)])


def unbind(arguments: Arguments) -> int:
    connect(arguments).identities.unbind(arguments.user, None if arguments.host else arguments.tenant)
    print(clean(arguments.user))
    return 0


def bindings(arguments: Arguments) -> int:
    views = connect(arguments).identities.bindings(None if arguments.host else arguments.tenant)
    return listing(arguments.json, views, BINDINGS, map(binding, views))


BINDINGS = ["USER", "ROLE", "TENANT", "AGE"]


def binding(view: dict[str, Any]) -> list[Any]:
    return [view["user"], view["role"], view["tenant"], age(view["created"])]


_SERVICE = Option("--service-account", "a service account of the tenant instead of a user")
_HOST = Option("--host", "on the host instead of in the tenant")
_USER = "USER is a name, or TENANT/NAME for a service account."
_BOUND = f"{_USER[:-1]}, or PROVIDER:GROUP for all who have\nthat group in tokens of this provider of OpenID Connect."
COMMANDS = {
    "create": Command(
        create,
        "Create a user, or a service account, without a role.",
        "NAME",
        [
            Option("--uid", "the user of this host that it is", "UID", parse=whole(1)),
            Option("--subject", "who it is at a provider of OpenID Connect: `sub` of its tokens", "SUB"),
            Option("--provider", "the provider's name in the settings; default: the only one", "NAME"),
            _SERVICE,
        ],
        details="A user with a UID needs no token on this host: the kernel proves who it is. Others get a token, by\n"
        "`insula token create --user NAME`.",
    ),
    "ls": Command(ls, "List users, or a tenant's service accounts.", options=[_SERVICE]),
    "rm": Command(
        each(rm, "user"), "Remove users or service accounts, with their roles and tokens.", "USER...", details=_USER
    ),
    "bind": Command(
        bind,
        "Give a user a role in the tenant, instead of the one that it has there.",
        "USER ROLE",
        details=f"ROLE is {', '.join(TENANT_ROLES)} in the tenant; {' or '.join(HOST_ROLES)} on the host.\n{_BOUND}",
        complete={"ROLE": (*TENANT_ROLES, *HOST_ROLES)},
    ),
    "unbind": Command(unbind, "Take the role of a user in the tenant.", "USER", [_HOST], details=_BOUND),
    "bindings": Command(bindings, "List who has which role in the tenant.", options=[_HOST]),
}
