"""insula policy create | update | apply | ls | show | rm"""

from __future__ import annotations

from insula.cli.connection import connect
from insula.cli.options import Arguments, Command, Option, UsageError, whole
from insula.cli.output import age, clean, listing, print_json
from insula.cli.policy_rules import parse_operator_rule, parse_rule, rule_text, selector, selector_text
from insula.cli.verbs import apply as declared
from insula.cli.verbs.lifecycle import each
from insula.client import Client

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def create(arguments: Arguments) -> int:
    if arguments.operator:
        return _create_operator(arguments)
    _check_of_tenant(arguments)
    if not arguments.select and not arguments.all:
        raise UsageError("policy create needs --select, or --all", "as in --select app=db")
    rules = arguments.allow
    named = [rule["direction"] for rule in rules]
    directions = [
        direction
        for direction, given in (("in", getattr(arguments, "in")), ("out", arguments.out))
        if given or direction in named
    ]
    view = connect(arguments).policies.create(
        arguments.tenant,
        arguments.name,
        selector([word for text in arguments.select for word in text.split(",")]),
        directions or ["in", "out"],
        rules,
        audit=arguments.audit,
        dns=not arguments.no_dns,
    )
    print_json(view) if arguments.json else print(arguments.name)
    return 0


def _check_of_tenant(arguments: Arguments) -> None:
    if arguments.rule or arguments.priority is not None or arguments.tenants:
        raise UsageError("--rule, --priority and --tenants are for --operator", "policies of tenants have --allow")


def _check_of_operator(arguments: Arguments, *others: str) -> None:
    given = ("select", "in", "out", "allow", "audit", "no_dns", *others)
    if wrong := [f"--{each.replace('_', '-')}" for each in given if getattr(arguments, each)]:
        raise UsageError(f"a policy of the operator has no {wrong[0]}", "it has --rule, --tenants and --priority")


def _update_operator(arguments: Arguments) -> int:
    _check_of_operator(arguments, "remove", "enforce", "dns")
    changes: dict[str, Any] = {}
    if arguments.rule:
        changes["rules"] = arguments.rule
    if arguments.tenants:
        changes["tenants"] = selector([word for text in arguments.tenants for word in text.split(",")])
    if arguments.priority is not None:
        changes["priority"] = arguments.priority
    policy = connect(arguments).operator_policies.update(arguments.name, **changes)
    print_json(policy) if arguments.json else print(arguments.name)
    return 0


def _create_operator(arguments: Arguments) -> int:
    _check_of_operator(arguments, "all")
    policy = connect(arguments).operator_policies.create(
        arguments.name,
        arguments.rule,
        selector([word for text in arguments.tenants for word in text.split(",")]),
        1000 if arguments.priority is None else arguments.priority,
    )
    print_json(policy) if arguments.json else print(arguments.name)
    return 0


def update(arguments: Arguments) -> int:
    if arguments.operator:
        return _update_operator(arguments)
    _check_of_tenant(arguments)
    changes: dict[str, Any] = {"add_rules": arguments.allow, "remove_rules": arguments.remove}
    if arguments.audit and arguments.enforce:
        raise UsageError("--audit and --enforce exclude each other", "give one")
    if arguments.select:
        changes["select"] = selector([word for text in arguments.select for word in text.split(",")])
    if getattr(arguments, "in") or arguments.out:
        changes["directions"] = [d for d, given in (("in", getattr(arguments, "in")), ("out", arguments.out)) if given]
    if arguments.audit or arguments.enforce:
        changes["audit"] = bool(arguments.audit)
    if arguments.no_dns or arguments.dns:
        changes["dns"] = bool(arguments.dns)
    view = connect(arguments).policies.update(arguments.tenant, arguments.name, **changes)
    print_json(view) if arguments.json else print(arguments.name)
    return 0


def ls(arguments: Arguments) -> int:
    if arguments.operator:
        policies = connect(arguments).operator_policies.list()
        header = ["NAME", "PRIORITY", "TENANTS", "RULES", "AGE"]
        return listing(arguments.json, policies, header, (_operator_row(policy) for policy in policies))
    views = connect(arguments).policies.list(arguments.tenant)
    header = ["NAME", "SELECTS", "DIRECTIONS", "RULES", "INSTANCES", "MODE", "AGE"]
    return listing(arguments.json, views, header, (_row(view) for view in views))


def _row(view: dict[str, Any]) -> list[Any]:
    policy = view["policy"]
    mode = "audit" if policy["audit"] else "enforced"
    directions = ",".join(policy["directions"])
    return [
        policy["name"], selector_text(policy["select"]), directions, len(policy["rules"]), len(view["selects"]), mode,
        age(policy["created"]),
    ]  # fmt: skip


def _operator_row(policy: dict[str, Any]) -> list[Any]:
    tenants = selector_text(policy["tenants"])
    return [policy["name"], policy["priority"], tenants, len(policy["rules"]), age(policy["created"])]


def show(arguments: Arguments) -> int:
    client = connect(arguments)
    if arguments.effective is not None:
        if arguments.name is not None:
            raise UsageError("policy show takes a policy, or --effective INSTANCE", "give one")
        return _show_effective(client, arguments)
    if arguments.name is None:
        raise UsageError("policy show needs a policy, or --effective INSTANCE", "`insula policy ls` lists policies")
    if arguments.operator:
        return _show_operator(client, arguments)
    view = client.policies.get(arguments.tenant, arguments.name)
    if arguments.json:
        print_json(view)
        return 0
    policy = view["policy"]
    shown = {
        "tenant": policy["tenant"],
        "name": policy["name"],
        "selects": selector_text(policy["select"]),
        "instances": ", ".join(view["selects"]),
        "directions": ", ".join(policy["directions"]),
        "mode": "audit: it denies nothing" if policy["audit"] else "enforced",
        "dns": "open at the gateway" if policy["dns"] else "closed at the gateway",
        "labels": ", ".join(f"{name}={value}" for name, value in policy["labels"].items()),
        "created": f"{age(policy['created'])} ago",
    }
    _print(shown)
    for rule in policy["rules"]:
        print(f"{'allow':10} {clean(rule_text(rule))}")
    if policy["audit"]:
        _show_audited(view["audited"])
    return 0


def _print(shown: dict[str, object]) -> None:
    for name, value in shown.items():
        print(f"{name:10} {clean(value) or '-'}")


def _show_audited(flows: list[dict[str, Any]]) -> None:
    """Print what would have been denied."""
    if not flows:
        print("audit      nothing would have been denied so far")
    for flow in flows:
        ends = [flow[f"{end}_instance"] or flow[end] for end in ("source", "destination")]
        what = f"{ends[0]} → {ends[1]} {flow['protocol']}/{flow['port']}"
        number = flow["connections"]
        print(f"{'denied':10} {clean(what)} ({flow['direction']}), {number} connection{'s' if number != 1 else ''}")


def _show_effective(client: Client, arguments: Arguments) -> int:
    found = client.policies.effective(arguments.tenant, arguments.effective)
    if arguments.json:
        print_json(found)
        return 0
    for one in found["operator"]:
        rule = one["rule"]
        print(f"{'operator':10} {rule['action']} {clean(rule_text(rule))} (policy {clean(one['policy'])})")
    for direction in found["directions"]:
        print(f"{direction['direction']:10} {clean(direction['reason'])}")
        for one in direction["rules"]:
            print(f"{'':10} allow {clean(rule_text(one['rule']))} (policy {clean(one['policy'])})")
        if direction["audited_by"]:
            print(f"{'':10} counted for {clean(', '.join(direction['audited_by']))}, in audit")
    print(f"{'dns':10} {clean(found['dns_reason'])}")
    for lease in found["leases"]:
        what = f"{lease['address']} for {', '.join(lease['names'])}, {lease['seconds']:.0f} s more"
        print(f"{'leased':10} {clean(what)}")
    return 0


def _show_operator(client: Client, arguments: Arguments) -> int:
    policy = client.operator_policies.get(arguments.name)
    if arguments.json:
        print_json(policy)
        return 0
    created = f"{age(policy['created'])} ago"
    _print(
        {
            "name": policy["name"],
            "priority": policy["priority"],
            "tenants": selector_text(policy["tenants"]),
            "created": created,
        }
    )
    for rule in policy["rules"]:
        print(f"{rule['action']:10} {clean(rule_text(rule))}")
    return 0


def rm(client: Client, arguments: Arguments, name: str) -> None:
    if arguments.operator:
        client.operator_policies.remove(name)
    else:
        client.policies.remove(arguments.tenant, name)


_NAME = {"NAME": "policy"}
_SELECT = Option("--select", "the instances that it is about, by their labels", "NAME=VALUE[,…]", many=True)
_IN = Option("--in", "select them in direction in, also without a rule")
_OUT = Option("--out", "select them in direction out, also without a rule")
_ALLOW = Option("--allow", "allow from:PEER PORTS or to:PEER PORTS", "RULE", many=True, parse=parse_rule)
_AUDIT = Option("--audit", "deny nothing, and count what it would deny")
_NO_DNS = Option("--no-dns", "close the resolver at the gateway, too")
_OPERATOR = Option("--operator", "a policy of the operator, above those of all tenants")
_RULE = Option(
    "--rule",
    "with --operator: accept, deny or pass a RULE; the first that matches decides",
    "'ACTION RULE'",
    many=True,
    parse=parse_operator_rule,
)
_TENANTS = Option("--tenants", "with --operator: the tenants with these labels", "NAME=VALUE[,…]", many=True)
_RULES = """\
PEER is any, labels as in app=web,tier!=back, network:NAME, a range with exceptions as in 10.0.0.0/8,!10.1.0.0/16,
group:NAME, or a DNS name. PORTS are as in tcp/80,udp/5000-5100,icmp/echo; without them it is any protocol. Once a
policy selects an instance in a direction, only what some policy allows passes, also of open connections."""
COMMANDS = {
    "create": Command(
        create,
        "Create a policy: what instances may receive and send.",
        "NAME",
        [
            _SELECT,
            Option("--all", "it is about all of the tenant's instances"),
            _IN,
            _OUT,
            _ALLOW,
            _AUDIT,
            _NO_DNS,
            _OPERATOR,
            _RULE,
            _TENANTS,
            Option("--priority", "with --operator: the lowest is asked first (1000)", "N", parse=whole(0)),
        ],
        details=_RULES,
    ),
    "update": Command(
        update,
        "Change a policy. It is in force for open connections too when this returns. With --operator --rule\n"
        "replaces all rules.",
        "NAME",
        [
            _SELECT,
            Option("--in", "select in these directions only"),
            Option("--out", "select in these directions only"),
            _ALLOW,
            Option("--remove", "take back a rule", "RULE", many=True, parse=parse_rule),
            _AUDIT,
            Option("--enforce", "end the audit: deny from now on"),
            _NO_DNS,
            Option("--dns", "open the resolver at the gateway"),
            _OPERATOR,
            _RULE,
            _TENANTS,
            Option("--priority", "with --operator: the lowest is asked first", "N", parse=whole(0)),
        ],
        details=_RULES,
        complete=_NAME,
    ),
    "apply": Command(
        declared.run,
        "Make policies and address groups as files declare them: the same as `insula apply`.",
        options=declared.COMMANDS["apply"].options,
    ),
    "ls": Command(ls, "List policies, and how many instances each selects.", options=[_OPERATOR]),
    "show": Command(
        show,
        "Show a policy, and what it would have denied if it is in audit; or all that applies to an instance.",
        "[NAME]",
        [Option("--effective", "all that applies to an instance, and why", "INSTANCE", complete="instance"), _OPERATOR],
        complete=_NAME,
    ),
    "rm": Command(each(rm), "Remove policies.", "NAME...", [_OPERATOR], complete=_NAME),
}
